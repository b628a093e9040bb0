"""The command ``kvarena``: the only file that knows Hydra.

Exit codes: 0 all is well; 1 something failed (samples, or the program); 2 bad input, told in one
line before any model is loaded; 75 another process writes the cell; 130 Ctrl-C; 143 SIGTERM.
"""

import logging
import os
import re
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from kvarena.harness.command.job_outcomes import Failure, JobOutcomes
from kvarena.harness.command.overrides import is_sweep, prepare_commands, quoted, sweep_dir
from kvarena.harness.entry import leave_quietly, one_line_errors, place_error
from kvarena.harness.errors import LockedError, UsageError
from kvarena.harness.registry import one_of, options, unknown
from kvarena.harness.settings import RunSettings

_MERGING = re.compile(r"^Error merging override (\S+)$")
_KEY_TYPES = re.compile(r"(full_key: |object_type=|reference_type=)")


def main() -> None:
    """Console entry point."""
    # Hydra's own reports span many lines and all exit with 1; with this it hands errors on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # It logs --info, and logging prints a traceback for each line that nobody reads.
    logging.raiseExceptions = False
    register_settings()
    # Schedulers end a job with SIGTERM: an exception lets the cell note where it stopped.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with one_line_errors():
        if "--version" in sys.argv[1:]:
            print(f"kvarena {version('kvarena')} (Hydra {hydra.__version__})")
        else:
            _command()


def register_settings() -> None:
    """Hydra's root is a RunSettings, which it fills in before the object is frozen."""
    node = OmegaConf.structured(RunSettings)
    OmegaConf.set_readonly(node, False)
    OmegaConf.set_readonly(node.sampling, None)
    ConfigStore.instance().store(name="run_settings", node=node)


def _command() -> None:
    """All cells that were asked for, then what they came to."""
    jobs = JobOutcomes()
    exchanges: list[Path] = []  # where jobs in other processes leave what became of them
    try:
        for arguments in prepare_commands(sys.argv[1:]):
            exchange = None
            if is_sweep(arguments):
                exchange = sweep_dir(arguments)
                exchanges.append(exchange)
                arguments.append(f"hydra.sweep.dir={quoted(exchange)}")
                jobs.results_dir = exchange.parents[1]
            sys.argv[1:] = arguments
            _hydra_main(jobs, exchange)
    except KeyboardInterrupt:
        jobs.code_when_stopped = 130
    except SystemExit as stop:
        if stop.code not in (None, 0):
            jobs.code_when_stopped = int(stop.code) if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        raise
    except Exception as error:
        jobs.fail(_failure(error, jobs.results_dir))
    for exchange in exchanges:
        jobs.collect(exchange)
    if jobs.code_when_stopped in (130, 143):
        print(
            f"stopped; {len(jobs.outcomes)} cells are complete, finished samples are kept. "
            "The same command goes on from here.",
            file=sys.stderr,
        )
    elif not jobs.code_when_stopped:
        try:
            jobs.show()
        except BrokenPipeError:
            raise
        except Exception as error:
            jobs.fail(_failure(error, jobs.results_dir))
    if jobs.exit_code:
        sys.exit(jobs.exit_code)


def _hydra_main(jobs: JobOutcomes, exchange: Path | None) -> None:
    """Run one cell, or a sweep of them, noting what became of each."""
    here, folder = _process(), Path.cwd()

    def job(composed: DictConfig) -> None:
        is_here = _process() == here
        noted = jobs if is_here else JobOutcomes()
        os.chdir(folder)  # a cluster's workers start anywhere
        try:
            _run(composed, noted)
        except BrokenPipeError:  # nobody reads on; as an exit, no further job begins
            leave_quietly()
        except Exception as error:  # not handed on: of several, Hydra tells the first one alone
            noted.fail(_failure(error, noted.results_dir))
        if not is_here:
            assert exchange is not None, "only sweeps have jobs elsewhere"
            noted.hand_over(exchange, HydraConfig.get().job.num)

    hydra.main(version_base="1.3", config_path="pkg://kvarena.conf", config_name="config")(job)()


def _process() -> tuple[str, int]:
    """This process among those of all machines."""
    return os.uname().nodename, os.getpid()


def _run(composed: DictConfig, jobs: JobOutcomes) -> None:
    """One cell, or its plan."""
    # Imported here: torch takes seconds, and --help or a typo should not wait for it.
    from kvarena.harness.cells.cell import Cell
    from kvarena.harness.cells.plan import plan_cell
    from kvarena.harness.cells.run_cell import run_cell
    from kvarena.harness.report.trackers import check_tracker, track_cell

    settings = OmegaConf.to_object(composed)
    assert isinstance(settings, RunSettings), "main says so to Hydra"
    one_of("mode", settings.mode, ["run", "plan"])
    check_tracker(settings.tracker)
    jobs.allow_partial = settings.allow_partial
    jobs.results_dir = Path(settings.results_dir)
    cell = Cell(settings=settings)
    if settings.mode == "plan":
        jobs.plans.append(plan_cell(cell, jobs.results_dir))
        return
    # In a sweep two jobs may be one cell (full has no budget): the second waits and finds it done.
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    outcome = run_cell(cell, jobs.results_dir, repair=settings.repair, wait=in_sweep)
    jobs.outcomes.append(outcome)
    if outcome.num_new:
        track_cell(settings.tracker, outcome.path)


def _failure(error: Exception, results_dir: Path) -> Failure:
    """One line for bad input and for a place that cannot be used, a traceback for anything else."""
    place = place_error(error, results_dir)
    if place is not None:
        return Failure(code=1, text=f"error: {place}")
    if not isinstance(error, UsageError | HydraException | OmegaConfBaseException | YAMLError):
        return Failure(code=1, text="".join(traceback.format_exception(error)).rstrip())
    messages = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        messages.append(str(error.__cause__))
    refused = error.__cause__ or error
    if isinstance(refused, ConfigKeyError | ConfigAttributeError):
        messages = [_unknown_option(refused)]
    stripped = [line.strip() for message in messages for line in message.splitlines()]
    # OmegaConf also says of which of its types the key is.
    lines = [line for line in stripped if line and not _KEY_TYPES.match(line)]
    lines = [_MERGING.sub(r"\1:", line) for line in lines]
    code = 75 if isinstance(error, LockedError) else 2
    return Failure(code=code, text=f"error: {' '.join(dict.fromkeys(lines))}")


def _unknown_option(error: ConfigKeyError | ConfigAttributeError) -> str:
    """One line for an option that the chosen task, policy, codec or the like does not have."""
    group, _, name = str(error.full_key).rpartition(".")
    settings = error.parent_node if isinstance(error.parent_node, DictConfig) else {}
    line = unknown(f"{group} option", name, [key for key in settings if key != "_target_"])
    owners = options().get(str(error.full_key))
    return f"{line} ({name} is an option of {', '.join(owners)})" if owners else line


if __name__ == "__main__":
    main()
