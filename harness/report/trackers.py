"""One hook for experiment trackers: a summary per finished cell, and never a failed run.

Rows, manifests and tables are the record; a tracker only gets a copy of the settings and the means.
It is called in a thread of its own: whatever it raises, prints or waits for, the run goes on.
"""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import one_of
from kvarena.harness.store.cell_files import flat, read_manifest

TRACKERS = ("none", "mlflow", "wandb", "trackio")
PROJECT = "kvarena"
_PATIENCE_SEC = 60.0
_TIMES_AND_SIZES = ("kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "decode_tokens_per_sec")


def check_tracker(tracker: str) -> None:
    """Raise UsageError for one that is unknown or not installed."""
    one_of("tracker", tracker, TRACKERS)
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UsageError(
            f"tracker={tracker} needs the package {tracker}: .venv/bin/pip install {tracker}, or "
            "leave tracker out"
        )


def track_cell(tracker: str, cell_path: Path) -> None:
    """Hand a finished cell's settings and means to the tracker; what goes wrong is only printed."""
    if tracker == "none":
        return
    problems: list[str] = []
    thread = threading.Thread(target=_guarded, args=(tracker, cell_path, problems), daemon=True)
    thread.start()
    thread.join(_PATIENCE_SEC)
    if thread.is_alive():
        problems.append(f"no answer for {_PATIENCE_SEC:.0f} s")
    for problem in problems:
        print(f"tracker {tracker} failed, the run goes on: {problem}", file=sys.stderr)


def _guarded(tracker: str, cell_path: Path, problems: list[str]) -> None:
    try:
        settings = flat(read_manifest(cell_path)["identity"])
        measures = cell_means(read_rows([cell_path]))
        _SENDERS[tracker](importlib.import_module(tracker), cell_path.name, settings, measures)
    except BaseException as error:  # some trackers call sys.exit
        problems.append(f"{type(error).__name__}: {error}")


def cell_means(rows: pd.DataFrame) -> dict[str, float]:
    """Counts of samples, and plain means over the good ones; unmeasured things are left out."""
    ok = rows[rows["status"] == "ok"]
    columns = [name for name in ("score", "kl_mean", *_TIMES_AND_SIZES) if name in ok]
    means = ok[columns].apply(pd.to_numeric).mean().dropna()
    return {"num_ok": float(len(ok)), "num_samples": float(len(rows)), **means.to_dict()}


# Any: the tracker's own module, imported only when it was asked for.
def _to_mlflow(
    mlflow: Any, name: str, settings: Mapping[str, Any], measures: Mapping[str, float]
) -> None:
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=name):
        mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})
        mlflow.log_metrics(dict(measures))


def _to_wandb(
    wandb: Any, name: str, settings: Mapping[str, Any], measures: Mapping[str, float]
) -> None:
    """trackio has the same interface."""
    wandb.init(project=PROJECT, name=name, config=dict(settings))
    wandb.log(dict(measures))
    wandb.finish()


_SENDERS = {"mlflow": _to_mlflow, "wandb": _to_wandb, "trackio": _to_wandb}
