"""Settings for all tests: offline, and one thread, which is fastest for tiny models."""

import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by transformers


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(os.cpu_count() or 1 if "slow" in request.keywords else 1)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in order."""
    saved: list[Figure] = []
    real = Figure.savefig

    def spy(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        real(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


@pytest.fixture
def toy_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random files where those that policies read would lie: now every policy can score."""
    from toys import save_policy_files  # imports transformers, which reads HF_HUB_OFFLINE then

    save_policy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
