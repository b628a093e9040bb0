"""Scoring again needs no model and keeps what was; status tells done, failed, stopped, missing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.cells.rescore import rescore_cell
from kvarena.harness.cells.sample_rows import score
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import load_choice
from kvarena.harness.report.status import cell_statuses, drop_planned, main, print_statuses
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.harness.store.shards import parse_shard
from kvarena.tasks.base import Sample
from kvarena.tasks.needle import Needle


def cell(results_dir: Path, policy: str = "keydiff", rows: list[dict] | None = None) -> CellFolder:
    """A needle cell with rows as a run would have written them."""
    folder = CellFolder(
        results_dir,
        {
            "task": {"name": "needle", "version": Needle.version, **load_choice("task", "needle")},
            "model": {"name": "toy"},
            "policy": {"name": policy},
            "budget": {"name": "64"},
            "seed": 0,
        },
    )
    folder.open({})
    with folder.claimed():
        folder.begin(2, {})
        for row in rows or []:
            folder.append(row)
    return folder


def row(sample_id: str, prediction: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": "needle",
        "model": "toy",
        "budget": "64",
        "sample_id": sample_id,
        "document": sample_id,
        "part": "",
        "references": ["48213"],
        "prediction": prediction,
        "finish_reason": "stop",
        "status": "ok",
        "score": 0.0,
        "ttft_sec": 1.5,
        **changes,
    }


def test_answers_are_scored_again_and_the_old_rows_stay(tmp_path: Path) -> None:
    folder = cell(
        tmp_path,
        rows=[
            row("a", "It is 48213."),
            row("b", "no idea"),
            row("c", "48213", status="score_error", error="boom", score=None),
            row("d", "", status="oom"),
        ],
    )
    before = folder.rows_path.read_bytes()
    assert rescore_cell(folder.path) == (3, 2)
    assert folder.rows_path.read_bytes().startswith(before)
    rows = read_rows([folder.path]).set_index("sample_id")
    assert rows.loc[["a", "b", "c"], "score"].tolist() == [1, 0, 1]
    assert rows["status"].tolist() == ["ok", "ok", "ok", "oom"]
    assert rows.loc["a", "ttft_sec"] == 1.5
    assert rescore_cell(folder.path) == (3, 0)  # nothing left to change, nothing written


def test_a_scorer_that_breaks_takes_no_score_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cell(tmp_path, rows=[row("a", "48213", score=1.0)])

    def broken(*arguments: Any, **options: Any) -> dict:
        raise RuntimeError("no such metric")

    monkeypatch.setattr(Needle, "score", broken)
    before = folder.rows_path.read_bytes()
    assert rescore_cell(folder.path) == (1, 0)
    assert folder.rows_path.read_bytes() == before
    assert "a keeps its score, RuntimeError: no such metric" in capsys.readouterr().out


def test_a_cell_of_forced_answers_is_refused(tmp_path: Path) -> None:
    folder = CellFolder(
        tmp_path,
        {
            "task": {"name": "fidelity-needle", "version": "1", **load_choice("task", "fidelity")},
            "model": {"name": "toy"},
            "policy": {"name": "keydiff"},
            "budget": {"name": "64"},
        },
    )
    folder.open({})
    with pytest.raises(UsageError, match="measures logits, which are not stored"):
        rescore_cell(folder.path)


def test_status_tells_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell(tmp_path, "done", [row("a", "x"), row("b", "x")]).write_status("done")
    cell(tmp_path, "failed", [row("a", "x"), row("b", "", status="oom")]).write_status("failed")
    cell(tmp_path, "killed", [row("a", "x")])  # says "running", but nobody holds its lock
    planned = cell(tmp_path, "planned")
    (planned.path / "status.json").unlink()
    planned.note_plan(2)
    running = cell(tmp_path, "running", [row("a", "x")])
    with running.claimed():
        found = {status.path.name.partition("-")[0]: status for status in cell_statuses(tmp_path)}
        print_statuses(list(found.values()))
    assert {name: status.state for name, status in found.items()} == {
        "done": "done",
        "failed": "failed",
        "killed": "incomplete",
        "planned": "missing",
        "running": "running",
    }
    assert (found["failed"].num_ok, found["failed"].num_failed) == (1, {"oom": 1})
    shown = capsys.readouterr().out
    assert "1 done, 1 failed, 1 incomplete, 1 missing, 1 running" in shown
    assert "1 oom" in shown


def test_status_of_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run something first"):
        cell_statuses(tmp_path)


def test_a_longer_plan_is_remembered(tmp_path: Path) -> None:
    folder = cell(tmp_path, rows=[row("a", "x")])
    folder.begin(20, {"ok": 1})
    folder.begin(3, {"ok": 1})
    assert json.loads((folder.path / "status.json").read_text())["num_planned"] == 20
    assert read_rows([folder.path])["num_planned"].tolist() == [20]


def test_scoring_again_keeps_what_was_asked_for(tmp_path: Path) -> None:
    folder = cell(tmp_path, rows=[row("a", "48213", status="score_error", error="x", score=None)])
    folder.write_status("failed")
    assert rescore_cell(folder.path) == (1, 1)
    (status,) = cell_statuses(tmp_path)
    assert (status.state, status.num_ok, status.num_planned) == ("incomplete", 1, 2)
    assert read_rows([folder.path])["num_planned"].tolist() == [2]


def test_a_plan_raises_what_is_missing_but_not_what_a_score_waits_for(tmp_path: Path) -> None:
    folder = cell(tmp_path, rows=[row("a", "x"), row("b", "x")])
    folder.write_status("done")
    folder.note_plan(6)
    (status,) = cell_statuses(tmp_path)
    assert (status.state, status.num_ok, status.num_planned) == ("incomplete", 2, 6)
    assert read_rows([folder.path])["num_planned"].tolist() == [2, 2]


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_status_gets_by_without_its_own_file(tmp_path: Path, content: bytes | None) -> None:
    folder = cell(tmp_path, rows=[row("a", "x")])
    path = folder.path / "status.json"
    path.unlink() if content is None else path.write_bytes(content)
    (status,) = cell_statuses(tmp_path)
    assert (status.state, status.num_ok, status.num_planned) == ("done", 1, 1)


def test_a_damaged_cell_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = cell(tmp_path, "damaged", [row("a", "x"), row("b", "x")])
    folder.rows_path.write_bytes(b"{\n" + folder.rows_path.read_bytes())
    cell(tmp_path, "good", [row("a", "x"), row("b", "x")])
    assert [status.state for status in cell_statuses(tmp_path)] == ["damaged", "done"]


# ---- a line per cell ----

MODEL = {"name": "llama-3.1-8b-instruct"}


def listed(results_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    print_statuses(cell_statuses(results_dir))
    return capsys.readouterr().out.splitlines()


def planned(results_dir: Path, **changes: Any) -> CellFolder:
    """A cell that a plan has noted and nothing ran in."""
    identity = {
        "task": {"name": "needle", "lengths": [1000]},
        "model": MODEL,
        "policy": {"name": "keydiff", "sinks": 0, "recent": 0},
        "codec": {"name": "none"},
        "budget": {"name": "512"},
        "question": "inside",
        "seed": 0,
        "chunk": 128,
        "content": {"policy": "abcd"},
    }
    folder = CellFolder(results_dir, {**identity, **changes})
    folder.note_plan(20)
    return folder


def begun(results_dir: Path, **changes: Any) -> CellFolder:
    """A cell in which one of two samples is done."""
    folder = planned(results_dir, **changes)
    folder.open({})
    folder.begin(2, {})
    folder.append(row("a", "x"))
    return folder


def test_every_cell_has_a_line_that_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(tmp_path)
    planned(tmp_path, codec={"name": "kivi(bits=4)"}, budget={"name": "8k"})
    planned(tmp_path, policy={"name": "keydiff", "sinks": 0, "recent": 32})
    planned(tmp_path, seed=1)
    planned(tmp_path, question="after")
    planned(tmp_path, task={"name": "needle", "lengths": [1000, 2000]})
    done = begun(tmp_path, policy={"name": "h2o"})
    done.append(row("b", "x"))
    planned(tmp_path, task={"name": "ruler"})
    lines = listed(tmp_path, capsys)
    sections: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith(("needle, ", "ruler, ")):
            title = line
        elif "0/20" in line or "2/20" in line:
            sections.setdefault(title, []).append(" ".join(line.split()[:-2]))
    assert set(sections) == {
        "ruler, llama-3.1-8b-instruct",
        "needle, llama-3.1-8b-instruct, question=inside, lengths=[1000]",
        "needle, llama-3.1-8b-instruct, question=inside, lengths=[1000, 2000]",
        "needle, llama-3.1-8b-instruct, question=after, lengths=[1000]",
    }
    own = sections["needle, llama-3.1-8b-instruct, question=inside, lengths=[1000]"]
    codes = {line.split("@")[1][:4] for line in own if line.startswith("keydiff@")}
    assert len(codes) == 2  # protection makes another policy of the same name
    texts = [line.partition("@")[0] + line.partition("@")[2][4:] for line in own]
    assert sorted(texts) == [
        "h2o 512 incomplete 2/20",
        "keydiff 512 recent=0, seed=0 missing 0/20",
        "keydiff 512 recent=0, seed=1 missing 0/20",
        "keydiff 512 recent=32, seed=0 missing 0/20",
        "keydiff+kivi(bits=4) 8k missing 0/20",
    ]
    assert "1 incomplete, 7 missing" in lines


def test_finished_cells_are_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cell(tmp_path, rows=[row("a", "x"), row("b", "x")])
    folder.write_status("done")
    (line,) = (line for line in listed(tmp_path, capsys) if line.startswith("keydiff"))
    assert line.split()[:4] == ["keydiff", "64", "done", "2/2"]


def test_two_hundred_cells_take_a_line_each_of_at_most_100_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for seed in range(10):
        for budget in ("512", "1k", "2k", "4k", "8k"):
            for codec in ("none", "kivi(window=64,bits=4)"):
                for recent in (0, 64):
                    planned(
                        tmp_path,
                        seed=seed,
                        budget={"name": budget},
                        codec={"name": codec},
                        policy={"name": "streaming_llm", "recent": recent},
                    )
    lines = listed(tmp_path, capsys)
    assert "200 missing" in lines
    assert sum("0/20" in line for line in lines) == 200
    assert max(map(len, lines)) <= 100
    assert len(lines) < 210
    assert len(set(lines)) > 200  # and no two of them are the same


def test_what_is_too_long_for_a_line_goes_on_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    name = f"locret(heads=/{'a' * 70}.safetensors,stabilizer_ratio=0.2)"
    planned(tmp_path, policy={"name": name}, codec={"name": "zipcache(window=64,salient=0.5)"})
    lines = listed(tmp_path, capsys)
    assert max(map(len, lines)) <= 100
    (first,) = (number for number, line in enumerate(lines) if line.startswith("locret"))
    shown = "".join(line.split()[0] for line in lines[first : first + 3] if line)
    assert f"{name}+zipcache(window=64,salient=0.5)" in shown


def test_cells_of_before_and_damaged_ones_are_listed_by_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = planned(tmp_path)
    (old.path / "status.json").write_text('{"num_in_plan": 7, "state": "planned"}')
    bad = begun(tmp_path, seed=1)
    (bad.path / "manifest.json").write_text("{")
    lines = listed(tmp_path, capsys)
    assert [line.split()[:3] for line in lines if line.startswith("keydiff")] == [
        *sorted([[old.path.name, "missing", "0/7"], [bad.path.name, "damaged", "0/20"]])
    ]
    assert f"damaged: {bad.path / 'manifest.json'} is damaged; move the folder away" in lines


def test_planned_cells_can_be_dropped_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = planned(tmp_path, model={"name": "other"})
    locked = planned(tmp_path, seed=1)
    noted = planned(tmp_path, seed=2)
    (noted.path / "notes.txt").write_text("mine")
    started = planned(tmp_path, seed=3)
    started.open({})
    with_rows = begun(tmp_path, seed=4)
    (with_rows.path / "manifest.json").unlink()
    link = gone.path.with_name("link")
    link.symlink_to(noted.path)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "status.json").write_text("{}")
    (linked := started.path.with_name("linked")).symlink_to(tmp_path / "far")
    others = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    del others[gone.path / "status.json"]
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path), "--drop-planned"])
    with locked.claimed():
        main()
    shown = capsys.readouterr().out
    assert "needle, other" in shown
    assert "1 removed" in shown
    assert shown.count("0/20") == 1
    assert not gone.path.exists()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == others | {locked.path / ".lock": b""}
    assert linked.is_symlink()
    main()  # the lock is free now
    assert "1 removed" in capsys.readouterr().out
    assert not locked.path.exists()
    main()
    assert "no cells" in capsys.readouterr().out


def test_dropping_is_advised_only_where_a_cell_would_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(tmp_path, seed=1).open({})
    assert "missing: planned or begun, and no sample has run" in listed(tmp_path, capsys)
    planned(tmp_path, seed=2)
    assert listed(tmp_path, capsys)[-1].endswith("make drop-planned forgets those that never began")


def test_a_shard_at_work_keeps_its_planned_cell(tmp_path: Path) -> None:
    folder = planned(tmp_path)
    shard = CellFolder(tmp_path, folder.identity, parse_shard("1/2"))
    with shard.claimed():
        assert drop_planned(tmp_path) == []
    assert [cell.path for cell in drop_planned(tmp_path)] == [folder.path]
    assert not (tmp_path / "runs" / "needle").exists()


# ---- scores that are none ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7, None, "high", True])
def test_a_scorer_that_gives_no_score_from_0_to_1_has_failed(
    value: Any,  # Any: what a scorer may return
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Needle, "score", lambda *_, **__: {"score": value, "all_found": 1.0})
    sample = Sample(id="a", prompt_token_ids=(1,), references=("4",), max_new_tokens=9)
    assert score(Needle(), sample, "4", finished=True) == {
        "status": "score_error",
        "error": f"ValueError: a score is a number from 0 to 1, got {value!r}",
    }
    folder = cell(tmp_path, rows=[row("a", "48213", score=1.0)])
    assert rescore_cell(folder.path) == (1, 0)
    assert "a keeps its score, ValueError: a score is a number" in capsys.readouterr().out


def test_an_answer_whose_score_is_nan_can_be_scored_again(tmp_path: Path) -> None:
    folder = cell(tmp_path, rows=[row("a", "It is 48213.", score=float("nan"))])
    (status,) = cell_statuses(tmp_path)
    assert (status.num_ok, status.num_failed) == (0, {"score_error": 1})
    assert rescore_cell(folder.path) == (1, 1)
    assert read_rows([folder.path])["score"].tolist() == [1.0]


@pytest.mark.parametrize("name", ["references", "document", "prediction", "finish_reason"])
def test_an_answer_that_lacks_a_field_is_not_scored_again(name: str, tmp_path: Path) -> None:
    answer = row("a", "48213")
    del answer[name]
    folder = cell(tmp_path, rows=[answer])
    with pytest.raises(UsageError, match=f"sample a has no {name}; move the folder away"):
        rescore_cell(folder.path)


def test_a_task_that_is_gone_is_not_scored_again(tmp_path: Path) -> None:
    folder = cell(tmp_path, rows=[row("a", "48213")])
    manifest = folder.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tasks.needle.Needle", "tasks.gone.Gone"))
    with pytest.raises(
        UsageError, match=r"is of a task that cannot be built here: no module kvarena\.tasks\.gone"
    ):
        rescore_cell(folder.path)
