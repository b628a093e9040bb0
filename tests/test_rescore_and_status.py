"""Scoring again needs no model and keeps what was; status tells done, failed, stopped, missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.errors import UsageError
from kvarena.harness.registry import load_choice
from kvarena.harness.rescore import rescore_cell
from kvarena.harness.results import CellFolder
from kvarena.harness.rows import read_rows
from kvarena.harness.status import cell_statuses, print_statuses
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
