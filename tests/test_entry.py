"""How the commands end: one line for bad input, a full or read-only disk and a closed pipe."""

import builtins
import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from faulty import Kvarena, Outcome
from kvarena.harness.entry import one_line_errors, place_error
from toy_folder import toy_overrides

READING = (
    "report.status",
    "report.paper_tables",
    "report.html_page",
    "report.board",
    "cells.rescore",
    "cells.check_results",
    "studies.equal_bytes",
)


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    return Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))


def call(kvarena: Kvarena, module: str, *arguments: object) -> Outcome:
    """``python -m kvarena.harness.<module> <arguments>`` in this process."""
    main = importlib.import_module(f"kvarena.harness.{module}").main
    kvarena.capsys.readouterr()
    code = 0
    with kvarena.monkeypatch.context() as patch:
        patch.setattr(
            sys, "argv", [f"/somewhere/harness/{module.replace('.', '/')}.py", *map(str, arguments)]
        )
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, *kvarena.capsys.readouterr())


# ---- warnings ----


def test_a_warning_to_a_user_is_one_line_without_code(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_errors():
        sys.stderr.write(warnings.formatwarning("1 of 2 samples left out", UserWarning, "a.py", 1))
        sys.stderr.write(warnings.formatwarning("old", DeprecationWarning, "a.py", 1, "x = 1"))
    assert capsys.readouterr().err == (
        "warning: 1 of 2 samples left out\na.py:1: DeprecationWarning: old\n  x = 1\n"
    )


# ---- arguments ----


@pytest.mark.parametrize("module", [*READING[:-1], "studies.kept_tokens"])
def test_a_command_without_its_folder_shows_its_usage(module: str, kvarena: Kvarena) -> None:
    outcome = call(kvarena, module)
    assert outcome.code == 2
    assert outcome.err.startswith(f"usage: python -m kvarena.harness.{module} ")
    assert "required: folder" in outcome.err


@pytest.mark.parametrize("module", READING)
def test_a_folder_without_cells_is_one_line(module: str, kvarena: Kvarena) -> None:
    outcome = call(kvarena, module, kvarena.folder / "nothing")
    assert (outcome.code, outcome.out, outcome.is_one_line) == (2, "", True)
    assert str(kvarena.folder / "nothing") in outcome.err


def test_tables_that_are_not_there_are_named(kvarena: Kvarena) -> None:
    outcome = call(kvarena, "studies.reference", kvarena.folder, "needle")
    assert (outcome.code, outcome.is_one_line) == (1, True)
    assert f"No such file or directory: '{kvarena.folder}/tables/needle.csv'" in outcome.err


def test_a_home_folder_may_be_written_as_a_tilde(kvarena: Kvarena) -> None:
    assert kvarena("limit=1").code == 0
    kvarena.monkeypatch.setenv("HOME", str(kvarena.folder))
    assert call(kvarena, "report.status", "~/results").code == 0


# ---- disks ----


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As on a disk that is mounted for reading alone, where not even root can write."""
    opened, made, removed, asked = builtins.open, os.mkdir, os.unlink, os.access

    def refuse(path: Any) -> None:
        if Path(str(path)).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return opened(path, mode, *arguments, **options)

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if not Path(path).exists():
            refuse(path)
        made(path, *arguments, **options)

    def unlink(path: Any, *arguments: Any, **options: Any) -> None:
        refuse(path)
        removed(path, *arguments, **options)

    def access(path: Any, mode: int, **options: Any) -> bool:
        is_there = Path(str(path)).is_relative_to(folder)
        return False if is_there and mode & os.W_OK else asked(path, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module, name, function in (
            (builtins, "open", open_),
            (io, "open", open_),
            (os, "mkdir", mkdir),
            (os, "unlink", unlink),
            (os, "access", access),
        ):
            patch.setattr(module, name, function)
        yield


@pytest.mark.parametrize(
    ("module", "written"),
    [("report.paper_tables", "tables/rows."), ("report.html_page", "report.html'")],
)
def test_what_cannot_be_written_is_one_line_with_its_own_name(
    module: str, written: str, kvarena: Kvarena
) -> None:
    assert kvarena(with_report=True).code == 0
    with read_only(kvarena.results):
        outcome = call(kvarena, module, kvarena.results)
    assert (outcome.code, outcome.out, outcome.is_one_line) == (1, "", True)
    assert f"Read-only file system: '{kvarena.results}/{written}" in outcome.err
    assert "name a folder that can be written, or copy the results to one" in outcome.err


def test_what_only_reads_works_on_a_read_only_disk(kvarena: Kvarena) -> None:
    assert kvarena("limit=1").code == 0
    assert kvarena("policy=tova", "mode=plan").code == 0
    expected = call(kvarena, "report.status", kvarena.results)
    assert "missing" in expected.out
    with read_only(kvarena.results):
        assert call(kvarena, "report.status", kvarena.results) == expected


def test_scoring_again_says_once_that_it_has_to_write(kvarena: Kvarena) -> None:
    assert kvarena("-m", "policy=keydiff,tova", "limit=1").code == 0
    with read_only(kvarena.results):
        outcome = call(kvarena, "cells.rescore", kvarena.results)
    assert (outcome.code, outcome.out, outcome.is_one_line) == (2, "", True)
    assert f"{kvarena.results} cannot be written, and new scores go there" in outcome.err


def test_a_plan_needs_no_leave_to_write(kvarena: Kvarena) -> None:
    assert kvarena("limit=1").code == 0
    with read_only(kvarena.results):
        assert kvarena("mode=plan").code == 0


@pytest.mark.parametrize("arguments", [["-m", "policy=keydiff,tova"], ["-m"]])
def test_a_run_on_a_read_only_disk_is_one_line(arguments: list[str], kvarena: Kvarena) -> None:
    assert kvarena("limit=1").code == 0
    with read_only(kvarena.results):
        outcome = kvarena(*arguments)
    assert (outcome.code, outcome.out, outcome.is_one_line) == (1, "", True)
    assert f"Read-only file system: '{kvarena.results}/" in outcome.err


def test_a_full_disk_is_told_with_what_is_free_in_the_folder(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left", str(tmp_path / "runs" / "x"))
    for folder, free in ((tmp_path, tmp_path), (None, None)):
        line = place_error(error, folder)
        assert line is not None
        assert line.startswith(f"[Errno 28] No space left: '{tmp_path}/runs/x'")
        assert ("bytes free" in line) == (free is not None)
    assert f"bytes free in {tmp_path})" in str(place_error(OSError(errno.ENOSPC, "full"), tmp_path))
    assert place_error(OSError(errno.ENOSPC, "full", "<stdout>")) == "[Errno 28] full: '<stdout>'"


def test_a_library_that_tells_the_systems_error_in_words_is_understood() -> None:
    error = SafetensorError("Error while serializing: No space left on device (os error 28)")
    assert "No space left on device" in str(place_error(error))
    for other in (SafetensorError("invalid header"), OSError("no number"), ValueError("x")):
        assert place_error(other) is None


def test_what_is_neither_input_nor_a_place_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def test_ctrl_c_ends_a_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""


# ---- standard output ----


def run_into(output: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=buffered,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["kvarena.harness.command.run", "--help"],
        ["kvarena.harness.command.run", "--version"],
        ["kvarena.harness.command.run", "-c", "job"],
        ["kvarena.harness.command.run", "-sc", "install=bash"],
        ["kvarena.harness.report.status", "--help"],
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_ends_a_command_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_into(writer, *arguments)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_log_that_nobody_reads_is_no_traceback_either() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_into(writer, "kvarena.harness.command.run", "--info")
    os.close(writer)
    assert done.stderr == ""


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_into(full.fileno(), "kvarena.harness.command.run", "--version")
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device: '<stdout>'\n"


def test_a_run_whose_output_is_no_longer_read_stops_and_keeps_its_rows(kvarena: Kvarena) -> None:
    code = (
        "import sys\n"
        "from kvarena.harness.cells import run_cell\n"
        "from kvarena.harness.command import run\n"
        "def gone(*_, **__): raise BrokenPipeError\n"
        "run_cell.print = gone\n"
        "sys.argv[0] = 'kvarena'\n"
        "run.main()\n"
    )
    arguments = [*kvarena.overrides, f"results_dir={kvarena.results}", "limit=1"]
    assert kvarena("limit=1").code == 0  # the next run prints that all is there already
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", *arguments, "policy=keydiff,tova"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, "", "")
    assert kvarena.num_cells == 1, "no further job began"
