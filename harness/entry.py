"""How every command ends: what is not its own fault is one line, never a traceback.

Exit codes: 1 a place cannot be read or written; 2 bad input; 130 Ctrl-C; 141 nobody reads the
output any more (``| head``), as shells count it.
"""

import argparse
import errno
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from kvarena.harness.errors import UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_PYTHONS_TEXT = warnings.formatwarning


def on_folder(act: Callable[[Path], None], about: str | None) -> None:
    """A command whose only argument is a folder; about: the docstring of its module."""
    with one_line_errors():
        act(folder_parser(about).parse_args().folder)


def folder_parser(about: str | None, *, optional: bool = False) -> argparse.ArgumentParser:
    """Of a command whose first argument is a folder; about: the docstring of its module."""
    *folders, name = Path(sys.argv[0]).with_suffix("").parts
    inside = folders[folders.index("harness") + 1 :] if "harness" in folders else []
    parser = argparse.ArgumentParser(
        prog=f"python -m {'.'.join(['kvarena.harness', *inside, name])}",
        description=(about or "").partition("\n")[0],
    )
    parser.add_argument(
        "folder", type=lambda text: Path(text).expanduser(), nargs="?" if optional else None
    )
    return parser


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input, an unusable place, Ctrl-C and a closed pipe end the command as they should."""
    before, warnings.formatwarning = warnings.formatwarning, _warning_text
    try:
        try:
            yield
        finally:
            warnings.formatwarning = before
            _flush()
    except BrokenPipeError:
        leave_quietly()
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        line = place_error(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def _warning_text(
    message: Warning | str,
    category: type[Warning],
    filename: str,  # the names that Python gives them
    lineno: int,
    line: str | None = None,
) -> str:
    """One line for what a user can mend; a warning of other code says where it arose."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _PYTHONS_TEXT(message, category, filename, lineno, line)


def place_error(error: Exception, folder: Path | None = None) -> str | None:
    """What to say of a place that cannot be read or written; None for any other error.

    folder: where it was, if the error does not name a file.
    """
    if isinstance(error, OSError):
        number, file = error.errno, Path(str(error.filename or ""))
    else:  # libraries in Rust (safetensors, tokenizers) only say the system's number in their text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, file = int(found[1]) if found else None, Path()
    if number is None:
        return None
    text = " ".join(str(error).split())
    if number in _FULL:
        place = folder if folder and (folder in file.parents or not file.name) else file.parent
        if place.name and place.is_dir():  # standard output lies nowhere
            text += f" ({shutil.disk_usage(place).free} bytes free in {place})"
    if number in _FORBIDDEN:
        text += "; name a folder that can be written, or copy the results to one"
    return text


def leave_quietly() -> NoReturn:
    """End as a program whose output nobody reads any more."""
    _discard(1, 2)
    sys.exit(128 + signal.SIGPIPE)


def _flush() -> None:
    """Now, when an error can still be told; the interpreter would print it and go on."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(1)
        raise OSError(error.errno, error.strerror, sys.stdout.name) from error


def _discard(*descriptors: int) -> None:
    """What is still buffered for them would raise once more when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
