"""What the fault tests share: the command in this process or in one that may be killed, and faults.

The processes are forked from one that has imported everything (multiprocessing's forkserver): they
start in a tenth of a second, and are real processes with signals, locks and exit codes.
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from kvarena.harness.cells import run_cell
from kvarena.harness.command import run
from kvarena.harness.models import loading
from kvarena.harness.progress import TokenProgress
from kvarena.harness.report import after_run
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.tasks.needle import Needle

PRELOADED = [
    "kvarena.harness.command.run",
    "kvarena.harness.cells.run_cell",
    "kvarena.harness.report.after_run",
]
TIMES = ("ttft_sec", "decode_tokens_per_sec")
MAY_DIFFER = (*TIMES, "slots", "commit")  # of two runs of one cell, a commit made in between


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def is_one_line(self) -> bool:
        return self.err.startswith("error: ") and self.err.count("\n") == 1


def called(
    argv: Sequence[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Outcome:
    """The command in this process; argv without its own name."""
    GlobalHydra.instance().clear()
    run_cell._held_model.cache_clear()
    capsys.readouterr()
    before, code = signal.getsignal(signal.SIGTERM), 0
    patch.setattr(sys, "argv", ["kvarena", *argv])
    try:
        run.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Outcome(code, *capsys.readouterr())


def with_overrides(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Flags first, then the overrides, then what is typed beside them."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    rest = [argument for argument in arguments if not argument.startswith("-")]
    return [*flags, *overrides, *rest]


@contextmanager
def stopped_after_one_row() -> Iterator[list[str]]:
    """Ctrl-C comes while the second row is written; gives the ids of the samples written."""
    append: Callable[..., None] = CellFolder.append
    written: list[str] = []

    def stop(folder: CellFolder, row: Mapping[str, Any]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(row["sample_id"])
        append(folder, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellFolder, "append", stop)
        yield written


@dataclass
class Kvarena:
    """The command in this process; tables and pictures, which take most of its time, on request."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    folder: Path
    overrides: list[str]

    def __post_init__(self) -> None:
        self.results = self.folder / "results"
        self.monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; this takes it back
        self.monkeypatch.chdir(self.folder)

    def __call__(self, *arguments: str, with_report: bool = False) -> Outcome:
        overrides = [*self.overrides, f"results_dir='{self.results}'"]
        with self.monkeypatch.context() as patch:
            if not with_report:
                patch.setattr(after_run, "report", lambda *_, **__: [])
            return called(with_overrides(overrides, arguments), patch, self.capsys)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All lines of the one cell there is."""
        (path,) = self.results.glob("runs/*/*/*/samples.jsonl")
        return read_rows(path)

    @property
    def num_cells(self) -> int:
        return len(list(self.results.glob("runs/*/*/*/samples.jsonl")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def comparable(rows: Sequence[Mapping[str, Any]], *leave_out: str) -> dict[str, dict[str, Any]]:
    """By sample, each once, without what may differ between two runs of one cell."""
    found = {
        row["sample_id"]: {k: v for k, v in row.items() if k not in (*MAY_DIFFER, *leave_out)}
        for row in rows
    }
    assert len(found) == len(rows), "a sample is there twice"
    return found


@contextmanager
def no_model_loads() -> Iterator[None]:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a model was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_weights", refuse)
        yield


# ---- the command in a process of its own ----


@dataclass
class Running:
    process: ForkServerProcess
    log: Path

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, limit_sec: float = 60.0) -> int:
        """The exit code; minus the signal's number after a kill."""
        self.process.join(limit_sec)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], bool], limit_sec: float = 60.0) -> bool:
        """Whether ``condition`` came true before the process ended."""
        deadline = time.monotonic() + limit_sec
        while not condition():
            assert time.monotonic() < deadline, f"it never came to that: {self.text}"
            if self.process.exitcode is not None:
                return False
            time.sleep(0.001)
        return True

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextmanager
def started(
    arguments: Sequence[str], log: Path, fault: Callable[[], None] | None = None
) -> Iterator[Running]:
    """``kvarena <arguments>``, killed at the end of the block; ``fault`` is called before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=(list(arguments), log, fault))
    process.start()
    try:
        yield Running(process, log)
    finally:
        process.kill()
        process.join()


def _command(arguments: list[str], log: Path, fault: Callable[[], None] | None) -> None:
    with log.open("ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    # A shell that starts tests in the background has them ignore Ctrl-C, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    after_run.report = lambda *_, **__: []
    sys.argv = ["kvarena", *arguments]
    if fault is not None:
        fault()
    run.main()


# ---- faults; each is a function of this module, since another process has to find it ----


def slow_passes() -> None:
    """Every pass of the model takes 50 ms longer, so that a signal comes in the middle of one."""
    advance = TokenProgress.advance

    def wait(progress: TokenProgress, num_tokens: int) -> None:
        time.sleep(0.05)
        advance(progress, num_tokens)

    TokenProgress.advance = wait  # type: ignore[method-assign]


def slow_end() -> None:
    """``slow_passes``, and what follows Ctrl-C takes half a minute, unless something stops it."""
    slow_passes()
    write_status = CellFolder.write_status

    def wait(folder: CellFolder, state: str) -> None:
        if state == "cancelled":
            print("cancelling", flush=True)
            time.sleep(30)
        write_status(folder, state)

    CellFolder.write_status = wait  # type: ignore[method-assign]


@dataclass
class TornWrite:
    """The process dies while it writes row ``number``: ``num_bytes`` of it get into the file."""

    number: int
    num_bytes: int

    def __call__(self) -> None:
        append, written = CellFolder.append, []

        def die(folder: CellFolder, row: Mapping[str, Any]) -> None:
            written.append(row["sample_id"])
            if len(written) < self.number:
                append(folder, row)
                return
            line = json.dumps({**row, "run_id": folder.run_id}).encode() + b"\n"
            with folder.rows_path.open("ab", buffering=0) as stream:
                stream.write(line[: self.num_bytes])
            os.kill(os.getpid(), signal.SIGKILL)

        CellFolder.append = die  # type: ignore[method-assign]


_READ_ONLY: list[Path] = []
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime")


def _refuse_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """Called by Python before each such call. Root may write anywhere, so permissions cannot."""
    is_write = event in _WRITES or (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if not is_write or not isinstance(arguments[0], str | os.PathLike):
        return
    path = Path(os.fspath(arguments[0])).absolute()
    if any(path.is_relative_to(folder) for folder in _READ_ONLY):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@cache
def _watch_writes() -> None:
    """Once, since it stays for good; outside of ``read_only`` it does nothing."""
    sys.addaudithook(_refuse_writes)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As on a disk that is mounted for reading: every write below ``folder`` fails."""
    _watch_writes()
    _READ_ONLY.append(folder.absolute())
    try:
        yield
    finally:
        _READ_ONLY.pop()


