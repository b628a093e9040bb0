"""The recorded comparison at equal bytes: rows, a table and the Pareto picture.

``python -m kvarena.harness.equal_bytes <results_dir>`` turns the cells of ``make equal-bytes`` into
``results/equal-bytes/equal-bytes*`` (its distances from cells that force answers) and renews the
README's table.
"""

from pathlib import Path

import pandas as pd

from kvarena.harness import charts, tables
from kvarena.harness.comparison import CELL, compare_cells
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.reference import REPOSITORY, with_table, without_texts
from kvarena.harness.report import own_summaries
from kvarena.harness.results import find_cells
from kvarena.harness.rows import read_rows

NAME = "equal-bytes"
_MEASURES = ["bits_per_value", "compression_ratio", "budget_tokens"]


def main() -> None:
    """The argument is the results folder of the runs."""
    on_folder(renew, __doc__)


def renew(results_dir: Path) -> None:
    """Write everything from the cells below the folder. Raises UsageError where there are none."""
    rows = read_rows(sorted(find_cells(results_dir)))
    if rows.empty:
        raise UsageError(f"no cells in {results_dir}; make equal-bytes runs them")
    target = REPOSITORY / "results" / NAME
    is_forced = rows["task"].str.startswith("fidelity")
    if is_forced.any():
        distances = own_summaries(str(rows["task"][is_forced].iloc[0]), rows[is_forced])
        tables.write_csv(distances["distances"], target / f"{NAME}-distances.csv")
    rows = rows[~is_forced].dropna(axis=1, how="all")
    summary = summarise(rows)
    tables.write_csv(without_texts(rows), target / f"{NAME}.csv")
    tables.write_csv(summary, target / f"{NAME}-summary.csv")
    with replacing(target / f"{NAME}.svg") as path:
        path.write_bytes(charts.memory_chart(summary, "needle score (%)"))
    readme = REPOSITORY / "README.md"
    renewed = with_table(readme.read_text(), NAME, target / f"{NAME}-summary.csv")
    with replacing(readme) as path:
        path.write_text(renewed)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per cell: scores with intervals, sizes, and what the bytes were spent on."""
    summary = compare_cells(rows)
    good = rows[rows["status"] == "ok"]
    wanted = dict.fromkeys(_MEASURES, "median") | {"codec": "first"}
    spent = good.groupby(CELL, dropna=False).agg(wanted).reset_index()
    return summary.merge(spent, on=CELL)


if __name__ == "__main__":
    main()
