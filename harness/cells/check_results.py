"""Check a results folder that somebody sends, and add it to another one if nothing is wrong.

``python -m kvarena.harness.cells.check_results <results_dir> [--into <results_dir>]``;
``make check-results RESULTS=folder INTO=results``. No model, no tokenizer, no data. Of every cell:
its columns are known and there, manifest, folder and rows name the same cell, every planned sample
has one good row, and stored answers get the stored scores again. Each fault is a line with what to
do. Cells are copied into the other folder all or none, and none there is overwritten.
"""

import math
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvarena.harness.cells.rescore import NEEDED, score_of, task_of
from kvarena.harness.entry import folder_parser, one_line_errors
from kvarena.harness.errors import UsageError
from kvarena.harness.files import read_bytes
from kvarena.harness.store.cell_files import find_cells, read_manifest, read_status
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.harness.store.columns import all_columns
from kvarena.harness.store.row_files import parse_row, read_lines, read_sample_ids, row_files
from kvarena.tasks.base import Task

Row = dict[str, Any]  # JSON values

# What every row has, whatever became of its sample, and what an answered one has besides.
_ALWAYS = (
    "task", "task_version", "model", "policy", "shape", "protect", "evict_every", "codec",
    "codec_asked", "budget", "question", "turns", "chunk", "sampling", "dtype", "kv_dtype",
    "device", "seed", "commit", "document", "part", "references", "status", "run_id",
)  # fmt: skip
_ANSWERED = (
    "score", "prediction", "finish_reason", "prompt_tokens", "generated_tokens", "attention",
    "kv_bytes_kept", "kv_bytes_peak", "kept_tokens", "compressed", "bounded", "ttft_sec", "slots",
)  # fmt: skip
# Settings that rows repeat as the manifest has them, and those of which they have the name.
_SAME = ("protect", "evict_every", "question", "turns", "chunk", "dtype", "kv_dtype", "seed")
_NAMED = {"task": "task", "model": "model", "budget": "budget", "shape": "shape"}
_NAMED |= {"codec": "codec_asked"}
# What a row of forced answers sums up, and of which numbers it is the mean.
_MEANS = {"score": "agrees_per_token", "kl_mean": "kl_per_token"}
_MEANS |= {"nll_difference": "nll_difference_per_token"}
_PARTS_OF_CELLS = ("manifest.json", "samples*.jsonl", "sample_ids*.json", "status*.json")
_RUN_AGAIN = "run the cell's command again"
_MOVE_AWAY = "move the folder away and run the cell again"


def faults(results_dir: Path) -> list[str]:
    """A line per fault of any cell. Raises UsageError for a folder without cells."""
    cells = find_cells(results_dir)
    if not cells:
        raise UsageError(
            f"no cells in {results_dir}; name the folder that holds runs/ (results_dir of the run)"
        )
    return [f"{path}: {text}" for path in cells for text in cell_faults(path)]


def cell_faults(path: Path) -> Iterator[str]:
    """What is wrong with one cell and what to do, a line each; nothing for a sound one."""
    links = [entry.name for entry in sorted(path.iterdir()) if entry.is_symlink()]
    if links:
        yield f"{', '.join(links)} is a link; send the file itself"
        return
    try:
        manifest = read_manifest(path)
        planned = read_sample_ids(path)
        lines = list(_lines(path))
    except UsageError as error:
        yield f"cannot be read, {error}"
        return
    rows = [line for line in lines if isinstance(line, dict)]
    yield from (line for line in lines if isinstance(line, str))
    yield from _column_faults(rows)
    yield from _identity_faults(path, manifest, rows)
    yield from _coverage_faults(path, planned, rows)
    if len(rows) == len(lines):  # else read_lines would stop at the damaged one
        yield from _score_faults(path, manifest["identity"])


