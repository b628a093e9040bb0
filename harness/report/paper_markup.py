"""A table as plain text, and the same in Markdown and in LaTeX."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.harness.analysis.comparison import is_full_cache

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
TIE, UNBOUND, DIFFERS = "\N{DAGGER}", "\N{DOUBLE DAGGER}", "*"
REFERENCE = "\N{SECTION SIGN}"
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}"

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    AT_LEAST: r"$\geq$",
    MINUS: "$-$",
    MISSING: "--",
    TIE: r"$^{\dagger}$",
    UNBOUND: r"$^{\ddagger}$",
    DIFFERS: "$^{*}$",
    REFERENCE: r"$^{\S}$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
# What pdflatex sets beyond ASCII without more packages: one accent on a letter, and a few signs.
_ACCENTS = {"", *"\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"}
_SIGNS = "\N{LATIN SMALL LETTER SHARP S}\N{DEGREE SIGN}\N{MULTIPLICATION SIGN}\N{MICRO SIGN}"
_PAGE_CHARACTERS = 60  # of a table's line that fit the width of a page


class StyledText(NamedTuple):
    """What a place of a table says, as plain text."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """One table as plain text. lines: policy -> its texts, one for each of ``columns``."""

    name: str
    caption: str
    columns: list[str]
    lines: dict[str, list[StyledText]]
    notes: list[str]


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Text that pdflatex sets as it is; a sign that it does not know becomes [U+4E2D]."""
    return "".join(_LATEX.get(sign) or _plain(sign) for sign in text)


def _plain(sign: str) -> str:
    parts = unicodedata.normalize("NFD", sign)
    is_known = sign in _SIGNS or (parts[0].isascii() and parts[1:] in _ACCENTS)
    return sign if is_known else f"[U+{ord(sign):04X}]"


def markdown_file(grids: Sequence[Grid]) -> str:
    """Tables one below the other."""
    return "\n".join(map(to_markdown, grids))


def latex_file(grids: Sequence[Grid]) -> str:
    """Table environments under a comment that names the packages they need."""
    packages = ["booktabs", *(["graphicx"] if any(map(_is_wide, grids)) else [])]
    needed = " and ".join(rf"\usepackage{{{name}}}" for name in packages)
    return "\n".join([f"% needs {needed}", *map(to_latex, grids)])


def to_markdown(grid: Grid) -> str:
    """A caption, a GitHub table and the notes."""

    def styled(one: StyledText) -> str:
        text = escape_markdown(one.text)
        return f"**{text}**" if one.bold else text

    header = ["policy", *map(escape_markdown, grid.columns)]
    lines = [header, ["---", *["---:"] * len(grid.columns)]]
    lines += [[escape_markdown(name), *map(styled, texts)] for name, texts in grid.lines.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = escape_markdown(" ".join(grid.notes))
    return f"**{escape_markdown(grid.caption)}**\n\n{table}\n\n{notes}\n"


def to_latex(grid: Grid) -> str:
    """A table environment; a wide one is scaled to the page."""

    def styled(one: StyledText) -> str:
        text = escape_latex(one.text)
        return rf"\textbf{{{text}}}" if one.bold else text

    def line(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\"

    lines = [line([escape_latex(name), *map(styled, texts)]) for name, texts in grid.lines.items()]
    if len(lines) > 1 and is_full_cache(next(iter(grid.lines))):
        lines.insert(1, r"\midrule")
    texts = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(grid.caption)}}}",
        rf"\label{{tab:{grid.name}}}",
        r"\smallskip",
        *([r"\resizebox{\textwidth}{!}{%"] if _is_wide(grid) else []),
        rf"\begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
        r"\toprule",
        line(["policy", *map(escape_latex, grid.columns)]),
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}" + ("}" if _is_wide(grid) else ""),
        r"\par\smallskip",
        rf"\parbox{{\linewidth}}{{\footnotesize {escape_latex(' '.join(grid.notes))}}}",
        r"\end{table}",
        "",
    ]
    return "\n".join(texts)


def _is_wide(grid: Grid) -> bool:
    table = [grid.columns, *[[one.text for one in texts] for texts in grid.lines.values()]]
    columns = [list(grid.lines), *map(list, zip(*table, strict=True))]
    # Two characters stand for the space between columns.
    return sum(2 + max(map(len, texts)) for texts in columns) > _PAGE_CHARACTERS
