"""Processes that are killed, stopped or started twice: no row is lost, doubled or different.

T1   kill -9 at random moments     T6   two processes, one cell
T2   kill -9 inside a row          T18  Ctrl-C once and twice, SIGTERM, in a run and in a sweep
"""

import json
import random
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from faulty import (
    Running,
    TornWrite,
    comparable,
    read_rows,
    slow_end,
    slow_passes,
    started,
)
from kvarena.harness.analysis.row_frame import read_rows as read_tidy
from toy_folder import toy_overrides

SLOW = pytest.mark.slow
INTERRUPT, TERMINATE = (signal.SIGINT, 130), (signal.SIGTERM, 143)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return toy_overrides(tmp_path_factory.mktemp("toy"))


def rows_path(results: Path) -> Path | None:
    return next(iter(results.glob("runs/*/*/*/samples.jsonl")), None)


def num_rows(results: Path) -> int:
    path = rows_path(results)
    return path.read_bytes().count(b"\n") if path else 0


def state(results: Path) -> str:
    (path,) = results.glob("runs/*/*/*/status.json")
    return json.loads(path.read_text())["state"]


def finish(arguments: list[str], results: Path, log: Path) -> str:
    """Run the command to its end; returns what it says."""
    with started([*arguments, f"results_dir={results}"], log) as command:
        assert command.wait(120) == 0, command.text
        return command.text


# ---- T1 ----


