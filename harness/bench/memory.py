"""Peak memory of a piece of work beyond what was held before it."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from kvarena.harness.engine.free_memory import give_back_free_memory

_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where there is no Linux to tell."""
    return _status_bytes("VmRSS")


def peak_bytes(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """``peak_extra_bytes`` of the work; nothing where it cannot be measured.

    On CUDA what torch allocated, on a Linux CPU resident memory of the process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return {"peak_extra_bytes": torch.cuda.max_memory_allocated(device) - before}
    if not os.access(_CLEAR, os.W_OK):
        work()
        return {}
    give_back_free_memory()  # what the process still holds would hide what is taken
    _CLEAR.write_text("5")  # the peak starts from here
    before = resident_bytes()
    work()
    return {"peak_extra_bytes": max(0, _status_bytes("VmHWM") - before)}


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
