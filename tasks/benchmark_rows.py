"""A file of benchmark data: its rows or settings read, and what is wrong named where it is."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """name: what messages call it. content: uncompressed bytes."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Checksum of the content."""
        return hashlib.sha256(self.content).hexdigest()

    def rows(self, fields: Mapping[str, Field]) -> list[Row]:
        """All rows of a jsonl file; blank lines are left out.

        Raises ValueError that names file, line and field for a row that lacks one of ``fields``
        or has a wrong value in it, and for a file without rows.
        """
        rows = []
        # Not splitlines(): U+2028 and others inside a text are no line ends.
        for number, line in enumerate(self.content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                rows.append(_checked_row(f"{self.name} line {number}", line, fields))
        if not rows:
            raise ValueError(f"{self.name} has no rows")
        return rows

    def mapping(self) -> Row:
        """The one JSON object of the file. Raises ValueError that names the file."""
        value = _parsed(self.name, self.content)
        if not isinstance(value, dict):
            raise ValueError(f"{self.name} must hold one JSON object, got {_short(value)}")
        return value


def _checked_row(where: str, line: bytes, fields: Mapping[str, Field]) -> Row:
    row = _parsed(where, line)
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {_short(row)}")
    for name, (meaning, is_good) in fields.items():
        if name not in row:
            raise ValueError(f"{where} lacks the field {name!r}, which must be {meaning}")
        if not is_good(row[name]):
            raise ValueError(f"{where}: field {name!r} must be {meaning}, got {_short(row[name])}")
    return row


def _parsed(where: str, content: bytes) -> Any:  # Any: JSON
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from error


def _short(value: Any) -> str:  # Any: JSON
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
