"""One self-contained HTML page of all cells: charts, tables, example answers and what ran.

``python -m kvarena.harness.report.html_page <results_dir>`` writes ``<results_dir>/report.html``.
The page loads nothing, pictures are inside; the same cells give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kvarena.harness.analysis.by_turn import has_turns, turn_table
from kvarena.harness.analysis.comparison import CONTEST, compare_cells
from kvarena.harness.analysis.distances import are_forced, score_name, with_kl
from kvarena.harness.analysis.published import beside, with_parts
from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.budget import parse_budget
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.report.html_pictures import length_heatmaps, section_pictures
from kvarena.harness.report.html_provenance import describe_cells
from kvarena.harness.report.html_tables import (
    coverage_warnings,
    examples,
    findings,
    table_columns,
    turn_columns,
)
from kvarena.harness.report.text_tables import counted, evictions, marks_in_words
from kvarena.harness.report.turn_charts import how_asked
from kvarena.harness.store.cell_files import find_cells


def main() -> None:
    """Write the page of the folder that the argument names; exits with 2 on bad input."""
    on_folder(lambda folder: print(write_report(folder)), __doc__)


def write_report(results_dir: Path) -> Path:
    """Write the page and return its path. Raises UsageError when there is nothing to show."""
    cell_paths = find_cells(results_dir)
    rows = read_rows(cell_paths)
    if rows.empty:
        raise UsageError(f"{results_dir} has no rows under runs/; run something first (make demo)")
    started = {path.parent for path in (results_dir / "runs").glob("*/*/*/manifest.json")}
    empty = sorted(f"{path.parent.name}/{path.name}" for path in started - set(cell_paths))
    cells = beside(with_parts(with_kl(compare_cells(rows), rows), rows))
    page = render(rows, cells, describe_cells(cell_paths), empty)
    path = results_dir / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(
    rows: pd.DataFrame,
    cells: pd.DataFrame,
    provenance: dict[str, Any],
    empty_cells: Sequence[str] = (),
) -> str:
    """The page as text.

    rows: one line per sample; cells: compare_cells(rows), with their KL and published figures;
    provenance: describe_cells(folders); empty_cells: cells that were begun and have no rows.
    """
    keys = cells[CONTEST].drop_duplicates().sort_values(CONTEST).itertuples(index=False)
    sections = [
        _section(f"section-{number}", key, _of(rows, key), _of(cells, key))
        for number, key in enumerate(keys, start=1)
    ]
    warnings = [f"{one['title']}: {text}" for one in sections for text in one["incomplete"]]
    return template("page.html.j2").render(
        num_cells=counted(len(cells), "cell"),
        num_rows=counted(len(rows), "sample"),
        sections=sections,
        sample_tasks=sorted({one["task"] for one in sections if one["is_sample"]}),
        warnings=warnings + [f"{name}: begun, no samples yet" for name in empty_cells],
        provenance=provenance,
    )


def template(name: str) -> jinja2.Template:
    """A template of report_page/, whose values are escaped and of which none may be missing."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "report_page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    ).get_template(name)


def _section(
    anchor: str, key: Sequence[str], rows: pd.DataFrame, cells: pd.DataFrame
) -> dict[str, Any]:
    """What the template shows of one task, model and variant."""
    task, model, variant = key
    columns = table_columns(cells)
    turns = turn_table(rows, cells) if has_turns(rows) else pd.DataFrame()
    return {
        "anchor": anchor,
        "task": task,
        "title": f"{task}, {model}" + (f" ({variant})" if variant else ""),
        "is_sample": "meta_is_sample" in rows and rows["meta_is_sample"].eq(True).any(),
        "incomplete": list(coverage_warnings(rows, cells)),
        "findings": findings(cells),
        "pictures": list(section_pictures(rows, cells)),
        "heatmaps": list(length_heatmaps(rows, cells)),
        "score": score_name(cells),
        "longest_name": cells["policy"].str.len().max(),
        "columns": columns,
        "marks": marks_in_words(evictions(cells)),
        "how_asked": "" if turns.empty else how_asked(turns),
        "turn_columns": [] if turns.empty else turn_columns(turns),
        # Forced answers are the full cache's own, whatever the policy.
        "examples": [] if are_forced(rows) else examples(rows),
    }


def _of(frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The lines of one task, model and variant, smallest budget first, else in their order."""
    own = frame[(frame[CONTEST] == list(key)).all(axis=1)]
    rank = own["budget"].map(lambda label: parse_budget(label).sort_key)
    return own.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


if __name__ == "__main__":
    main()
