"""One folder per cell: a manifest that never changes and rows that are only ever appended.

A cell is one (task, model, policy, budget, seed, ...). Its folder is keyed by a hash of everything
that affects outputs, so two different cells can never share rows, and running the same command
again finds what is there already. A sample that is answered or scored again gets a further row; the
last one that is "ok" counts. Shards of a cell write at the same time, each to files of its own that
count together with ``samples.jsonl``, the file of commands without a shard.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvarena.harness.errors import LockedError, UsageError
from kvarena.harness.files import file_name, replacing
from kvarena.harness.provenance import now, provenance
from kvarena.harness.shards import Shard

SCHEMA_VERSION = 2  # of rows and of what the engine keeps; another one makes other folders
_STATUS_EVERY_SEC = 5.0
# Last the file of commands without a shard: only those score again, and what they write counts.
_ROW_FILES = ("samples-*of*.jsonl", "samples.jsonl")


class CellFolder:
    """``<results_dir>/runs/<task>/<model>/<policy>-<budget>-<hash>/`` of one cell.

    identity: JSON values that decide the cell's outputs; ``task``, ``model``, ``policy`` and
    ``budget`` among them name the folder; ``content`` holds hashes of what the others point to.
    shard: of the command that writes; it is no part of the identity.
    """

    def __init__(
        self, results_dir: Path, identity: Mapping[str, Any], shard: Shard | None = None
    ) -> None:
        self.identity = json.loads(json.dumps({"schema": SCHEMA_VERSION, **identity}))
        canonical = json.dumps(self.identity, sort_keys=True)
        self.run_id = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        task, model, policy, budget = (
            file_name(str(identity[key]["name"])) for key in ("task", "model", "policy", "budget")
        )
        self._prefix = f"{policy}-{budget}-"
        self.path = results_dir / "runs" / task / model / f"{self._prefix}{self.run_id[:8]}"
        self._shard_suffix = shard.suffix if shard else ""
        self.rows_path = self.path / f"samples{self._shard_suffix}.jsonl"
        self._status: dict[str, Any] = {}
        self._status_written = 0.0

    def open(self, config: Mapping[str, Any], *, fork: bool = False, **notes: str | None) -> None:
        """Make the folder and its manifest unless they exist.

        config, notes: the resolved configuration of this command and more for the record.
        Raises UsageError with the fields that differ if a cell of the same settings was begun with
        other contents (data, model files, policy code); ``fork`` begins a cell of its own instead.
        """
        manifest_path = self.path / "manifest.json"
        if manifest_path.exists():
            found = read_manifest(self.path)["identity"]
            if found != self.identity:
                raise UsageError(f"{manifest_path} was changed: {_changes(found, self.identity)}")
            return
        if not fork:
            self.refuse_drift()
        manifest = {"run_id": self.run_id, "identity": self.identity, "config": config, **notes}
        text = json.dumps({**manifest, **provenance()}, indent=2, default=str)
        with replacing(manifest_path) as path:
            path.write_text(text + "\n")

    def refuse_drift(self) -> None:
        """Raise UsageError if a cell of the same settings was begun with other contents."""
        for manifest_path in sorted(self.path.parent.glob("*/manifest.json")):
            if not manifest_path.parent.name.startswith(self._prefix):
                continue
            found = read_manifest(manifest_path.parent)["identity"]
            if {**found, "content": None} == {**self.identity, "content": None}:
                raise UsageError(
                    f"{manifest_path.parent} was begun with the same settings but other contents: "
                    f"{_changes(found, self.identity)}; restore them, choose another results_dir, "
                    "or add drift=fork to keep both apart"
                )

    @contextmanager
    def claimed(self, *, wait: bool = False) -> Iterator[None]:
        """Two processes must not write the same files: a shard claims its own, others the cell.

        Raises LockedError if another one does; wait: until it is done, instead. Raises UsageError
        for a place that cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); choose another results_dir"
            ) from error
        with ExitStack() as locks:
            if self._shard_suffix:
                self._lock(locks, ".lock", fcntl.LOCK_SH, wait=wait)
            self._lock(locks, f".lock{self._shard_suffix}", fcntl.LOCK_EX, wait=wait)
            yield

    def _lock(self, locks: ExitStack, name: str, kind: int, *, wait: bool) -> None:
        # NFS wants a file that is open for reading and for writing; a lock ends with its process.
        stream = locks.enter_context((self.path / name).open("a+"))
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise LockedError(f"another process is writing {self.path}; wait for it") from None
            print(f"waiting for another process to finish {self.path}", flush=True)
            fcntl.flock(stream, kind)

    def rows(self, *, repair: bool = False) -> list[dict[str, Any]]:
        """One row per sample so far, of all shards. Raises UsageError for damage that stays.

        In the files that are claimed, a torn last line (a kill while writing) is cut off, and
        ``repair`` leaves damaged lines out, keeping the damaged file under another name.
        """
        for path in [self.rows_path] if self._shard_suffix else row_files(self.path):
            if path.exists():
                _mend(path, repair=repair)
        return read_lines(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row so that it survives a crash right after.

        Raises OSError with the file's name, and takes back what was written, when it does not fit.
        """
        line = json.dumps({**row, "run_id": self.run_id}, ensure_ascii=True).encode() + b"\n"
        with self.rows_path.open("ab", buffering=0) as stream:
            num_bytes_before = stream.tell()
            try:
                if stream.write(line) != len(line):  # a full disk takes what fits, then complains
                    raise OSError(errno.ENOSPC, "no space left for a row")
                os.fsync(stream.fileno())
            except OSError as error:
                os.truncate(self.rows_path, num_bytes_before)
                raise OSError(error.errno, error.strerror, str(self.rows_path)) from error
        if not self._status:  # scored again, not run: whoever does that keeps the books
            return
        counts = self._status.setdefault("counts", {})
        counts[row.get("status")] = counts.get(row.get("status"), 0) + 1
        if time.monotonic() - self._status_written > _STATUS_EVERY_SEC:
            self.write_status("running")

    def begin(self, num_planned: int, counts: Mapping[str, int]) -> None:
        """Note in status.json that work starts. counts: rows there already, by status.

        The most samples that any command asked for stay planned.
        """
        noted = read_status(self.path)
        self._status = noted | {
            "num_planned": max(noted.get("num_planned", 0), num_planned),
            "counts": dict(counts),
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        self.write_status("running")

    def note_plan(self, num_samples: int) -> None:
        """Note in status.json how many samples a plan wants, which no score waits for."""
        noted = read_status(self.path)
        self._status = noted | {"num_in_plan": num_samples}
        self.write_status(noted.get("state", "planned"))

    def write_status(self, state: str) -> None:
        """state: planned | running | done | failed | cancelled."""
        self._status_written = time.monotonic()
        self._status |= {"state": state, "updated": now()}
        with replacing(self.path / f"status{self._shard_suffix}.json") as path:
            path.write_text(json.dumps(self._status, indent=2) + "\n")


def read_status(cell_path: Path) -> dict[str, Any]:
    """state, num_planned, num_in_plan, counts, updated of a cell; empty if nothing is noted.

    What a shard noted last counts, and the most samples that any wanted.
    """
    found = [_read_mapping(path) or {} for path in cell_path.glob("status*.json")]
    merged: dict[str, Any] = {}
    for noted in sorted(found, key=lambda noted: str(noted.get("updated"))):
        for name in {"num_planned", "num_in_plan"} & noted.keys():
            noted[name] = max(noted[name], merged.get(name, 0))
        merged |= noted
    return merged


def find_cells(results_dir: Path) -> list[Path]:
    """Folders of all cells below ``results_dir`` that have rows."""
    cells = results_dir / "runs"
    return sorted({path.parent for name in _ROW_FILES for path in cells.glob(f"*/*/*/{name}")})


def read_manifest(cell_path: Path) -> dict[str, Any]:
    """Raises UsageError for a folder that is not a cell's, or whose manifest is damaged."""
    manifest = _read_mapping(cell_path / "manifest.json")
    if manifest is None:
        raise UsageError(f"{cell_path} has rows but no manifest.json; move the folder away")
    if "identity" not in manifest:
        raise UsageError(f"{cell_path / 'manifest.json'} is damaged; move the folder away")
    return manifest


def _read_mapping(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; an empty one if the file is damaged, None if there is no file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def row_files(cell_path: Path) -> list[Path]:
    """All files with rows of a cell, in the order in which their lines count."""
    return [path for name in _ROW_FILES for path in sorted(cell_path.glob(name))]


def read_lines(cell_path: Path) -> list[dict[str, Any]]:
    """One row per sample, in the order of first appearance: the last "ok" one, or the last.

    The files are left alone: a torn last line is passed over. Raises UsageError, with file and
    line, for damage anywhere else.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in row_files(cell_path):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            row = parse_row(line)
            if row is None:
                how = "" if path.name == _ROW_FILES[-1] else " and without shard"
                raise UsageError(
                    f"{path} line {number} is damaged; run again with repair=true{how} to keep the "
                    "good lines, or move the folder away to run the cell again"
                )
            before = rows.get(row["sample_id"])
            if before is None or row.get("status") == "ok" or before.get("status") != "ok":
                rows[row["sample_id"]] = row
    return list(rows.values())


def _mend(path: Path, *, repair: bool) -> None:
    """Cut off a torn last line; ``repair``: leave out damaged ones."""
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        warnings.warn(
            f"{path}: cut off a torn last line of {len(tail)} bytes; its sample runs again",
            stacklevel=3,
        )
        os.truncate(path, sum(len(line) + 1 for line in lines))
    good = [line for line in lines if parse_row(line) is not None] if repair else lines
    if len(good) < len(lines):
        stamp = now().replace(":", "")
        kept = path.with_name(path.name.replace("samples", f"samples.corrupt-{stamp}"))
        os.link(path, kept)
        with replacing(path) as whole:
            whole.write_bytes(b"".join(line + b"\n" for line in good))
        print(f"{path}: left out {len(lines) - len(good)} damaged lines, see {kept}")


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of one line; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter from thousands of brackets
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("sample_id"), str | int)
    return row if is_row else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, field by field."""
    before, after = flat(old), flat(new)
    return ", ".join(
        f"{key} {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, before) != after.get(key, before)
    )
