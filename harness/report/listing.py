"""Cells as lines on a screen: of a plan, or of what became of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvarena.harness.analysis.cell_labels import details, policy_labels, variants
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError

_MOST_COLUMNS = 100


@dataclass(frozen=True, kw_only=True)
class Line:
    """One cell. identity: None where it cannot be known; the folder's name stands for it.

    codecs_used: what its rows say; note: more that tells it apart; texts: one for each of the
    caller's headings.
    """

    path: Path
    identity: Mapping[str, Any] | None  # Any: JSON values
    codecs_used: frozenset[str] = frozenset()
    note: str = ""
    texts: Sequence[str]


def print_cells(lines: Sequence[Line], headings: Sequence[str]) -> None:
    """Policy with codec, budget, what else tells the cell apart, and the texts of each line.

    A table per task, model and variant, as of results. Columns without any text are left out. What
    is too long goes on below. At most 100 columns wide where it is no terminal.
    """
    console = Console(highlight=False)
    if not console.is_terminal or console.width < _MOST_COLUMNS:
        console.width = _MOST_COLUMNS
    names = ["policy", "budget", "besides", *headings]
    for title, rows in _tables(lines).items():
        used = [i for i in range(len(names)) if any(row[i] not in ("", "-") for row in rows)]
        table = Table(box=SIMPLE_HEAD)
        table.pad_edge, table.show_edge, table.collapse_padding = False, False, True
        for i in used:
            is_text = names[i] in ("policy", "besides")
            table.add_column(
                names[i],
                overflow="fold",
                no_wrap=not is_text,
                justify="left" if is_text else "right",
            )
        for row in rows:
            table.add_row(*[_spelled(row[i], console) for i in used])
        with console.capture() as capture:
            console.print(_spelled(title, console), table, sep="\n")
        print("\n".join(text.rstrip() for text in capture.get().splitlines()) + "\n")


def _tables(lines: Sequence[Line]) -> dict[str, list[tuple[str, ...]]]:
    """Rows of each table by its title, small budgets first."""
    known = [line.identity for line in lines if line.identity is not None]
    codecs = [line.codecs_used for line in lines if line.identity is not None]
    labels = iter(zip(variants(known), policy_labels(known, codecs), details(known), strict=True))
    tables: dict[str, list[tuple[str, ...]]] = {}
    for line in lines:
        if line.identity is None:
            place, cell = list(line.path.parts[-3:-1]), (line.path.name, "", line.note)
        else:
            variant, policy, more = next(labels)
            place = [line.identity["task"]["name"], line.identity["model"]["name"], variant]
            besides = ", ".join(text for text in (more, line.note) if text)
            cell = (policy, line.identity["budget"]["name"], besides)
        title = ", ".join(text for text in place if text)
        tables.setdefault(title, []).append((*cell, *line.texts))
    return {title: sorted(tables[title], key=_order) for title in sorted(tables)}


def _spelled(text: str, console: Console) -> Text:
    """As the stream can spell it; Text, since rich reads square brackets in a str as markup."""
    return Text(text.encode(console.encoding, "replace").decode(console.encoding))


def _order(row: tuple[str, ...]) -> tuple[Any, ...]:
    policy, budget, besides, *_ = row
    try:
        place = parse_budget(budget).sort_key
    except UsageError:
        place = (9, 0.0)
    return place, policy, besides
