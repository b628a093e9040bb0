"""A cell's rows as lines of its files: what a line may hold, and which rows count.

Nothing here writes but ``mend``. A row's figures are checked because people edit files: what is out
of bounds would end in a crash far from its cause, or in a wrong mean.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    create_model,
)

from kvarena.harness.column import Column
from kvarena.harness.errors import UsageError
from kvarena.harness.files import read_bytes, read_json, replacing
from kvarena.harness.provenance import now
from kvarena.harness.store.columns import CHECKED

# Last the file of commands without a shard: only those score again, and what they write counts.
ROW_FILES = ("samples-*of*.jsonl", "samples.jsonl")

_Text = InstanceOf[str]  # pydantic's own refuse half a surrogate pair, which decoders can give


def row_model(columns: Iterable[Column]) -> type[BaseModel]:
    """What a row may hold in these columns, each of which it may lack; others are passed over."""
    fields: dict[str, Any] = {column.name: (_allowed(column) | None, None) for column in columns}
    return create_model("Row", __config__=ConfigDict(strict=True, extra="ignore"), **fields)


def _allowed(column: Column) -> Any:  # Any: what annotates a field
    if items := get_args(column.dtype):
        return list[_allowed(replace(column, dtype=items[0]))]  # type: ignore[misc]
    if column.choices:
        return Literal[column.choices]
    if column.check is not None:
        return Annotated[str, AfterValidator(_checked_by(column.check))]
    if column.dtype in (str, bool):
        return _Text if column.dtype is str else bool
    # A whole number may be written as 4e6, too.
    step = 1 if column.dtype is int else None
    return Annotated[
        float,
        Field(ge=column.low, le=column.high, multiple_of=step, allow_inf_nan=not column.finite),
    ]


def _checked_by(check: Callable[[str], object]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        check(text)
        return text

    return checked


# The id is no part of it: a row without one is no row.
_Row = row_model(column for column in CHECKED if column.name != "sample_id")


def is_score(value: Any) -> bool:  # Any: what a scorer gave, or a JSON value
    """Whether it is a number from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def parse_row(line: bytes) -> dict[str, Any]:
    """The row of one line. An answer without a score counts as one whose scorer failed.

    Raises ValueError with what is wrong with the line.
    """
    try:
        row = json.loads(line, parse_int=_parse_int)
    except (ValueError, RecursionError):  # the latter from thousands of brackets
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("sample_id"), str | int):
        raise ValueError("is damaged")
    score = row.get("score")
    if score is None or (isinstance(score, float) and not math.isfinite(score)):
        row.pop("score", None)
        if row.get("status") == "ok":
            row |= {"status": "score_error", "error": f"the score is {score}, not a number"}
    try:
        _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = str(first["loc"][0]), json.dumps(first["input"])[:50]
        raise ValueError(f"has {field} {value}: {first['msg']}") from None
    return row


def _parse_int(digits: str) -> int:
    """Raises ValueError for a number that no table can hold."""
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{digits} takes more than 64 bits")
    return number


def row_files(cell_path: Path) -> list[Path]:
    """All files with rows of a cell, in the order in which their lines count."""
    return [path for name in ROW_FILES for path in sorted(cell_path.glob(name))]


def read_lines(cell_path: Path) -> list[dict[str, Any]]:
    """One row per sample, in the order of first appearance: the last "ok" one, or the last.

    The files are left alone: a torn last line is passed over. Samples that no command asked for are
    left out with a warning. Raises UsageError, with file and line, for other damage.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in row_files(cell_path):
        for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
            try:
                row = parse_row(line)
            except ValueError as reason:
                how = "" if path.name == ROW_FILES[-1] else " and without shard"
                raise UsageError(
                    f"{path} line {number} {reason}; run again with repair=true{how} to keep the "
                    "good lines, or move the folder away to run the cell again"
                ) from None
            before = rows.get(row["sample_id"])
            if before is None or row.get("status") == "ok" or before.get("status") != "ok":
                rows[row["sample_id"]] = row
    known = read_sample_ids(cell_path)
    if known is None:
        return list(rows.values())
    unknown = [str(name) for name in rows if name not in known]
    if unknown:
        warnings.warn(
            f"{cell_path}: left out {len(unknown)} of {len(rows)} samples, which no command asked "
            f"for: {', '.join(unknown[:5])}",
            stacklevel=2,
        )
    return [row for name, row in rows.items() if name in known]


def read_sample_ids(cell_path: Path) -> set[str | int] | None:
    """Ids of the samples that commands asked for; None for a cell in which none noted them.

    Raises UsageError for a damaged file.
    """
    paths = sorted(cell_path.glob("sample_ids*.json"))
    ids: set[str | int] = set()
    for path in paths:
        found = read_json(path)
        if not isinstance(found, list) or not all(isinstance(name, str | int) for name in found):
            raise UsageError(f"{path} is damaged; delete it, the next run writes it again")
        ids |= set(found)
    return ids if paths else None


def mend(path: Path, *, repair: bool) -> None:
    """Cut off a torn last line; ``repair``: leave out damaged ones, and keep the file they were in.

    Only for who has claimed the file.
    """
    *lines, tail = read_bytes(path).split(b"\n")
    if tail:
        warnings.warn(
            f"{path}: cut off a torn last line of {len(tail)} bytes; its sample runs again",
            stacklevel=3,
        )
        os.truncate(path, sum(len(line) + 1 for line in lines))
    good = [line for line in lines if _is_good(line)] if repair else lines
    if len(good) < len(lines):
        stamp = now().replace(":", "")
        kept = path.with_name(path.name.replace("samples", f"samples.corrupt-{stamp}"))
        os.link(path, kept)
        with replacing(path) as whole:
            whole.write_bytes(b"".join(line + b"\n" for line in good))
        print(f"{path}: left out {len(lines) - len(good)} damaged lines, see {kept}")


def _is_good(line: bytes) -> bool:
    try:
        parse_row(line)
    except ValueError:
        return False
    return True


def codecs_used(rows: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """The codecs that good rows name, as they ran."""
    return frozenset(
        row["codec"] for row in rows if row.get("status") == "ok" and row.get("codec") is not None
    )
