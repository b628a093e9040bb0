"""Turn the tables and pictures of a run into the committed reference that the README quotes.

``python -m kvarena.harness.reference <results_dir>`` copies the needle's rows, summary and overview
to ``results/reference/`` and renews the table in ``README.md``; ``make reference`` runs all of it.
"""

import shutil
import sys
from pathlib import Path

import pandas as pd

from kvarena.harness import tables
from kvarena.harness.files import replacing

BEGIN, END = "<!-- needle table: begin -->\n", "<!-- needle table: end -->"
REPOSITORY = Path(__file__).resolve().parent.parent
TASK, MODEL = "needle", "smollm2-135m"


def main() -> None:
    """Copy and renew; the argument is the results folder of the reference run."""
    source, target = Path(sys.argv[1]), REPOSITORY / "results" / "reference"
    target.mkdir(exist_ok=True)
    for name in (f"{TASK}.csv", f"{TASK}-summary.csv"):
        shutil.copy(source / "tables" / name, target / name)
    shutil.copy(source / "plots" / TASK / MODEL / "overview.png", target / f"{TASK}.png")
    readme = REPOSITORY / "README.md"
    renewed = with_table(readme.read_text(), target / f"{TASK}-summary.csv")
    with replacing(readme) as path:
        path.write_text(renewed)


def with_table(readme: str, summary_csv: Path) -> str:
    """The README's text with the table between its marks made from the summary."""
    summary = pd.read_csv(summary_csv, dtype={"budget": str})
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + tables.markdown(summary) + END + after


if __name__ == "__main__":
    main()
