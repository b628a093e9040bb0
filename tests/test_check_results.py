"""A results folder that somebody sends: sound ones pass, each fault is a line, merging is safe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.harness.cells.check_results import faults, main, merge
from kvarena.harness.errors import UsageError
from kvarena.harness.report import after_run
from toy_folder import toy_overrides

Lines = list[dict]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two cells that a command really ran: answers, and forced ones."""
    folder = tmp_path_factory.mktemp("ran")
    overrides = [*toy_overrides(folder), f"results_dir={folder / 'results'}", "policy=keydiff"]
    forced = [f"+task.options.{one.removeprefix('task.')}" for one in overrides if "task." in one]
    forced += [one for one in overrides if "task." not in one]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.chdir(folder)
        patch.setattr(after_run, "report", lambda *_, **__: [])
        for words in (overrides, ["task=fidelity", "task.of=needle", *forced]):
            assert _run(words, patch) == 0
    return folder / "results"


def _run(words: list[str], patch: pytest.MonkeyPatch) -> int:
    from kvarena.harness.command.run import main

    patch.setattr("sys.argv", ["kvarena", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def sent(ran: Path, tmp_path: Path) -> Path:
    """A copy of them, as somebody sends it."""
    return Path(shutil.copytree(ran, tmp_path / "sent"))


def answers(results_dir: Path) -> Path:
    """The folder of the cell with answers."""
    (path,) = results_dir.glob("runs/needle*/*/keydiff-64-*")
    return path


def edited(cell: Path, change: Callable[[Lines], object]) -> None:
    """Rewrite the cell's lines as ``change`` leaves them."""
    file = cell / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_a_command_wrote_is_sound(sent: Path) -> None:
    assert len(list(sent.glob("runs/*/*/*/samples.jsonl"))) == 2
    assert faults(sent) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[0].update(scoer=1), "columns that are not declared: scoer"),
        (lambda rows: rows[0].pop("kv_bytes_kept"), "missing or empty: kv_bytes_kept (in 1 rows)"),
        (lambda rows: rows[0].update(score=7), "samples.jsonl line 1 has score 7"),
        (lambda rows: rows[1].update(budget="96"), "rows say budget 96 and manifest.json says 64"),
        (lambda rows: rows[1].update(run_id="abc"), "rows say run_id abc"),
        (lambda rows: rows[0].update(policy="snapkv"), "rows say policy snapkv"),
        (lambda rows: rows.pop(), "1 of 2 planned samples have no good row"),
        (lambda rows: rows[0].update(status="oom"), "1 of 2 planned samples have no good row"),
        (lambda rows: rows.append(rows[0]), "samples with two good rows"),
        (lambda rows: rows[0].update(sample_id="mine"), "rows of samples that no command asked"),
        (lambda rows: rows[0].update(score=1.0), "samples score otherwise from what is stored"),
    ],
)
def test_a_changed_row_is_a_line_with_what_to_do(
    sent: Path, change: Callable[[Lines], object], told: str
) -> None:
    edited(answers(sent), change)
    (line, *_) = [fault for fault in faults(sent) if told in fault]
    assert line.startswith(f"{answers(sent)}: ")
    assert ";" in line
    assert "\n" not in line


def test_a_changed_manifest_is_another_cell(sent: Path) -> None:
    path = answers(sent) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["chunk"] = 5
    path.write_text(json.dumps(manifest))
    first, second = faults(sent)[:2]
    assert "the settings in manifest.json are those of keydiff-64-" in first
    assert "rows say chunk 128 and manifest.json says 5" in second


def test_forced_answers_sum_up_their_tokens(sent: Path) -> None:
    (cell,) = sent.glob("runs/fidelity*/*/*")
    edited(cell, lambda rows: rows[0].update(kl_mean=0.25))
    (line,) = faults(sent)
    assert "1 of 2 samples score otherwise" in line
    assert "kl_mean 0.25 stored" in line


def test_a_link_is_not_followed(sent: Path) -> None:
    (answers(sent) / "status.json").unlink()
    (answers(sent) / "status.json").symlink_to("/etc/hostname")
    assert faults(sent) == [f"{answers(sent)}: status.json is a link; send the file itself"]


def test_a_sound_folder_is_merged_once_and_nothing_is_overwritten(
    sent: Path, tmp_path: Path
) -> None:
    into = tmp_path / "mine"
    added = merge(sent, into)
    assert len(added) == 2
    assert faults(into) == []
    assert merge(sent, into) == []  # the same cells again
    assert not list(into.rglob(".merging*"))
    before = (answers(into) / "samples.jsonl").read_bytes()
    edited(answers(sent), lambda rows: rows[0].update(ttft_sec=99.0))
    shutil.rmtree(next(into.glob("runs/fidelity*")))
    with pytest.raises(UsageError, match="rows are never overwritten; nothing was added"):
        merge(sent, into)
    assert (answers(into) / "samples.jsonl").read_bytes() == before
    assert not list(into.glob("runs/fidelity*"))


def test_the_command_ends_with_2_on_faults_and_merges_only_sound_ones(
    sent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["check_results", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    into = tmp_path / "mine"
    edited(answers(sent), lambda rows: rows.pop())
    assert ended(sent, "--into", into) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: 1 fault in {sent}, see above; nothing was added"
    assert not into.exists()
    shutil.rmtree(answers(sent))
    assert ended(sent, "--into", into) == 0
    assert "1 cell added" in capsys.readouterr().out
    assert ended(tmp_path / "nothing") == 2