def check_kills(arguments: list[str], num_samples: int, num_kills: int, folder: Path) -> None:
    """Kill the command ``num_kills`` times, then let it end: equal to one that nobody killed."""
    finish(arguments, folder / "calm", folder / "calm.txt")
    rng, results, log = random.Random(0), folder / "killed", folder / "killed.txt"
    for number in range(num_kills):
        before = num_rows(results)
        # Every fourth kill comes while the process starts.
        wanted = before + rng.randint(1, num_samples // (num_kills + 1)) * (number % 4 != 2)
        with started([*arguments, f"results_dir={results}"], log) as command:
            command.wait_for(lambda wanted=wanted: num_rows(results) >= wanted)
            time.sleep(rng.random() * (0.01 if wanted > before else 1.0))
            command.send(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL, command.text
    assert 0 < num_rows(results) < num_samples
    finish(arguments, results, log)
    calm, killed = (rows_path(place) for place in (folder / "calm", results))
    assert calm is not None
    assert killed is not None
    assert killed.parent.name == calm.parent.name
    # No line twice: whatever was finished before a kill never ran again.
    assert len(read_rows(killed)) == num_samples
    # A context whose slot was killed is read again for the questions that are left.
    again = "prefill_tokens_computed"
    assert comparable(read_rows(killed), again) == comparable(read_rows(calm), again)
    assert state(results) == "done"


SHARED = [
    *("question=after", "budget=128", "task.questions_per_context=4", "task.num_needles=4"),
    *("task.lengths=[600]", "task.num_seeds=3", "task.max_new_tokens=2", "slots=2"),
]


@pytest.mark.parametrize(
    "many",
    [
        ["task.lengths=[320]", "task.num_seeds=12", "task.max_new_tokens=2", "slots=2"],
        SHARED,
        [*SHARED, "turns=dialogue"],
    ],
    ids=["alone", "shared", "dialogue"],
)
def test_killed_twice_a_run_ends_as_if_it_had_not_been(
    overrides: list[str], many: list[str], tmp_path: Path
) -> None:
    check_kills([*overrides, *many], num_samples=24, num_kills=2, folder=tmp_path)


@SLOW
def test_killed_twelve_times_a_run_of_220_samples_ends_as_if_it_had_not_been(
    overrides: list[str], tmp_path: Path
) -> None:
    many = ["task.lengths=[320]", "task.num_seeds=110", "task.max_new_tokens=2", "slots=2"]
    check_kills([*overrides, *many], num_samples=220, num_kills=12, folder=tmp_path)


# ---- T2 ----


FOUR = "task.depths=[0,30,60,100]"


@pytest.fixture(scope="module")
def calm_rows(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What a run that nothing happens to writes."""
    folder = tmp_path_factory.mktemp("calm")
    finish([*overrides, FOUR], folder / "results", folder / "log.txt")
    path = rows_path(folder / "results")
    assert path is not None
    return comparable(read_rows(path))


@pytest.mark.parametrize(
    "num_bytes", [200, pytest.param(1, marks=SLOW), pytest.param(-1, marks=SLOW)]
)
def test_killed_inside_a_row_that_sample_alone_runs_again(
    num_bytes: int, overrides: list[str], calm_rows: dict[str, dict], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = [*overrides, FOUR, f"results_dir={results}"]
    with started(arguments, tmp_path / "log.txt", TornWrite(3, num_bytes)) as command:
        assert command.wait() == -signal.SIGKILL, command.text
    path = rows_path(results)
    assert path is not None
    whole = path.read_bytes()
    before = whole[: whole.rindex(b"\n") + 1]
    assert before.count(b"\n") == 2
    text = finish([*overrides, FOUR], results, tmp_path / "again.txt")
    assert text.count("cut off a torn last line of") == 1
    assert f"torn last line of {len(whole) - len(before)} bytes; its sample runs again" in text
    assert path.read_bytes().startswith(before)
    assert comparable(read_rows(path)) == calm_rows


# ---- T6 ----


def slow_run(arguments: list[str], results: Path, log: Path) -> AbstractContextManager[Running]:
    depths = f"task.depths={list(range(0, 100, 4))}".replace(" ", "")
    return started([*arguments, depths, "slots=1", f"results_dir={results}"], log, slow_passes)


def test_a_second_process_stops_at_once_with_75_and_touches_nothing(
    overrides: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with slow_run(overrides, results, tmp_path / "first.txt") as first:
        assert first.wait_for(lambda: num_rows(results) >= 1)
        first.send(signal.SIGSTOP)  # it holds the lock and writes nothing meanwhile
        (folder,) = results.glob("runs/*/*/*")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with slow_run(overrides, results, tmp_path / "second.txt") as second:
            assert second.wait(20) == 75
        assert second.text == (f"error: another process is writing {folder}; wait for it\n")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@SLOW
def test_a_kill_frees_the_cell_for_the_next_process(overrides: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results"
    with slow_run(overrides, results, tmp_path / "first.txt") as first:
        assert first.wait_for(lambda: num_rows(results) >= 1)
        first.send(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    before = num_rows(results)
    with slow_run(overrides, results, tmp_path / "second.txt") as second:
        assert second.wait_for(lambda: num_rows(results) > before)


@SLOW
def test_a_sweep_waits_for_the_process_that_writes_its_cell(
    overrides: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = [*overrides, "slots=1", f"results_dir={results}"]
    with started(arguments, tmp_path / "first.txt", slow_passes) as first:
        assert first.wait_for(lambda: num_rows(results) >= 1)
        first.send(signal.SIGSTOP)
        with started(["-m", *arguments], tmp_path / "second.txt") as second:
            assert second.wait_for(lambda: "waiting for another process to finish" in second.text)
            first.send(signal.SIGCONT)
            assert (first.wait(), second.wait()) == (0, 0)
        assert "all 2 samples are there already" in second.text
    assert num_rows(results) == 2


# ---- T18 ----


def stop(command: Running, number: int, results: Path) -> int:
    """Send the signal once a row is there."""
    assert command.wait_for(lambda: num_rows(results) >= 1)
    command.send(number)
    return command.wait(10)


@pytest.mark.parametrize(("number", "code"), [INTERRUPT, TERMINATE])
def test_a_stopped_run_says_so_keeps_its_rows_and_goes_on(
    number: int, code: int, overrides: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with slow_run(overrides, results, tmp_path / "log.txt") as command:
        assert stop(command, number, results) == code
        last = command.text.splitlines()[-1]
    assert last == (
        "stopped; 0 cells are complete, finished samples are kept. "
        "The same command goes on from here."
    )
    assert "Traceback" not in command.text
    assert state(results) == "cancelled"
    path = rows_path(results)
    assert path is not None
    kept = read_tidy([path.parent])["sample_id"].tolist()
    with slow_run(overrides, results, tmp_path / "log.txt") as command:
        assert command.wait_for(lambda: num_rows(results) > len(kept))
    ids = read_tidy([path.parent])["sample_id"].tolist()
    assert ids[: len(kept)] == kept
    assert len(set(ids)) == len(ids) > len(kept)


@pytest.mark.parametrize(("number", "code"), [INTERRUPT, pytest.param(*TERMINATE, marks=SLOW)])
def test_a_stopped_sweep_starts_no_further_cell(
    number: int, code: int, overrides: list[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    arguments = ["-m", *overrides, "slots=1", f"results_dir={results}", "policy=keydiff,h2o,tova"]

    def second_has_begun() -> bool:
        return len(list(results.glob("runs/*/*/*/samples.jsonl"))) == 2

    with started(arguments, tmp_path / "log.txt", slow_passes) as command:
        assert command.wait_for(second_has_begun)
        command.send(number)
        assert command.wait(10) == code
    assert "stopped; 1 cells are complete, finished samples are kept" in command.text
    assert "Traceback" not in command.text
    states = [
        json.loads(path.read_text())["state"]
        for name in ("keydiff", "h2o", "tova")
        for path in results.glob(f"runs/*/*/{name}-*/status.json")
    ]
    assert states == ["done", "cancelled"]


def test_a_second_ctrl_c_does_not_wait_for_the_first(overrides: list[str], tmp_path: Path) -> None:
    # One slot, so that a second sample is still to be answered when the first row is there.
    arguments = [*overrides, "slots=1", f"results_dir={tmp_path / 'results'}"]
    with started(arguments, tmp_path / "log.txt", slow_end) as command:
        assert command.wait_for(lambda: num_rows(tmp_path / "results") >= 1)
        command.send(signal.SIGINT)
        assert command.wait_for(lambda: "cancelling" in command.text)
        command.send(signal.SIGINT)
        assert command.wait(10) == 130
    assert "The same command goes on from here." in command.text
