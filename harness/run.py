"""The command ``kvarena``: the only file that knows Hydra.

Exit codes: 0 all is well; 1 something failed (samples, or the program); 2 bad input, told in one
line before any model is loaded; 75 another process writes the cell; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kvarena.harness.budget import parse_budget
from kvarena.harness.config import RunConfig
from kvarena.harness.errors import LockedError, UsageError
from kvarena.harness.launchers import check_launcher
from kvarena.harness.registry import choices, one_of
from kvarena.harness.session import Failure, Session
from kvarena.harness.shards import parse_shard

if TYPE_CHECKING:
    from kvarena.harness.cell import Cell

GROUPS = ("task", "policy", "codec", "model", "experiment", "launcher")


def main() -> None:
    """Console entry point."""
    # Hydra's own reports span many lines and all exit with 1; with this it hands errors on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    # Schedulers end a job with SIGTERM: an exception lets the cell note where it stopped.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    session = Session()
    exchange = None  # where jobs in other processes leave what became of them
    try:
        arguments = prepare_arguments(sys.argv[1:])
        if is_sweep(arguments):
            exchange = _sweep_dir(arguments)
            arguments.append(f"hydra.sweep.dir={_quoted(exchange)}")
        sys.argv[1:] = arguments
        _hydra_main(session, exchange)
    except KeyboardInterrupt:
        session.code_when_stopped = 130
    except SystemExit as stop:
        if stop.code not in (None, 0):
            session.code_when_stopped = int(stop.code) if isinstance(stop.code, int) else 1
    except Exception as error:
        session.fail(_failure(error, session.results_dir))
    if exchange:
        session.collect(exchange)
    if session.code_when_stopped in (130, 143):
        print(
            f"stopped; {len(session.outcomes)} cells are complete, finished samples are kept. "
            "The same command goes on from here.",
            file=sys.stderr,
        )
    elif not session.code_when_stopped:
        try:
            session.show()
        except Exception as error:
            session.fail(_failure(error, session.results_dir))
    if session.exit_code:
        sys.exit(session.exit_code)


def _hydra_main(session: Session, exchange: Path | None) -> None:
    """Run one cell, or a sweep of them, noting what became of each."""
    here, folder = _process(), Path.cwd()

    def job(settings: DictConfig) -> None:
        is_here = _process() == here
        noted = session if is_here else Session()
        os.chdir(folder)  # a cluster's workers start anywhere
        try:
            _run(settings, noted)
        except Exception as error:  # not handed on: of several, Hydra tells the first one alone
            noted.fail(_failure(error, noted.results_dir))
        if not is_here:
            assert exchange is not None, "only sweeps have jobs elsewhere"
            noted.hand_over(exchange, HydraConfig.get().job.num)

    hydra.main(version_base="1.3", config_path="pkg://kvarena.conf", config_name="config")(job)()


def _process() -> tuple[str, int]:
    """This process among those of all machines."""
    return os.uname().nodename, os.getpid()


def _run(settings: DictConfig, session: Session) -> None:
    """One cell, or its plan."""
    # Imported here: torch takes seconds, and --help or a typo should not wait for it.
    from kvarena.harness.plan import plan_cell
    from kvarena.harness.run_cell import run_cell
    from kvarena.harness.trackers import check_tracker, track_cell

    config: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # type: ignore[assignment]
    one_of("mode", config["mode"], ["run", "plan"])
    one_of("drift", config["drift"], ["refuse", "fork"])
    check_tracker(config["tracker"])
    session.allow_partial = config["allow_partial"]
    session.results_dir = Path(config["results_dir"])
    cell = _cell(config)
    if config["mode"] == "plan":
        plan = plan_cell(cell, session.results_dir, fork=config["drift"] == "fork")
        session.plans.append(plan)
        return
    # In a sweep two jobs may be one cell (full has no budget): the second waits and finds it done.
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    outcome = run_cell(
        cell,
        session.results_dir,
        fork=config["drift"] == "fork",
        repair=config["repair"],
        wait=in_sweep,
    )
    session.outcomes.append(outcome)
    if outcome.num_new:
        track_cell(config["tracker"], outcome.path)


def _cell(config: dict[str, Any]) -> "Cell":
    from kvarena.harness.cell import Cell
    from kvarena.harness.engine.sampling import Sampling
    from kvarena.harness.models import ModelSpec

    for group in ("task", "policy", "codec", "model"):
        if not isinstance(config[group], dict):
            raise UsageError(f"{group} must name a choice: {', '.join(choices(group))}")
    try:
        sampling = Sampling(**config["sampling"])
    except ValueError as error:
        raise UsageError(f"sampling: {error}") from error
    return Cell(
        task_settings=config["task"],
        policy_settings=config["policy"],
        codec_settings=config["codec"],
        model=ModelSpec(**config["model"]),
        budget=config["budget"],
        sampling=sampling,
        question=config["question"],
        seed=config["seed"],
        limit=config["limit"],
        shard=parse_shard(config["shard"]),
        slots=config["slots"],
        chunk_tokens=config["chunk"],
        attention=config["attention"],
        device=config["device"],
        dtype=config["dtype"],
        kv_dtype=config["kv_dtype"],
        config=config,
    )


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Check names and budgets of all overrides, so that a sweep fails before its first cell.

    ``model=<hub id or folder>`` becomes the overrides that say so. Raises UsageError.
    """
    prepared = []
    for argument in arguments:
        if argument.startswith("~"):
            raise UsageError(f"{argument}: settings can be changed but not removed")
        if argument.startswith("-") or "=" not in argument:
            prepared.append(argument)
            continue
        override = OverridesParser.create().parse_overrides([argument])[0]
        key = override.key_or_group
        _check_key(override)
        if key == "model" and _is_location(override.value()):
            location = str(override.value())
            if Path(location).is_dir():  # one folder is one model, wherever the command runs
                location = str(Path(location).resolve())
            name = Path(location).name
            prepared += ["model=custom", f"model.name='{name}'", f"model.source='{location}'"]
            continue
        if key in GROUPS:
            _check_choices(override)
            if key == "launcher":
                if override.is_sweep_override():
                    raise UsageError("launcher takes one value, for all jobs of the sweep")
                check_launcher(override.value(), in_sweep=is_sweep(arguments))
        elif key == "budget":
            for value in _values(override):
                parse_budget(value)
        elif key == "shard":
            for value in _values(override):
                parse_shard(None if value in ("None", "null") else value)
        prepared.append(argument)
    # argparse takes overrides in one block only: `kvarena budget=64 -m policy=a,b` would fail.
    return sorted(prepared, key=lambda argument: "=" in argument and not argument.startswith("-"))