def _lines(path: Path) -> Iterator[Row | str]:
    """Each line of a cell's files as its row, or what is wrong with it."""
    for file in row_files(path):
        *whole, tail = read_bytes(file).split(b"\n")
        if tail:
            yield f"{file.name} ends in half a line; {_RUN_AGAIN}, which mends it"
        for number, line in enumerate(whole, start=1):
            try:
                yield parse_row(line)
            except ValueError as reason:
                yield f"{file.name} line {number} {reason}; run again with repair=true"


def _column_faults(rows: Sequence[Row]) -> Iterator[str]:
    known = all_columns()
    if unknown := sorted({name for row in rows for name in row} - known.keys()):
        yield (
            f"columns that are not declared: {', '.join(unknown)}; take them out, or send the task "
            "whose row_columns declare them"
        )
    lacking: Counter[str] = Counter()
    for row in rows:
        wanted = (*_ALWAYS, *_ANSWERED) if row.get("status") == "ok" else _ALWAYS
        lacking.update(name for name in wanted if row.get(name) is None)
    if lacking:
        told = ", ".join(f"{name} (in {number} rows)" for name, number in lacking.items())
        yield f"columns that are missing or empty: {told}; {_MOVE_AWAY}"


def _identity_faults(path: Path, manifest: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Where manifest, folder and rows do not name the same cell."""
    identity = manifest["identity"]
    folder = CellFolder(path.parents[3], identity)
    if manifest.get("run_id") != folder.run_id or folder.path.resolve() != path.resolve():
        yield (
            f"the settings in manifest.json are those of {folder.path.name}, run {folder.run_id}, "
            f"and not of this folder, run {manifest.get('run_id')}; {_MOVE_AWAY}"
        )
    expected = {name: identity[name] for name in _SAME if name in identity}
    named = {row: identity.get(name) for name, row in _NAMED.items()}
    expected |= {row: of["name"] for row, of in named.items() if isinstance(of, dict)}
    expected |= {"run_id": folder.run_id}
    for name, value in expected.items():
        others = sorted({str(row[name]) for row in rows if row.get(name, value) != value})
        if others:
            yield (
                f"rows say {name} {', '.join(others[:3])} and manifest.json says {value}; "
                f"{_MOVE_AWAY}"
            )
    policy = identity["policy"]["name"]
    strange = {str(row.get("policy")) for row in rows} - {policy}
    if others := sorted(name for name in strange if not name.startswith(f"{policy}+")):
        yield f"rows say policy {', '.join(others[:3])} and manifest.json {policy}; {_MOVE_AWAY}"


def _coverage_faults(
    path: Path, planned: set[str | int] | None, rows: Sequence[Row]
) -> Iterator[str]:
    """Samples without a good row, with two, and rows of samples that nobody planned."""
    if planned is None:
        yield f"sample_ids.json is missing, so that nobody knows what was planned; {_RUN_AGAIN}"
        return
    good = [row for row in rows if row.get("status") == "ok"]
    ok = {row["sample_id"] for row in good}
    if missing := sorted(map(str, planned - ok)):
        yield (
            f"{len(missing)} of {len(planned)} planned samples have no good row "
            f"({_some(missing)}); {_RUN_AGAIN}, which runs those alone"
        )
    if (wanted := read_status(path).get("num_planned", 0)) > len(planned):
        yield f"{wanted} samples were planned and {len(planned)} noted; {_RUN_AGAIN}"
    if stray := sorted({str(row["sample_id"]) for row in rows} - set(map(str, planned))):
        yield f"rows of samples that no command asked for ({_some(stray)}); take them out"
    # A further row of a sample is right where it was scored again.
    counts = Counter(str(row["sample_id"]) for row in good if not row.get("rescored"))
    if twice := sorted(name for name, number in counts.items() if number > 1):
        yield f"samples with two good rows ({_some(twice)}); take one of each out, or {_MOVE_AWAY}"


def _score_faults(path: Path, identity: Mapping[str, Any]) -> Iterator[str]:
    """Where what is stored does not give the stored score."""
    try:
        task = task_of(path, identity)
    except UsageError as error:
        yield f"scores cannot be checked, {error}; send the task's file as well"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stray samples have a line of their own
        rows = [row for row in read_lines(path) if row.get("status") == "ok"]
    again = _forced_again if task.is_teacher_forced else _again
    wrong = []
    for row in rows:
        for name, value in again(task, row).items():
            if not _equal(row.get(name), value):
                wrong.append(f"{row['sample_id']}: {name} {row.get(name)} stored, {value} again")
                break
    if wrong:
        yield (
            f"{len(wrong)} of {len(rows)} samples score otherwise from what is stored "
            f"({wrong[0]}); `make rescore RESULTS={path.parents[3]}`, or send the untouched rows"
        )


def _again(task: Task, row: Row) -> dict[str, Any]:
    if any(row.get(name) is None for name in NEEDED):
        return {}  # which has its line already
    return {"status": "ok", **score_of(task, row)}


def _forced_again(_: Task, row: Row) -> dict[str, Any]:
    """Logits are not stored, but what was measured at each token is."""
    found = {name: row.get(values) for name, values in _MEANS.items()}
    means = {name: sum(own) / len(own) if own else None for name, own in found.items()}
    largest = max(row.get("kl_per_token") or [], default=None)
    return {**means, "kl_max": largest}


def _equal(stored: Any, again: Any) -> bool:  # Any: JSON values
    if isinstance(stored, int | float) and isinstance(again, int | float):
        same_nan = math.isnan(stored) and math.isnan(again)
        return same_nan or math.isclose(stored, again, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == again)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def merge(results_dir: Path, into: Path) -> list[Path]:
    """Copy the cells of a sound folder that ``into`` lacks; returns where they lie now.

    Raises UsageError, and copies nothing, if one of them is there with other rows or was begun
    there with other contents.
    """
    added = []
    for path in find_cells(results_dir):
        target = into / path.relative_to(results_dir)
        if target.exists():
            if _row_set(path) != _row_set(target):
                raise UsageError(
                    f"{target} has other rows than {path}, and rows are never overwritten; nothing "
                    "was added: move one of the two away"
                )
            continue
        CellFolder(into, read_manifest(path)["identity"]).refuse_drift()
        added.append((path, target))
    for path, target in added:
        _copy_cell(path, target)
    return [target for _, target in added]


def _row_set(path: Path) -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {str(row["sample_id"]): row for row in read_lines(path)}


def _copy_cell(path: Path, target: Path) -> None:
    """Under another name first: a cell is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merging-") as temporary:
        whole = Path(temporary) / target.name
        whole.mkdir()
        for pattern in _PARTS_OF_CELLS:
            for file in path.glob(pattern):
                shutil.copyfile(file, whole / file.name)
        os.rename(whole, target)


def main() -> None:
    """Print the faults and end with 2, or say that the folder is sound, and merge it if asked."""
    parser = folder_parser(__doc__)
    parser.add_argument(
        "--into",
        type=lambda text: Path(text).expanduser(),
        metavar="FOLDER",
        help="results folder that gets the cells if all are sound",
    )
    with one_line_errors():
        given = parser.parse_args()
        found = faults(given.folder)
        for fault in found:
            print(f"fault: {fault}", file=sys.stderr)
        if found:
            nothing = "; nothing was added" if given.into else ""
            raise UsageError(
                f"{_counted(len(found), 'fault')} in {given.folder}, see above{nothing}"
            )
        cells = find_cells(given.folder)
        print(f"{given.folder}: {_counted(len(cells), 'cell')}, no fault")
        if given.into:
            added = merge(given.folder, given.into)
            print(*(f"added: {path}" for path in added), sep="\n", end="\n" if added else "")
            there = len(cells) - len(added)
            print(f"{_counted(len(added), 'cell')} added to {given.into}, {there} there before")


if __name__ == "__main__":
    main()
