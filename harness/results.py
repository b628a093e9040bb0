"""One folder per cell: a manifest that never changes and rows that are only ever appended.

A cell is one (task, model, policy, budget, seed, ...). Its folder is keyed by a hash of everything
that affects outputs, so two different cells can never share rows, and running the same command
again finds what is there already.
"""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from kvarena.harness.errors import UsageError
from kvarena.harness.files import file_name, replacing

SCHEMA_VERSION = 1
_PACKAGES = ("kvarena", "torch", "transformers", "tokenizers", "hydra-core", "numpy", "flash-attn")


class CellFolder:
    """``<results_dir>/runs/<task>/<model>/<policy>-<budget>-<hash>/`` of one cell.

    identity: JSON values that decide the cell's outputs; ``task``, ``model``, ``policy`` and
    ``budget`` among them name the folder.
    """

    def __init__(self, results_dir: Path, identity: Mapping[str, Any]) -> None:
        canonical = json.dumps({"schema": SCHEMA_VERSION, **identity}, sort_keys=True)
        self.identity = dict(identity)
        self.run_id = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        task, model, policy, budget = (
            file_name(str(identity[key]["name"])) for key in ("task", "model", "policy", "budget")
        )
        self.path = results_dir / "runs" / task / model / f"{policy}-{budget}-{self.run_id[:8]}"
        self.rows_path = self.path / "samples.jsonl"

    def open(self, config: Mapping[str, Any]) -> None:
        """Make the folder and its manifest unless they exist.

        config: the resolved configuration of this command, kept for the record.
        """
        manifest_path = self.path / "manifest.json"
        if manifest_path.exists():
            return
        manifest = {"run_id": self.run_id, "identity": self.identity, "config": config}
        text = json.dumps({**manifest, **_provenance()}, indent=2, default=str)
        with replacing(manifest_path) as path:
            path.write_text(text + "\n")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Two processes must not write the same cell. Raises UsageError if another one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as stream:  # a lock ends with its process
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is writing {self.path}; wait for it") from None
            yield

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far. A torn last line (a kill while writing) is cut off with a warning.

        Raises UsageError, with file and line, for damage anywhere else.
        """
        if not self.rows_path.exists():
            return []
        *lines, tail = self.rows_path.read_bytes().split(b"\n")
        if tail:
            warnings.warn(
                f"{self.rows_path}: cut off a torn last line of {len(tail)} bytes; its sample runs "
                "again",
                stacklevel=2,
            )
            os.truncate(self.rows_path, sum(len(line) + 1 for line in lines))
        return [_parse_row(line, self.rows_path, i) for i, line in enumerate(lines, start=1)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row so that it survives a crash right after."""
        line = json.dumps({**row, "run_id": self.run_id}, ensure_ascii=True).encode() + b"\n"
        with self.rows_path.open("ab", buffering=0) as stream:
            written = stream.write(line)
            if written != len(line):  # a full disk writes what fits and only then complains
                os.truncate(self.rows_path, stream.tell() - written)
                raise OSError(f"no space left for a row in {self.rows_path}")
            os.fsync(stream.fileno())


def read_rows(cell_paths: Iterable[Path]) -> pd.DataFrame:
    """Tidy frame of the rows of several cell folders, one line per sample."""
    rows: list[dict[str, Any]] = []
    for path in cell_paths:
        rows_path = path / "samples.jsonl"
        lines = rows_path.read_bytes().split(b"\n")[:-1] if rows_path.exists() else []
        rows += [_parse_row(line, rows_path, i) for i, line in enumerate(lines, start=1)]
    return pd.DataFrame(rows)


def _parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "sample_id" not in row:
        raise UsageError(
            f"{path} line {number} is damaged; move the folder away to run the cell again"
        )
    return row


def _provenance() -> dict[str, Any]:
    """Where and with what a cell was made."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "git": _git_state(),
        "python": platform.python_version(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """Commit of the checkout that this code runs from; empty outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
