"""What every recorded study leaves in its folder: rows, summary, picture and the page's table."""

from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.row_frame import read_rows, recorded_rows
from kvarena.harness.entry import folder_parser
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.report import text_tables
from kvarena.harness.store.cell_files import find_cells
from kvarena.harness.studies.reference import REPOSITORY, between_marks, without_texts


def folder_of(name: str) -> Path:
    """Where the study of that name is recorded."""
    return REPOSITORY / "results" / name


def rows_to_record(name: str, about: str) -> pd.DataFrame:
    """The rows of the cells below the folder that is typed, else the recorded ones.

    about: the text of --help. Raises UsageError for a folder without rows.
    """
    folder = folder_parser(about, optional=True).parse_args().folder
    if folder is None:
        return recorded_rows(folder_of(name) / f"{name}.csv")
    rows = read_rows(find_cells(folder))
    if rows.empty:
        raise UsageError(f"{folder} has no rows under runs/; run make {name} first")
    return rows


def write(name: str, rows: pd.DataFrame, summary: pd.DataFrame, table: str, svg: bytes) -> None:
    """Everything but the page's own words."""
    folder = folder_of(name)
    text_tables.write_csv(without_texts(rows), folder / f"{name}.csv")
    text_tables.write_csv(summary, folder / f"{name}-summary.csv")
    with replacing(folder / f"{name}.svg") as path:
        path.write_bytes(svg)
    write_table(folder / "README.md", name, table)


def write_table(page: Path, name: str, table: str) -> None:
    """Put the table between the page's marks of that name."""
    renewed = between_marks(page.read_text(encoding="utf-8"), name, table)
    with replacing(page) as path:
        path.write_text(renewed)
