"""What every recorded study does: take its rows, pair its cells, and leave its files in its folder.

The folder bears the study's name, ``results/NAME``, and holds NAME.csv, NAME-summary.csv, NAME.svg
and a page.
"""

from collections.abc import Hashable
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.intervals import Difference, paired_difference
from kvarena.harness.analysis.row_frame import read_rows, recorded_rows, without_texts
from kvarena.harness.entry import folder_parser
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.report import text_tables
from kvarena.harness.store.cell_files import find_cells
from kvarena.harness.studies.reference import REPOSITORY, between_marks


def folder_of(name: str) -> Path:
    """Where the study of that name is recorded."""
    return REPOSITORY / "results" / name


def rows_to_record(folder: Path, about: str) -> pd.DataFrame:
    """The rows of the cells below the folder that is typed, else those recorded in ``folder``.

    about: the text of --help. Raises UsageError as rows_of_cells.
    """
    typed = folder_parser(about, optional=True).parse_args().folder
    if typed is None:
        return recorded_rows(folder / f"{folder.name}.csv")
    return rows_of_cells(typed, folder.name)


def rows_of_cells(results_dir: Path, name: str) -> pd.DataFrame:
    """The rows that ``make NAME`` left there. Raises UsageError if there are none."""
    rows = read_rows(find_cells(results_dir))
    if rows.empty:
        raise UsageError(f"{results_dir} has no rows under runs/; run make {name} first")
    return rows


def complete_cells(
    rows: pd.DataFrame, names: list[str]
) -> dict[tuple[Hashable, ...], pd.DataFrame]:
    """By the columns ``names``, the good rows of every cell of which no sample is missing."""
    good = rows[rows["status"] == "ok"]
    is_complete = good.groupby(names)["sample_id"].transform("nunique") == good["num_planned"]
    return dict(list(good[is_complete].groupby(names)))


def difference(one: pd.DataFrame, other: pd.DataFrame, measure: str) -> Difference:
    """A measure of one cell less that of the other, on the samples that both have."""
    both = one.merge(other, on="sample_id", suffixes=("", "_other"), validate="1:1")
    return paired_difference(both[measure], both[f"{measure}_other"], both["document"])


def with_limits(name: str, found: Difference) -> dict[str, float]:
    """The columns of a difference: its mean and the ends of its interval."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def write(folder: Path, rows: pd.DataFrame, summary: pd.DataFrame, svg: bytes) -> None:
    """Rows, summary and picture, beside the page."""
    text_tables.write_csv(without_texts(rows), folder / f"{folder.name}.csv")
    text_tables.write_csv(summary, folder / f"{folder.name}-summary.csv")
    with replacing(folder / f"{folder.name}.svg") as path:
        path.write_bytes(svg)


def write_table(page: Path, name: str, table: str) -> None:
    """Put the table between the page's marks of that name."""
    renewed = between_marks(page.read_text(encoding="utf-8"), name, table)
    with replacing(page) as path:
        path.write_text(renewed)
