"""What became of every cell of a results folder: done, failed, missing, and what still runs.

``python -m kvarena.harness.status <results_dir>``; ``make status``. Planned cells (``mode=plan``)
without a row are the missing ones.
"""

import fcntl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.results import find_cells, read_lines, read_status


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """state: done | failed | running | incomplete | missing (nothing ran) | damaged.

    num_planned: samples that any command or plan wanted; num_failed: by row status (oom, error,
    invalid, score_error).
    """

    path: Path
    state: str
    num_ok: int
    num_planned: int
    num_failed: Counter[str]
    updated: str

    @property
    def label(self) -> str:
        """Task, model and folder of the cell."""
        return "/".join(self.path.parts[-3:])


def cell_statuses(results_dir: Path) -> list[CellStatus]:
    """Of all cells below ``results_dir``. Raises UsageError if there are none."""
    cells = results_dir / "runs"
    paths = {path.parent for path in cells.glob("*/*/*/status*.json")} | set(
        find_cells(results_dir)
    )
    if not paths:
        raise UsageError(
            f"no cells in {results_dir}: run something first, or add mode=plan to a command to see "
            "what it would take"
        )
    return [_cell_status(path) for path in sorted(paths)]


def _cell_status(path: Path) -> CellStatus:
    """By the rows, as far as they go: a kill can leave anything in status.json."""
    noted = read_status(path)
    try:
        counts = Counter(str(row.get("status")) for row in read_lines(path))
    except UsageError:
        counts, damaged = Counter(), True
    else:
        damaged = False
    num_ok = counts.pop("ok", 0)
    wanted = max(int(noted.get(name, 0)) for name in ("num_planned", "num_in_plan"))
    num_planned = wanted or num_ok + counts.total()
    if damaged:
        state = "damaged"
    elif _is_locked(path):
        state = "running"
    elif num_planned and num_ok >= num_planned:
        state = "done"
    elif counts or (not num_ok and noted.get("state") == "failed"):
        state = "failed"
    else:
        state = "incomplete" if num_ok else "missing"
    return CellStatus(
        path=path,
        state=state,
        num_ok=num_ok,
        num_planned=num_planned,
        num_failed=counts,
        updated=str(noted.get("updated", "-")),
    )


def _is_locked(path: Path) -> bool:
    """Whether a living process writes the cell: its lock ends with it, whatever killed it."""
    for lock in path.glob(".lock*"):  # of the cell, and of each of its shards
        with lock.open() as stream:  # for reading, as the folder may be read-only
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def print_statuses(statuses: Sequence[CellStatus]) -> None:
    """A line per cell that is not done, and a count of all."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("cell", overflow="fold")
    for name in ("state", "ok", "failed", "updated"):
        table.add_column(name, justify="right")
    for cell in statuses:
        if cell.state != "done":
            failed = ", ".join(f"{n} {name}" for name, n in sorted(cell.num_failed.items()))
            ok = f"{cell.num_ok}/{cell.num_planned}"
            table.add_row(cell.label, cell.state, ok, failed or "-", cell.updated)
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    if table.row_count:
        console.print(table)
    counts = Counter(cell.state for cell in statuses)
    print(", ".join(f"{num} {state}" for state, num in sorted(counts.items())))


def main() -> None:
    """The argument is a results folder."""
    on_folder(lambda folder: print_statuses(cell_statuses(folder)), __doc__)


if __name__ == "__main__":
    main()