# ---- a model that fails at one prompt ----

# Called after a pass with its inputs and its output, which it may change; or it raises.
Hook = Callable[[Mapping[str, Any], Any], None]


def hook_model(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Every model that loads from now on calls ``hook`` after each pass."""
    load = loading.load_weights

    def hooked(*arguments: Any, **options: Any) -> torch.nn.Module:  # Any: handed through
        def call(module: torch.nn.Module, _: Any, inputs: Any, output: Any) -> None:
            hook(inputs, output)

        model = load(*arguments, **options)
        model.register_forward_hook(call, with_kwargs=True)
        return model

    patch.setattr(loading, "load_weights", hooked)


def needle_prompts(overrides: Sequence[str], depths: Sequence[float]) -> dict[str, Sequence[int]]:
    """Sample id -> token ids, of toy_folder's needles at these depths."""
    source, haystack = (text.partition("=")[2] for text in overrides[:2])
    task = Needle(lengths=(400,), depths=tuple(depths), haystack=haystack, max_new_tokens=6)
    tokenizer = loading.load_tokenizer(loading.ModelSpec(name="toy", source=source))
    return {sample.id: sample.prompt_token_ids for sample in task.samples(tokenizer, 0)}


def logits_row(prompt: Sequence[int], inputs: Mapping[str, Any]) -> int | None:
    """Which row of a pass's logits chooses the first token after ``prompt``; None if none does."""
    row, wanted = inputs["input_ids"][0].tolist(), list(prompt)[-100:]  # all in its last chunk
    for index, last in enumerate(inputs["logits_to_keep"].tolist()):
        if row[max(0, last - 99) : last + 1] == wanted:
            return index
    return None
