"""A tracker gets settings and means; one that raises, exits or hangs costs nothing."""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvarena.harness.errors import UsageError
from kvarena.harness.report import trackers
from kvarena.harness.report.trackers import check_tracker, track_cell
from kvarena.harness.store.cell_folder import CellFolder


@pytest.fixture
def cell_path(tmp_path: Path) -> Path:
    identity = {name: {"name": name, "size": 3} for name in ("task", "model", "policy", "budget")}
    folder = CellFolder(tmp_path, identity)
    folder.open({})
    for sample_id, status, score in (("a", "ok", 1.0), ("b", "ok", 0.0), ("c", "oom", None)):
        folder.append(
            {"sample_id": sample_id, "status": status, "score": score, "ttft_sec": 2.0}
            | {"decode_tokens_per_sec": None}
        )
    return folder.path


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_settings_and_means_arrive(
    name: str, cell_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    fake(
        monkeypatch,
        name,
        init=lambda **options: calls.append(("init", options)),
        log=lambda measures: calls.append(("log", measures)),
        finish=lambda: calls.append(("finish",)),
    )
    track_cell(name, cell_path)
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert calls[0][1]["name"] == cell_path.name
    assert calls[0][1]["config"]["policy.size"] == 3
    assert calls[1][1] == {"num_ok": 2, "num_samples": 3, "score": 0.5, "ttft_sec": 2}


def test_mlflow_gets_params_and_metrics(cell_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    calls: dict[str, Any] = {}
    fake(
        monkeypatch,
        "mlflow",
        set_experiment=lambda name: calls.update(experiment=name),
        start_run=lambda run_name: nullcontext(calls.update(run=run_name)),
        log_params=lambda params: calls.update(params=params),
        log_metrics=lambda metrics: calls.update(metrics=metrics),
    )
    track_cell("mlflow", cell_path)
    assert (calls["experiment"], calls["run"]) == ("kvarena", cell_path.name)
    assert calls["params"]["policy.name"] == "policy"
    assert calls["metrics"]["score"] == 0.5


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda **options: _raise(RuntimeError("no server")), "RuntimeError: no server"),
        (lambda **options: _raise(SystemExit(3)), "SystemExit: 3"),
        (lambda **options: time.sleep(30), "no answer for 0 s"),
    ],
)
def test_a_tracker_that_fails_is_only_told_about(
    init: Any,
    message: str,
    cell_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_SEC", 0.3)
    fake(monkeypatch, "wandb", init=init)
    track_cell("wandb", cell_path)
    assert f"tracker wandb failed, the run goes on: {message}" in capsys.readouterr().err


def test_none_does_nothing(tmp_path: Path) -> None:
    track_cell("none", tmp_path / "nowhere")


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown tracker 'wandbb'\. Did you mean wandb"):
        check_tracker("wandbb")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package mlflow"):
        check_tracker("mlflow")
    check_tracker("none")
