"""Files that are there whole or not at all, whenever the process or the machine stops."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvarena.harness.errors import UsageError

_LONGEST_NAME = 180  # bytes; file systems take 255, and beginnings and endings are put to it


def file_name(text: str) -> str:
    """``text`` as the name of one file or folder, which can lead nowhere else."""
    name = re.sub(r"[^A-Za-z0-9.=%+-]+", "_", text).lstrip(".") or "_"
    if len(name) <= _LONGEST_NAME:
        return name
    # What is cut off must still tell two names apart.
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return f"{name[:_LONGEST_NAME]}-{digest[:8]}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder may well give two processes the same number.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        # The temporary file's name would say nothing to anyone.
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        with suppress(OSError):  # it may never have been there
            temporary.unlink()


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises UsageError for one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); move it away") from error


def read_json(path: Path) -> Any:  # Any: a JSON value
    """The value in a file; None if the file is damaged. Raises as ``read_bytes`` does."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # the latter from thousands of brackets
        return None
