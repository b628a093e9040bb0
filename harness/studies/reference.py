"""Turn the tables and pictures of a run into the committed reference that the README quotes.

``python -m kvarena.harness.studies.reference <results_dir> <task> ...`` copies each task's rows and
summaries to ``results/reference/`` and renews its table in ``README.md``; the ``make reference``
targets run all of it. Texts of benchmarks stay out of the repository: rows are copied without
questions' answers and without what the model wrote.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kvarena.harness.entry import folder_parser, one_line_errors
from kvarena.harness.files import replacing
from kvarena.harness.report import text_tables

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
_TEXTS = ("prediction", "reference", "references", "meta_all_classes")


def main() -> None:
    """The arguments are the results folder of the run and names of tasks."""
    with one_line_errors():
        parser = folder_parser(__doc__)
        parser.add_argument("tasks", nargs="+")
        given = parser.parse_args()
        renew(given.folder, given.tasks)


def renew(source: Path, tasks: Sequence[str]) -> None:
    """Copy each task's tables from a results folder, and renew the README."""
    target = REPOSITORY / "results" / "reference"
    target.mkdir(exist_ok=True)
    for task in tasks:
        rows = pd.read_csv(source / "tables" / f"{task}.csv", dtype={"budget": str})
        text_tables.write_csv(without_texts(rows), target / f"{task}.csv")
        for summary in (source / "tables").glob(f"{task}-*.csv"):
            shutil.copy(summary, target / summary.name)
        overview = source / "plots" / task / MODEL / "overview.png"
        if overview.exists():
            shutil.copy(overview, target / f"{task}.png")
        readme = REPOSITORY / "README.md"
        renewed = with_table(readme.read_text(), task, target / f"{task}-summary.csv")
        with replacing(readme) as path:
            path.write_text(renewed)


def without_texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without benchmark texts, model texts and the long lists per token."""
    lists = [name for name in rows.columns if name.endswith(("_per_token", "_by_layer_head"))]
    return rows.drop(columns=[name for name in [*_TEXTS, *lists] if name in rows.columns])


def with_table(readme: str, task: str, summary_csv: Path) -> str:
    """The README with the table between the task's marks made anew; unchanged without marks."""
    begin, end = f"<!-- {task} table: begin -->\n", f"<!-- {task} table: end -->"
    if begin not in readme:
        return readme
    summary = pd.read_csv(summary_csv, dtype={"budget": str})
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return before + begin + text_tables.markdown(summary) + end + after


if __name__ == "__main__":
    main()