def _check_key(override: Override) -> None:
    key = override.key_or_group
    known = [setting.name for setting in fields(RunConfig)] + ["experiment", "launcher", "hydra"]
    first = key.split("/")[0].split(".")[0]
    if first not in known:
        one_of("setting", first, known)


def _check_choices(override: Override) -> None:
    group = override.key_or_group
    known = choices(group)
    value = override.value()
    if isinstance(value, Glob):
        if not any(fnmatch(name, pattern) for name in known for pattern in value.include):
            raise UsageError(
                f"{group}: no match for {value.include}. Available: {', '.join(known)}"
            )
        return
    for name in _values(override):
        if name not in (None, "null", ""):
            one_of(group, name, known)


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra runs all combinations of comma-separated values."""
    return any(argument in ("-m", "--multirun") for argument in arguments)


def _sweep_dir(arguments: Sequence[str]) -> Path:
    """A folder of this command's own; absolute, since jobs may start in other folders."""
    given = [argument for argument in arguments if argument.startswith("results_dir=")]
    last = given[-1] if given else f"results_dir={RunConfig.results_dir}"
    (override,) = OverridesParser.create().parse_overrides([last])
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    return Path(_values(override)[0]).absolute() / "sweeps" / name


def _quoted(value: object) -> str:
    """As a value that Hydra reads as this text."""
    return "'" + str(value).replace("'", r"\'") + "'"


def _values(override: Override) -> list[str]:
    """The value, or the values of a sweep, as text."""
    if override.is_sweep_override():
        return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
    return [str(override.value())]


def _is_location(value: Any) -> bool:  # Any: whatever Hydra's parser read
    if not isinstance(value, str) or value in choices("model"):
        return False
    return "/" in value or Path(value).is_dir()


def _failure(error: Exception, results_dir: Path) -> Failure:
    """One line for bad input and for a full disk, a traceback for anything else."""
    known = UsageError | HydraException | OmegaConfBaseException | YAMLError
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not is_full and not isinstance(error, known):
        return Failure(code=1, text="".join(traceback.format_exception(error)).rstrip())
    messages = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        messages.append(str(error.__cause__))
    if is_full:
        folder = results_dir if results_dir.is_dir() else Path.cwd()
        messages.append(f"({shutil.disk_usage(folder).free} bytes free in {folder})")
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    code = 1 if is_full else 75 if isinstance(error, LockedError) else 2
    return Failure(code=code, text=f"error: {' '.join(dict.fromkeys(lines))}")


if __name__ == "__main__":
    main()
