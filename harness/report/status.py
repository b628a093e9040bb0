"""What became of every cell of a results folder: done, failed, missing, and what still runs.

``python -m kvarena.harness.report.status <results_dir>``; ``make status``. Planned cells
(``mode=plan``) without a row are the missing ones; ``--drop-planned`` (``make drop-planned``)
forgets those that never began.
"""

import fcntl
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from kvarena.harness.entry import folder_parser, one_line_errors
from kvarena.harness.errors import UsageError
from kvarena.harness.report.listing import ListedCell, print_cells
from kvarena.harness.store.cell_files import find_cells, read_manifest, read_status
from kvarena.harness.store.row_files import codecs_used, read_lines, read_sample_ids

# All that a plan leaves in a folder, and what a command that did not begin may add.
_OF_PLANS = ("status*.json", ".status*.tmp", ".lock*", "sample_ids*.json")


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """state: done | failed | running | incomplete | missing (nothing ran) | damaged.

    identity: None if neither a run nor a plan has noted it; num_planned: samples that any command
    or plan wanted; num_failed: by row status (oom, error, invalid, score_error); codecs_used: what
    the rows say; problem: what is damaged.
    """

    path: Path
    identity: Mapping[str, Any] | None  # Any: JSON values
    state: str
    num_ok: int
    num_planned: int
    num_failed: Counter[str]
    updated: str
    codecs_used: frozenset[str] = frozenset()
    problem: str = ""


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
    identity, noted, problem = None, {}, ""
    counts: Counter[str] = Counter()
    codecs: frozenset[str] = frozenset()
    num_asked = 0
    try:
        noted = read_status(path)
        rows = read_lines(path)
        num_asked = len(read_sample_ids(path) or ())
        has_begun = rows or (path / "manifest.json").exists()
        identity = read_manifest(path)["identity"] if has_begun else noted.get("identity")
        counts = Counter(str(row.get("status")) for row in rows)
        codecs = codecs_used(rows)
    except (UsageError, OSError) as error:
        problem = str(error)
    num_ok = counts.pop("ok", 0)
    wanted = max(noted.get("num_planned", num_asked), noted.get("num_in_plan", 0))
    num_planned = wanted or num_ok + counts.total()
    if problem:
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
        identity=identity,
        state=state,
        num_ok=num_ok,
        num_planned=num_planned,
        num_failed=counts,
        updated=_minute(noted.get("updated", "")),
        codecs_used=codecs,
        problem=problem,
    )


def _minute(time: str) -> str:
    """11-24 20:16, in UTC as it was noted."""
    try:
        return datetime.fromisoformat(time).strftime("%m-%d %H:%M")
    except ValueError:
        return "-"


def _is_locked(path: Path) -> bool:
    """Whether a living process writes the cell: its lock ends with it, whatever killed it."""
    for lock in path.glob(".lock*"):  # of the cell, and of each of its shards
        try:
            with lock.open("rb") as stream:  # a shared lock needs no leave to write
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # who may not see it cannot tell
            continue
    return False


def print_statuses(statuses: Sequence[CellStatus]) -> None:
    """A line per cell, what is damaged, and a count of all."""
    listed = []
    for cell in statuses:
        failed = ", ".join(f"{num} {name}" for name, num in sorted(cell.num_failed.items()))
        state = f"{cell.state}: {failed}" if failed else cell.state
        texts = (state, f"{cell.num_ok}/{cell.num_planned}", cell.updated)
        listed.append(
            ListedCell(
                path=cell.path,
                identity=cell.identity,
                codecs_used=cell.codecs_used,
                texts=texts,
            )
        )
    print_cells(listed, ("state", "ok", "updated UTC"))
    for cell in statuses:
        if cell.problem:
            print(f"damaged: {cell.problem}")
    counts = Counter(cell.state for cell in statuses)
    print(", ".join(f"{num} {state}" for state, num in sorted(counts.items())) or "no cells")
    if counts["missing"]:
        planned = any(cell.state == "missing" and _is_planned_only(cell.path) for cell in statuses)
        advice = "; make drop-planned forgets those that never began" if planned else ""
        print(f"missing: planned or begun, and no sample has run{advice}")


def drop_planned(results_dir: Path) -> list[CellStatus]:
    """Remove the folders of cells that were planned and never began; returns what they were.

    A folder stays if a command has begun in it (a manifest, rows), holds its lock, or if there is
    anything in it that no plan writes. Raises UsageError for one that cannot be removed.
    """
    dropped = []
    for cell in cell_statuses(results_dir):
        if not _is_planned_only(cell.path):
            continue
        try:
            with (cell.path / ".lock").open("a+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_planned_only(cell.path):  # a command began in the meantime
                    continue
                for path in cell.path.iterdir():
                    path.unlink()
                cell.path.rmdir()
        except BlockingIOError:
            continue
        except OSError as error:
            raise UsageError(f"{cell.path} cannot be removed ({error.strerror})") from error
        dropped.append(cell)
        with suppress(OSError):  # of a model or a task with other cells
            cell.path.parent.rmdir()
            cell.path.parent.parent.rmdir()
    return dropped


def _is_planned_only(path: Path) -> bool:
    return not path.is_symlink() and all(
        any(entry.match(pattern) for pattern in _OF_PLANS) for entry in path.iterdir()
    )


def main() -> None:
    """Print the table, or drop what is only planned; exits with 2 on bad input."""
    parser = folder_parser(__doc__)
    parser.add_argument(
        "--drop-planned", action="store_true", help="remove planned cells that never began"
    )
    with one_line_errors():
        arguments = parser.parse_args()
        if arguments.drop_planned:
            dropped = drop_planned(arguments.folder)
            print_statuses([replace(cell, state="removed") for cell in dropped])
        else:
            print_statuses(cell_statuses(arguments.folder))


if __name__ == "__main__":
    main()
