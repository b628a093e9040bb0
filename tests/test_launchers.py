"""Sweeps in other processes: the same rows, tables and exit codes as in this one.

Jobs on a cluster are tried through submitit's own local executor, an sbatch that starts its array
here, and a Ray of the test's own.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from faulty import Kvarena, Outcome, comparable, no_model_loads, read_rows
from kvarena.harness.cells.run_cell import Outcome as CellOutcome
from kvarena.harness.command import launchers, run
from kvarena.harness.command.job_outcomes import Failure, JobOutcomes
from toy_folder import toy_overrides

SLOW = pytest.mark.slow  # every other process imports torch


def needs(launcher: str) -> pytest.MarkDecorator:
    try:
        metadata.version(launchers.PLUGINS[launcher])
    except PackageNotFoundError:
        missing = True
    else:
        missing = False
    return pytest.mark.skipif(missing, reason=f"needs: make setup EXTRAS={launcher}")


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))


def table(results: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(results / "tables" / f"{name}.csv", dtype={"budget": str})


# ---- what is refused ----


@pytest.mark.parametrize("name", launchers.PLUGINS)
def test_a_launcher_that_is_not_installed_says_how_to_get_it(
    name: str, kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(launchers, "version", missing)
    with no_model_loads():
        outcome = kvarena("-m", f"launcher={name}")
    assert outcome == Outcome(
        2, "", f"error: launcher={name} is not installed; get it with: make setup EXTRAS={name}\n"
    )


@needs("slurm")
def test_slurm_without_its_commands_says_where_to_run_or_what_else_to_take(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(kvarena.folder))
    with no_model_loads():
        outcome = kvarena("-m", "launcher=slurm")
    assert outcome == Outcome(
        2,
        "",
        "error: launcher=slurm found no sbatch: run it where Slurm's commands are installed (a "
        "login node), or take launcher=joblib for processes of this machine\n",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("launcher=joblib", "launcher=joblib is for sweeps, if only of one cell; add --multirun"),
        ("-m launcher=joblib,local", "launcher takes one value, for all jobs of the sweep"),
        ("-m launcher=slrm", "unknown launcher 'slrm'. Did you mean slurm? Available: joblib, "),
    ],
)
def test_a_launcher_that_hydra_would_pass_over_is_one_line(
    arguments: str, expected: str, kvarena: Kvarena
) -> None:
    with no_model_loads():
        outcome = kvarena(*shlex.split(arguments))
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert expected in outcome.err


def test_the_local_launcher_needs_no_sweep(kvarena: Kvarena) -> None:
    assert kvarena("launcher=local", "limit=1").code == 0


@pytest.mark.parametrize(
    "name", ["local", *(pytest.param(n, marks=needs(n)) for n in launchers.PLUGINS)]
)
def test_every_setting_of_a_launcher_is_one_that_its_plugin_knows(name: str) -> None:
    GlobalHydra.instance().clear()
    run.register_settings()
    with initialize_config_module("kvarena.conf", version_base="1.3"):
        settings = compose("config", overrides=[f"launcher={name}"], return_hydra_config=True)
    expected = {"local": "basic", "slurm": "submitit_slurm"}.get(name, name)
    assert settings.hydra.runtime.choices["hydra/launcher"] == expected


# ---- what jobs hand over ----


def done(name: str, num_failed: int = 0) -> CellOutcome:
    return CellOutcome(
        path=Path(name), sample_ids=frozenset({"a"}), num_new=1, num_failed=num_failed
    )


@pytest.mark.parametrize(
    ("jobs", "code"),
    [
        ([[], []], 0),
        ([[2], []], 2),
        ([[75], []], 75),
        ([[75], [2]], 2),
        ([[2], [1]], 1),
        ([[], ["failed sample"]], 1),
    ],
)
def test_the_exit_code_is_that_of_all_jobs_wherever_they_ran(
    jobs: list[list[int | str]], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, failures in enumerate(jobs):
        job = JobOutcomes(outcomes=[done(str(number), num_failed="failed sample" in failures)])
        for failure in failures:
            if isinstance(failure, int):
                job.fail(Failure(code=failure, text=f"Traceback\nerror {number}"))
        job.hand_over(tmp_path, number)
    capsys.readouterr()
    collected = JobOutcomes()
    collected.collect(tmp_path)
    assert collected.exit_code == code
    assert {outcome.path.name for outcome in collected.outcomes} == {"0", "1"}
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().err.splitlines()
    num_failed = sum(bool(f) and f != ["failed sample"] for f in jobs)
    assert len(lines) == (1 + num_failed if num_failed else 0)
    if lines:
        assert lines[0] == f"{num_failed} of 2 jobs failed:"
        assert lines[1].startswith("  error ")


# ---- joblib ----


@SLOW
@needs("joblib")
def test_the_shards_of_one_cell_run_side_by_side(kvarena: Kvarena) -> None:
    depths = "task.depths=[0,20,40,60,80,100]"
    assert kvarena(depths).code == 0
    whole = comparable(kvarena.rows)
    kvarena.results = kvarena.folder / "joblib"
    outcome = kvarena("-m", "launcher=joblib", "shard=1/2,2/2", depths, with_report=True)
    assert outcome.code == 0
    found = kvarena.results.glob("runs/*/*/*/samples-*of2.jsonl")
    assert comparable([row for path in found for row in read_rows(path)]) == whole
    assert table(kvarena.results, "needle-summary")["num_ok"].tolist() == [6]
    assert "needle-summary.csv" in outcome.out


@SLOW
@needs("joblib")
def test_of_two_jobs_that_are_one_cell_the_second_finds_it_done(kvarena: Kvarena) -> None:
    assert kvarena("-m", "launcher=joblib", "policy=full", "budget=64,96").code == 0
    assert len(comparable(kvarena.rows)) == 2


@SLOW
@needs("joblib")
@pytest.mark.parametrize("fate", ["Ctrl-C", "a killed worker"])
def test_what_befalls_a_sweep_in_processes_is_told(fate: str, kvarena: Kvarena) -> None:
    many = f"task.depths={list(range(0, 100, 2))}".replace(" ", "")
    arguments = [f"results_dir={kvarena.results}", "launcher=joblib", "budget=64,96", many]
    command = [
        sys.executable,
        "-m",
        "kvarena.harness.command.run",
        "-m",
        *kvarena.overrides,
        *arguments,
    ]
    log = kvarena.folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "task.max_new_tokens=200", "slots=1"],
            stdout=stream,
            stderr=stream,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_for(lambda: len(list(kvarena.results.glob("runs/*/*/*/samples.jsonl"))) == 2, process)
        if fate == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(worker_of(process.pid), signal.SIGKILL)
        assert process.wait(60) == (130 if fate == "Ctrl-C" else 1), log.read_text()
    finally:
        process.kill()
        process.wait()
    last = log.read_text().splitlines()
    if fate == "Ctrl-C":
        assert last[-1].startswith("stopped; 0 cells are complete, finished samples are kept.")
    else:
        assert any("SIGKILL" in line for line in last)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(parent: int) -> int:
    """The process number of one of joblib's workers."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if b"LokyProcess" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError(f"none of {children} is a worker")


