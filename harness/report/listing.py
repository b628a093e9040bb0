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
class ListedCell:
    """One cell. identity: None where it cannot be known; the folder's name stands for it.

    codecs_used: what its rows say; note: more that tells it apart; texts: one for each of the
    caller's headings.
    """

    path: Path
    identity: Mapping[str, Any] | None  # Any: JSON values
    codecs_used: frozenset[str] = frozenset()
    note: str = ""
    texts: Sequence[str]


def print_cells(cells: Sequence[ListedCell], headings: Sequence[str]) -> None:
    """Of each cell: policy with codec, budget, what else tells it apart, and its texts.

    A table per task, model and variant, as of results. Columns without any text are left out. What
    is too long goes on below. At most 100 columns wide where it is no terminal.
    """
    console = Console(highlight=False)
    if not console.is_terminal or console.width < _MOST_COLUMNS:
        console.width = _MOST_COLUMNS
    names = ["policy", "budget", "besides", *headings]
    for title, rows in _tables(cells).items():
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


def _tables(cells: Sequence[ListedCell]) -> dict[str, list[tuple[str, ...]]]:
    """Rows of each table by its title, small budgets first."""
    known = [cell.identity for cell in cells if cell.identity is not None]
    codecs = [cell.codecs_used for cell in cells if cell.identity is not None]
    labels = iter(zip(variants(known), policy_labels(known, codecs), details(known), strict=True))
    tables: dict[str, list[tuple[str, ...]]] = {}
    for cell in cells:
        if cell.identity is None:
            place, named = list(cell.path.parts[-3:-1]), (cell.path.name, "", cell.note)
        else:
            variant, policy, more = next(labels)
            place = [cell.identity["task"]["name"], cell.identity["model"]["name"], variant]
            besides = ", ".join(text for text in (more, cell.note) if text)
            named = (policy, cell.identity["budget"]["name"], besides)
        title = ", ".join(text for text in place if text)
        tables.setdefault(title, []).append((*named, *cell.texts))
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
