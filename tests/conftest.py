"""Settings for all tests: offline, and one thread, which is fastest for tiny models."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(os.cpu_count() or 1 if "slow" in request.keywords else 1)
