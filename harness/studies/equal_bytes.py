"""The recorded comparison at equal bytes: rows, a table and a picture.

``python -m kvarena.harness.studies.equal_bytes`` makes the tables and the picture anew from the
recorded rows, ``results/equal-bytes/equal-bytes.csv``. With a results folder as its argument it
takes the cells there, which ``make equal-bytes`` ran, and records their rows first; distances are
those of cells that force answers.
"""

import re
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.cell_labels import method_label
from kvarena.harness.analysis.comparison import CELL, compare_cells
from kvarena.harness.analysis.distances import distances
from kvarena.harness.analysis.row_frame import recorded_rows
from kvarena.harness.entry import folder_parser, one_line_errors
from kvarena.harness.report import budget_charts, text_tables
from kvarena.harness.studies import recorded_study
from kvarena.harness.studies.reference import renew_tables

NAME = "equal-bytes"
FOLDER = recorded_study.folder_of(NAME)


def main() -> None:
    """Write everything, from the cells below the folder that the argument names if there is one."""
    with one_line_errors():
        folder = folder_parser(__doc__, optional=True).parse_args().folder
        renew(_recorded() if folder is None else _rows_of_cells(folder))


def renew(rows: pd.DataFrame) -> None:
    """Write rows, summary, picture, and the table of the page beside them."""
    summary = summarise(rows)
    recorded_study.write(FOLDER, rows, summary, picture(summary))
    renew_tables([FOLDER / "README.md"], NAME, FOLDER / f"{NAME}-summary.csv")


def _recorded() -> pd.DataFrame:
    return labelled(recorded_rows(FOLDER / f"{NAME}.csv"))


def _rows_of_cells(results_dir: Path) -> pd.DataFrame:
    """Rows of generated answers; the distances of forced ones are written."""
    rows = labelled(recorded_study.rows_of_cells(results_dir, NAME))
    forced = rows["task"].str.startswith("fidelity")
    if forced.any():
        text_tables.write_csv(distances(rows[forced]), FOLDER / f"{NAME}-distances.csv")
    return rows[~forced].dropna(axis=1, how="all")


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose ``policy`` names the codec as it ran, not as it was asked for."""

    def as_run(policy: str, codec: str) -> str:
        method, at, version = policy.partition("@")
        return method_label(re.split(r"\+(?![^(]*\))", method)[0], codec) + at + version

    return rows.assign(policy=list(map(as_run, rows["policy"], rows["codec"])))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """compare_cells' lines with what the bytes were spent on: codec, bits per number, tokens."""
    good = rows[rows["status"] == "ok"].groupby(CELL)
    spent = good.agg(
        codec=("codec", "first"),
        bits_per_value=("bits_per_value", "median"),
        kept_tokens=("kept_tokens", "max"),
    )
    return compare_cells(rows).join(spent, on=CELL)


def picture(summary: pd.DataFrame) -> bytes:
    """Every method's score with its interval, by budget, beside bits and tokens, as SVG."""
    beside = {
        "bits per value": [f"{bits:.1f}" for bits in summary["bits_per_value"]],
        "tokens kept": [f"{tokens:.0f}" for tokens in summary["kept_tokens"]],
    }
    return budget_charts.score_chart(summary, "needles found (%), with 95 % intervals", beside)


if __name__ == "__main__":
    main()
