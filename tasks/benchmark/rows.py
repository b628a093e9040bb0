"""A file of benchmark data: its rows or settings read, and what is wrong named where it is.

``datasets`` opens, unpacks and reads the rows; it keeps no copy of them. A jsonl is read as lines
of text and parsed here, because the json reader gives each column one type: texts that look like
dates, numbers over 64 bits and fields that only some rows have would come out as something else.
"""

import hashlib
import io
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, TypeGuard

SURROGATE = re.compile("[\ud800-\udfff]")

# Any: a value as it came out of JSON.
Row = dict[str, Any]
# What a field must be, in words, and the test for it.
Field = tuple[str, Callable[[Any], bool]]


def is_text(value: Any) -> TypeGuard[str]:
    """A string that can be written as UTF-8, which a lone surrogate in it would prevent."""
    return isinstance(value, str) and not SURROGATE.search(value)


def is_texts(value: Any) -> bool:
    """A list of at least one text."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_text, value))


def is_count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class DataFile:
    """A file, or a member of a zip.

    Rows are those of a ``.jsonl`` or ``.jsonl.gz``, one JSON object a line, or of a ``.parquet``.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def content(self) -> bytes:
        """Its bytes. Raises ValueError for a damaged zip."""
        if self.member is None:
            return self.path.read_bytes()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.name} is damaged ({error})") from error

    @property
    def sha256(self) -> str:
        """Of the rows' text, so that it is the same in every packing; of a parquet's bytes."""
        is_parquet = self.name.endswith(".parquet")
        content = self.content if is_parquet else "".join(self._lines).encode()
        return hashlib.sha256(content).hexdigest()

    def rows(self, fields: Mapping[str, Field]) -> list[Row]:
        """All rows; blank lines of a jsonl are left out.

        Raises ValueError that names file, line and field for a row that lacks one of ``fields``
        or has a wrong value in it, and for a file that cannot be read or has no rows.
        """
        found: list[tuple[str, Any]] = []  # Any: JSON
        if self.name.endswith(".parquet"):
            for number, row in enumerate(self._loaded("parquet"), 1):
                found.append((f"{self.name} row {number}", row))
        else:
            for number, line in enumerate(self._lines, 1):
                where = f"{self.name} line {number}"
                if line.strip():
                    found.append((where, _parsed(where, line)))
        if not found:
            raise ValueError(f"{self.name} has no rows")
        return [_checked(where, row, fields) for where, row in found]

    def mapping(self) -> Row:
        """The one JSON object of a settings file. Raises ValueError that names the file."""
        try:
            text = self.content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} is not text in UTF-8 ({error})") from error
        value = _parsed(self.name, text)
        if not isinstance(value, dict):
            raise ValueError(f"{self.name} must hold one JSON object, got {_short(value)}")
        return value

    @cached_property
    def _lines(self) -> list[str]:
        # Only "\n" and "\r\n", which becomes one, end a line: U+2028 in a text does not.
        options = {"encoding": "utf-8", "keep_linebreaks": True}
        return [row["text"] for row in self._loaded("text", **options)]

    def _loaded(self, kind: str, **options: Any) -> list[Row]:  # Any: options of that reader
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        self._check_packing()
        path = str(self.path.absolute())
        address = f"zip://{self.member}::{path}" if self.member else escape(path)
        failures = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, DatasetsError)
        # Streaming reads the file where it is; the folder only ever holds datasets' own locks.
        with tempfile.TemporaryDirectory(prefix="kvarena-") as cache_dir:
            try:
                stream = load_dataset(
                    kind,
                    data_files={"rows": address},
                    split="rows",
                    streaming=True,
                    cache_dir=cache_dir,
                    **options,
                )
                return list(stream)
            except failures as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"{self.name} cannot be read as {kind} ({reason})") from error

    def _check_packing(self) -> None:
        """datasets 5.2 decodes what it unpacks by the locale, and does not unpack twice."""
        if not self.member and not self.name.endswith(".gz"):
            return
        if self.member and self.name.endswith(".gz"):
            raise ValueError(f"{self.name} is packed twice; unpack the zip")
        encoding = io.TextIOWrapper(io.BytesIO()).encoding
        if encoding.lower() not in ("utf-8", "utf8"):
            raise ValueError(
                f"{self.name} is packed and would be read in this locale's encoding, {encoding}: "
                "set PYTHONUTF8=1, or unpack it"
            )


def _checked(where: str, row: Any, fields: Mapping[str, Field]) -> Row:  # Any: JSON
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {_short(row)}")
    for name, (meaning, is_good) in fields.items():
        if name not in row:
            raise ValueError(f"{where} lacks the field {name!r}, which must be {meaning}")
        if not is_good(row[name]):
            raise ValueError(f"{where}: field {name!r} must be {meaning}, got {_short(row[name])}")
    return row


def _parsed(where: str, text: str) -> Any:  # Any: JSON
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error


def _short(value: Any) -> str:  # Any: JSON
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
