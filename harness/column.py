"""What is declared of a column of rows: name, type, unit, meaning, and what it may hold."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Column:
    """One column. Any row may lack it, or have null there.

    dtype: str, int, float, bool, or a list of them, as in list[float].
    unit: as in tokens or s; "" for what has none; Markdown, as ``meaning`` is.
    low, high: the least and the most that a number may be, or each of a list.
    finite: whether such numbers may be neither infinite nor NaN.
    choices: all texts there may be; none: any text.
    check: raises ValueError for a text that the column cannot hold.
    """

    name: str
    dtype: type
    unit: str
    meaning: str
    _: KW_ONLY
    low: float | None = None
    high: float | None = None
    finite: bool = True
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None
