"""What a command shows when its cells are done: a table, tidy CSV files and pictures."""

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.by_turn import has_turns, score_by_turn, turn_table
from kvarena.harness.analysis.comparison import CELL, compare_cells
from kvarena.harness.analysis.distances import are_forced, distances, score_name, with_kl
from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.files import file_name
from kvarena.harness.registry import choices, load_choice
from kvarena.harness.report import needle_maps, text_tables, turn_charts


def report(
    wanted: Mapping[Path, Collection[str]], results_dir: Path, *, allow_partial: bool = False
) -> list[Path]:
    """Print one table per task; write its rows, its summary and its pictures. Returns the files.

    wanted: ids of the command's samples by cell; what else the cells hold does not count.
    """
    rows = read_rows(wanted, only=wanted)
    if rows.empty:
        return []
    written: list[Path] = []
    for task, task_rows in rows.groupby("task"):
        tables = summaries(str(task), task_rows, allow_partial=allow_partial)
        text_tables.print_summary(tables["summary"])
        if "meta_is_sample" in task_rows and task_rows["meta_is_sample"].eq(True).any():
            print(f"SAMPLE DATA: these rows are kvarena's own, not the {task} benchmark.")
        written.append(text_tables.write_csv(task_rows, results_dir / "tables" / f"{task}.csv"))
        for name, table in tables.items():
            written.append(
                text_tables.write_csv(table, results_dir / "tables" / f"{task}-{name}.csv")
            )
        for (model, variant), some in task_rows.groupby(["model", "variant"]):
            folder = results_dir / "plots" / str(task) / file_name(str(model))
            folder = folder / file_name(str(variant)) if variant else folder
            written += [*_pictures(some, folder), *_turns(some, tables["summary"], folder)]
    return written


def summaries(
    task: str, rows: pd.DataFrame, *, allow_partial: bool = False
) -> dict[str, pd.DataFrame]:
    """``summary`` compares the task's cells; ``turns``, where there are some, and the task's own.

    All but the first are of cells that may show a score, so that no average hides what is missing.
    """
    summary = with_kl(compare_cells(rows, allow_partial=allow_partial), rows)
    scored = rows.merge(summary.loc[summary["score"].notna(), CELL], on=CELL)
    turns = {"turns": turn_table(rows, summary)} if has_turns(scored) else {}
    return {"summary": summary, **turns, **own_summaries(task, scored)}


def own_summaries(task: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What the task itself makes of its rows; of forced answers, how far the policy moves.

    rows: of cells that may show a score, so that no average hides what is missing.
    """
    if are_forced(rows):
        return {"distances": distances(rows)}
    if rows.empty or task not in choices("task"):  # a name that options gave: needle-2of3
        return {}
    module_name, _, class_name = load_choice("task", task)["_target_"].rpartition(".")
    summaries = getattr(import_module(module_name), class_name).summaries
    tables_by_variant = {str(variant): summaries(some) for variant, some in rows.groupby("variant")}
    names = next(iter(tables_by_variant.values()))
    return {
        name: pd.concat(
            [found[name].assign(variant=variant) for variant, found in tables_by_variant.items()],
            ignore_index=True,
        )
        for name in names
    }


def _pictures(rows: pd.DataFrame, folder: Path) -> Iterator[Path]:
    """Grids for rows that carry a depth and a length; rows are of one task, model and variant.

    None where no sample at all has a score.
    """
    if not {needle_maps.LENGTH, needle_maps.DEPTH, "score"} <= set(rows.columns):
        return
    yield needle_maps.needle_overview(rows, folder / "overview.png")
    for (policy, budget), cell_rows in rows.groupby(["policy", "budget"]):
        name = file_name(f"{policy}-{budget}")
        yield needle_maps.needle_heatmap(cell_rows, folder / f"{name}.png")


def _turns(rows: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> Iterator[Path]:
    """Score by turn, of rows as for _pictures; nothing where no cell with a score has turns."""
    scores = score_by_turn(rows, summary) if has_turns(rows) else pd.DataFrame()
    if not scores.empty:
        ylabel = f"{score_name(rows)} (%)"
        yield turn_charts.turn_picture(scores, ylabel, folder / "turns.png")
