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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvarena.harness.errors import LockedError, UsageError
from kvarena.harness.files import file_name, read_json, replacing
from kvarena.harness.provenance import now, provenance
from kvarena.harness.store.cell_files import flat, read_manifest, read_status
from kvarena.harness.store.row_files import mend, read_lines, row_files
from kvarena.harness.store.shards import Shard

SCHEMA_VERSION = 2  # of rows and of what the engine keeps; another one makes other folders
_STATUS_EVERY_SEC = 5.0


class CellFolder:
    """``<results_dir>/runs/<task>/<model>/<policy>+<codec>-<budget>-<hash>/`` of one cell.

    identity: JSON values that decide the cell's outputs; ``task``, ``model``, ``policy``, ``codec``
    and ``budget`` among them name the folder; ``content`` holds hashes of what the others point to.
    shard: of the command that writes; it is no part of the identity.

    A folder that was begun before names carried the codec goes on under its own name.
    """

    def __init__(
        self, results_dir: Path, identity: Mapping[str, Any], shard: Shard | None = None
    ) -> None:
        self.identity = json.loads(json.dumps({"schema": SCHEMA_VERSION, **identity}))
        canonical = json.dumps(self.identity, sort_keys=True)
        self.run_id = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        task, model, policy, budget = (
            str(identity[key]["name"]) for key in ("task", "model", "policy", "budget")
        )
        codec = identity.get("codec", {"name": "none"})["name"]
        method = policy if codec == "none" else f"{policy}+{codec}"
        named = file_name(f"{method}-{budget}")
        named_before = f"{file_name(policy)}-{file_name(budget)}"
        self._names = (f"{named}-", f"{named_before}-")
        folder = results_dir / "runs" / file_name(task) / file_name(model)
        self.path, before = (folder / f"{name}{self.run_id[:8]}" for name in self._names)
        if os.path.isdir(before) and not os.path.isdir(self.path):
            self.path = before
        self._shard_suffix = shard.suffix if shard else ""
        self.rows_path = self.path / f"samples{self._shard_suffix}.jsonl"
        self._status: dict[str, Any] = {}
        self._status_written = 0.0

    def open(self, config: Mapping[str, Any], **notes: str | None) -> None:
        """Make the folder and its manifest unless they exist.

        config, notes: the resolved configuration of this command and more for the record.
        Raises UsageError with the fields that differ if a cell of the same settings was begun with
        other contents (data, model files, policy code).
        """
        manifest_path = self.path / "manifest.json"
        if manifest_path.exists():
            found = read_manifest(self.path)["identity"]
            if found != self.identity:
                raise UsageError(f"{manifest_path} was changed: {_changes(found, self.identity)}")
            return
        self.refuse_drift()
        manifest = {"run_id": self.run_id, "identity": self.identity, "config": config, **notes}
        text = json.dumps({**manifest, **provenance()}, indent=2, default=str)
        with replacing(manifest_path) as path:
            path.write_text(text + "\n")

    def refuse_drift(self) -> None:
        """Raise UsageError if a cell of the same settings was begun with other contents."""
        for manifest_path in sorted(self.path.parent.glob("*/manifest.json")):
            if not manifest_path.parent.name.startswith(self._names):
                continue
            found = read_manifest(manifest_path.parent)["identity"]
            if {**found, "content": None} == {**self.identity, "content": None}:
                raise UsageError(
                    f"{manifest_path.parent} was begun with the same settings but other contents: "
                    f"{_changes(found, self.identity)}; restore them, or choose another "
                    "results_dir for the new ones"
                )

    @contextmanager
    def claimed(self, *, wait: bool = False) -> Iterator[None]:
        """Two processes must not write the same files: a shard claims its own, others the cell.

        Raises LockedError if another one does; wait: until it is done, instead. Raises UsageError
        for a place that cannot be written.
        """
        with ExitStack() as locks:
            if self._shard_suffix:
                self._lock(locks, ".lock", fcntl.LOCK_SH, wait=wait)
            self._lock(locks, f".lock{self._shard_suffix}", fcntl.LOCK_EX, wait=wait)
            yield

    def _lock(self, locks: ExitStack, name: str, kind: int, *, wait: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # NFS wants a file open for reading and for writing; a lock ends with its process.
            stream = locks.enter_context((self.path / name).open("a+"))
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); choose another results_dir"
            ) from error
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
                mend(path, repair=repair)
        return read_lines(self.path)

    def note_samples(self, sample_ids: Iterable[str]) -> None:
        """Note which samples a command asked for: rows of any others never count."""
        path = self.path / f"sample_ids{self._shard_suffix}.json"
        noted: dict[str, None] = dict.fromkeys((path.exists() and read_json(path)) or ())
        added = [name for name in sample_ids if name not in noted]
        if added or not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps([*noted, *added]) + "\n")

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
        noted.pop("identity", None)  # the manifest says so from now on
        self._status = noted | {
            "num_planned": max(noted.get("num_planned", 0), num_planned),
            "counts": dict(counts),
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        self.write_status("running")

    def note_plan(self, num_samples: int) -> None:
        """Note in status.json how many samples a plan wants, which no score waits for.

        Of a cell that nothing ran in also what it is: it has no manifest. Raises OSError.
        """
        noted = read_status(self.path)
        self._status = noted | {"num_in_plan": num_samples}
        if not (self.path / "manifest.json").exists():
            self._status["identity"] = self.identity
        self.write_status(noted.get("state", "planned"))

    def write_status(self, state: str) -> None:
        """state: planned | running | done | failed | cancelled."""
        self._status_written = time.monotonic()
        self._status |= {"state": state, "updated": now()}
        with replacing(self.path / f"status{self._shard_suffix}.json") as path:
            path.write_text(json.dumps(self._status, indent=2) + "\n")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, field by field."""
    before, after = flat(old), flat(new)
    return ", ".join(
        f"{key} {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, before) != after.get(key, before)
    )
