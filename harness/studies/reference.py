"""The reference runs that pages of the repository quote: their rows, summaries, tables and picture.

``python -m kvarena.harness.studies.reference`` makes summaries, tables and the picture anew from
the recorded rows in ``results/reference/``. With a results folder and tasks as its arguments it
records the rows of those tasks first, from the folder's last commands; the ``make reference``
targets run all of it. Texts of benchmarks stay out of the repository: rows are recorded without
questions' answers and without what the model wrote.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kvarena.harness.analysis.row_frame import recorded_rows, without_texts
from kvarena.harness.entry import folder_parser, one_line_errors
from kvarena.harness.files import replacing
from kvarena.harness.report import needle_maps, text_tables
from kvarena.harness.report.after_run import summaries

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = REPOSITORY / "results" / "reference"
PAGES = (REPOSITORY / "README.md", REFERENCE / "README.md")


def main() -> None:
    """The arguments are the results folder of the run and names of tasks, or nothing."""
    with one_line_errors():
        parser = folder_parser(__doc__, optional=True)
        parser.add_argument("tasks", nargs="*")
        given = parser.parse_args()
        if given.folder is not None and not given.tasks:
            parser.error("name the tasks whose rows are to be recorded")
        for task in given.tasks:
            rows = recorded_rows(given.folder / "tables" / f"{task}.csv")
            text_tables.write_csv(without_texts(rows), REFERENCE / f"{task}.csv")
        for task in given.tasks or recorded_tasks():
            renew(task)


def recorded_tasks() -> list[str]:
    """Tasks whose rows are in results/reference; summaries lie beside them."""
    found = sorted(path.stem for path in REFERENCE.glob("*.csv"))
    return [task for task in found if f"{task}-summary" in found]


def renew(task: str) -> None:
    """Make summaries, picture and tables of one task anew from its recorded rows."""
    rows = recorded_rows(REFERENCE / f"{task}.csv")
    for name, table in summaries(task, rows).items():
        text_tables.write_csv(table, REFERENCE / f"{task}-{name}.csv")
    if {needle_maps.LENGTH, needle_maps.DEPTH} <= set(rows.columns):
        needle_maps.needle_overview(rows, REFERENCE / f"{task}.png")
    renew_tables(PAGES, task, REFERENCE / f"{task}-summary.csv")


def renew_tables(pages: Iterable[Path], task: str, summary_csv: Path) -> None:
    """Make the task's table anew in those pages that have its marks."""
    for page in pages:
        renewed = with_table(page.read_text(), task, summary_csv)
        with replacing(page) as path:
            path.write_text(renewed)


def with_table(text: str, task: str, summary_csv: Path) -> str:
    """The page with the table between the task's marks made anew; unchanged without marks."""
    if f"<!-- {task} table: begin -->\n" not in text:
        return text
    summary = pd.read_csv(summary_csv, dtype={"budget": str})
    return between_marks(text, task, text_tables.markdown(summary))


def between_marks(text: str, name: str, table: str) -> str:
    """The page with ``table`` in place of what stands between the marks of that name."""
    begin, end = f"<!-- {name} table: begin -->\n", f"<!-- {name} table: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + table + end + after


if __name__ == "__main__":
    main()
