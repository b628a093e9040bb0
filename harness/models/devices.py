"""Devices and data types by the names that settings give them."""

import torch

from kvarena.harness.errors import UsageError
from kvarena.harness.registry import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return DTYPES[one_of("dtype", dtype, [*DTYPES, "auto"])]


def resolve_kv_dtype(kv_dtype: str) -> torch.dtype | None:
    """None for the model's own."""
    kinds = {"model": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return kinds[one_of("kv_dtype", kv_dtype, list(kinds))]


def check_device(device: str) -> None:
    """Raise UsageError for a device that this machine lacks."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(
            f"device={device!r} is not a torch device; use cpu, cuda or cuda:N"
        ) from None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} has not been tried with kvarena; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device={device} asked for, but torch sees no CUDA device; use device=cpu"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={device} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
