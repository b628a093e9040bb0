"""Score stored answers again: no model, no tokenizer, no data.

``python -m kvarena.harness.cells.rescore <results_dir>``; ``make rescore``. Nothing is overwritten:
an answer whose scores change gets a further row, and the last row of a sample is the one that
counts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvarena.harness.cells.sample_rows import score
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.provenance import commit_label, now
from kvarena.harness.registry import build
from kvarena.harness.store.cell_files import find_cells, read_manifest
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.tasks.base import Sample, Task

_SCORABLE = ("ok", "score_error")
NEEDED = ("references", "document", "part", "prediction", "finish_reason")


def rescore_cell(path: Path) -> tuple[int, int]:
    """How many answers of one cell were scored, and how many of them came out differently.

    Raises UsageError for a cell whose answers are forced: what it measured is not stored.
    """
    identity = read_manifest(path)["identity"]
    task = task_of(path, identity)
    if task.is_teacher_forced:
        raise UsageError(f"{path}: {task.name} measures logits, which are not stored; run it again")
    folder = CellFolder(path.parents[3], {k: v for k, v in identity.items() if k != "schema"})
    if folder.path != path:
        raise UsageError(f"{path} was written by another version of kvarena; run it again")
    num_scored = num_changed = 0
    # status.json stays as it is: how many samples were asked for is not a matter of scores.
    with folder.claimed():
        for row in folder.rows():
            if row.get("status") not in _SCORABLE:
                continue
            missing = [name for name in NEEDED if row.get(name) is None]
            if missing:
                raise UsageError(
                    f"{path}: sample {row['sample_id']} has no {', '.join(missing)}; move the "
                    "folder away to run the cell again"
                )
            num_scored += 1
            found = {"status": "ok", **score_of(task, row)}
            if found["status"] != "ok" and row["status"] == "ok":
                print(f"{path}: {row['sample_id']} keeps its score, {found['error']}")
                continue
            if any(row.get(name) != value for name, value in found.items()):
                kept = {
                    name: value for name, value in row.items() if name not in ("error", "score")
                }
                stamp = {"task_version": task.version, "rescored": now(), "commit": commit_label()}
                folder.append(kept | found | stamp)
                num_changed += 1
    return num_scored, num_changed


def task_of(path: Path, identity: Mapping[str, Any]) -> Task:
    """The task of a cell as its manifest has it. Raises UsageError for one that is not here."""
    settings = {k: v for k, v in identity["task"].items() if k not in ("name", "version")}
    try:
        task = build(settings)
    except (KeyError, UsageError) as error:
        raise UsageError(f"{path} is of a task that cannot be built here: {error}") from error
    if not isinstance(task, Task):
        raise UsageError(f"{path} is of a task that cannot be built here: {type(task).__name__}")
    return task


def score_of(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the task's metrics say of a stored answer; of a row that has all of NEEDED."""
    sample = Sample(
        id=row["sample_id"],
        prompt_token_ids=(),
        references=tuple(row["references"]),
        max_new_tokens=0,
        document=row["document"],
        part=row["part"],
        meta={k.removeprefix("meta_"): v for k, v in row.items() if k.startswith("meta_")},
    )
    return score(task, sample, row["prediction"], finished=row["finish_reason"] == "stop")


def main() -> None:
    """The argument is a results folder; cells of forced answers are named and passed over."""
    on_folder(rescore, __doc__)


def rescore(results_dir: Path) -> None:
    """All cells of a folder. Raises UsageError where there are none, or nothing can be written."""
    cells = find_cells(results_dir)
    if not cells:
        raise UsageError(f"no cells in {results_dir}; run something first")
    if not os.access(cells[0], os.W_OK):
        raise UsageError(f"{results_dir} cannot be written, and new scores go there; copy it first")
    for path in cells:
        try:
            num_scored, num_changed = rescore_cell(path)
            print(f"{path}: {num_scored} answers scored, {num_changed} came out differently")
        except UsageError as error:
            print(f"left alone: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