# ---- Slurm and Ray ----


def check_half_a_sweep(outcome: Outcome, results: Path) -> None:
    """Of two policies at 32 tokens one is impossible, and the other one is in the table."""
    assert outcome.code == 2
    first, line = outcome.err.splitlines()[-2:]
    assert first == "1 of 2 jobs failed:"
    assert line.startswith("  error: a budget of 32 tokens leaves nothing to choose")
    assert table(results, "needle-summary")["policy"].tolist() == ["keydiff"]
    assert "needle-summary.csv" in outcome.out


@SLOW
@needs("slurm")
def test_submitits_own_executor_runs_what_can_run(kvarena: Kvarena) -> None:
    outcome = kvarena(
        *("-m", "hydra/launcher=submitit_local", "policy=keydiff,snapkv", "budget=32"),
        with_report=True,
    )
    check_half_a_sweep(outcome, kvarena.results)


SBATCH = """#!/bin/bash
for task in 0 1; do
  export SLURM_JOB_ID=70$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1
  export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  bash "$1" < /dev/null > /dev/null 2>&1 &
done
cp "$1" "$(dirname "$0")/script"
echo 'Submitted batch job 7'
"""
SRUN = '#!/bin/bash\nexec "${@: -5}"\n'  # python -u -m submitit.core._submit <folder>
SACCT = "#!/bin/bash\nprintf 'JobID|State|NodeList\\n7_0|RUNNING|x\\n7_1|RUNNING|x\\n'\n"


@SLOW
@needs("slurm")
def test_a_sweep_is_one_array_job_of_slurm(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (kvarena.folder / name).write_text(text)
        (kvarena.folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{kvarena.folder}:{os.environ['PATH']}")
    outcome = kvarena(
        *("-m", "launcher=slurm", "policy=keydiff,snapkv", "budget=32"),
        *("hydra.launcher.partition=big", "hydra.launcher.gpus_per_node=1"),
        "hydra.launcher.array_parallelism=1",
        with_report=True,
    )
    check_half_a_sweep(outcome, kvarena.results)
    script = (kvarena.folder / "script").read_text()
    for option in ("array=0-1%1", "partition=big", "gpus-per-node=1", "time=240"):
        assert f"#SBATCH --{option}\n" in script


@SLOW
@needs("ray")
def test_a_ray_of_our_own_runs_what_can_run(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        outcome = kvarena(
            *("-m", "launcher=ray", "policy=keydiff,snapkv", "budget=32"),
            *("hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"),
            with_report=True,
        )
    finally:
        ray.shutdown()
    check_half_a_sweep(outcome, kvarena.results)
