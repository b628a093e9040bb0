"""Where and with what a cell was made: for its manifest, so that a figure can be traced back."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = (
    "kvarena",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "numpy",
    "flash-attn",
    "kernels",
)


def provenance() -> dict[str, Any]:
    """JSON values: time, command, commit, machine and package versions."""
    return {
        "started": now(),
        "argv": sys.argv,
        "git": git_state(),
        "python": platform.python_version(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "accelerator": _accelerator(),
        },
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout that this code runs from, as first asked; empty outside a checkout.

    dirty: whether anything differs from it but results, which change no code.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def commit_label() -> str:
    """Twelve digits of the commit, with a + when files differ from it; "" outside a checkout."""
    state = git_state()
    return state["commit"][:12] + "+" * state["dirty"] if state else ""


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
