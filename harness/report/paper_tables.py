"""Tables for a paper: tidy rows, comparisons, and Markdown and LaTeX of every task and model.

``python -m kvarena.harness.report.paper_tables <results_dir>`` reads all cells below the folder and
writes into its ``tables/``: rows.parquet and rows.csv (one line per sample), summary.csv and
pairs.csv (see comparison.py), and per task, model and variant one .md and one .tex, whose first
line names the LaTeX packages that it needs.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvarena.harness.analysis.comparison import (
    CONTEST,
    RIVALRY,
    compare_cells,
    compare_pairs,
    is_full_cache,
    is_rival,
)
from kvarena.harness.analysis.intervals import SIGNIFICANCE
from kvarena.harness.analysis.published import beside, with_parts
from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.report import paper_notes
from kvarena.harness.report.paper_markup import (
    DIFFERS,
    MINUS,
    MISSING,
    REFERENCE,
    TIE,
    UNBOUND,
    Grid,
    StyledText,
    latex_file,
    markdown_file,
)
from kvarena.harness.report.text_tables import storable, write_csv
from kvarena.harness.store.cell_files import find_cells
from kvarena.tasks.base import content_id


def main() -> None:
    """Write the tables of the folder that the argument names; exits with 2 on bad input."""
    on_folder(lambda folder: print(*write_tables(folder), sep="\n"), __doc__)


def write_tables(results_dir: Path) -> list[Path]:
    """Write all tables and return their paths. Raises UsageError when there are no rows."""
    rows = read_rows(find_cells(results_dir))
    if rows.empty:
        raise UsageError(f"{results_dir} has no rows under runs/; run something first (make demo)")
    # Rows from before there were parts have none.
    rows = storable(rows.assign(part=rows["part"].fillna("") if "part" in rows else ""))
    cells, folder = compare_cells(rows), results_dir / "tables"
    written = [folder / "rows.parquet"]
    with replacing(written[0]) as temporary:
        rows.to_parquet(temporary, index=False)
    frames = {
        "rows": rows,
        "summary": beside(with_parts(cells, rows)),
        "pairs": compare_pairs(rows),
    }
    written += [write_csv(frame, folder / f"{name}.csv") for name, frame in frames.items()]
    contests = dict(list(cells.groupby(CONTEST, sort=False)))
    texts = ["-".join(str(label) for label in labels if label) for labels in contests]
    for name, (labels, own) in zip(unique_names(texts), contests.items(), strict=True):
        tables = grids(own, rows[(rows[CONTEST] == list(labels)).all(axis=1)], name)
        for suffix, render in ((".md", markdown_file), (".tex", latex_file)):
            written.append(folder / f"{name}{suffix}")
            with replacing(written[-1]) as temporary:
                temporary.write_text(render(tables), encoding="utf-8")
    for stale in {*folder.glob("*.md"), *folder.glob("*.tex")} - set(written):
        stale.unlink()  # of cells that have another name now, it would look current
    return written


def unique_names(texts: Sequence[str]) -> list[str]:
    """Names of files and of LaTeX labels: letters, digits and dashes; alike in no two texts."""
    names = [_name(text) for text in texts]
    times = Counter(name.lower() for name in names)  # not every disk tells case apart
    return [
        name if times[name.lower()] == 1 else f"{name}-{content_id(text)[:4]}"
        for name, text in zip(names, texts, strict=True)
    ]


def _name(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.replace("%", " percent"))
    return "-".join(re.findall("[A-Za-z0-9]+", plain.encode("ascii", "ignore").decode())) or "table"


def grids(cells: pd.DataFrame, rows: pd.DataFrame, name: str) -> list[Grid]:
    """Scores, differences to the full cache, and per budget the scores by part if there are any.

    cells: what compare_cells gives of ``rows``, which are of one task, model and variant; name:
    how the names of the tables begin.
    """
    cells = _without_lone_winners(cells)
    evicting = ~cells["policy"].map(is_full_cache)
    budgets = list(cells.loc[evicting if evicting.any() else ~evicting, "budget"].unique())
    policies = _ranked(cells)
    counts = list(_count_notes(cells, rows))

    def grid(
        kind: str,
        what: str,
        under: list[str],
        columns: list[str],
        lines: dict[str, list[StyledText]],
        note: str,
    ) -> Grid:
        texts = [one for line in lines.values() for one in line]
        per = "budget" if columns == under else "part"
        notes = [*counts, note, *paper_notes.marks(texts, per)]
        caption = paper_notes.caption(what, cells, rows, under)
        return Grid(f"{name}-{_name(kind)}", caption, columns, lines, notes)

    scores = {policy: [_score(_line(cells, policy, one)) for one in budgets] for policy in policies}
    what, note = "Mean {} in percent of each KV cache policy on", paper_notes.intervals(cells)
    tables = [grid("score", what, budgets, budgets, scores, note)]
    if cells["difference"].notna().any():
        differences = {
            policy: [_difference(_line(cells, policy, one)) for one in budgets]
            for policy in policies
            if not is_full_cache(policy)
        }
        what = "Difference in {}, in points, between each KV cache policy and the full cache on"
        about = paper_notes.difference(cells)
        tables.append(grid("difference", what, budgets, budgets, differences, about))
    parts = {part: _of_part(rows, cells, part) for part in sorted(set(rows["part"]) - {""})}
    what = "Mean {} in percent of each KV cache policy on the parts of"
    for budget in budgets if parts else []:
        lines = {
            policy: [
                *[_score(_line(own, policy, budget), interval=False) for own in parts.values()],
                _score(_line(cells, policy, budget)),
            ]
            for policy in policies
        }
        columns = [*parts, "average"]
        tables.append(grid(f"parts {budget}", what, [budget], columns, lines, note))
    return tables


def _without_lone_winners(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells, with a best one only where at least two compete."""
    asked = cells[RIVALRY].itertuples(index=False)
    competes = pd.Series([is_rival(*cell) for cell in asked], index=cells.index)
    scored = competes & cells["score"].notna()
    rivals = scored.groupby(cells["budget"]).transform("sum")
    return cells.assign(is_best=cells["is_best"] & (rivals > 1))


def _ranked(cells: pd.DataFrame) -> list[str]:
    """Policies by their mean over budgets, best first, under the full cache."""
    means = cells.groupby("policy")["score"].mean().fillna(-1)
    return sorted(means.index, key=lambda name: (not is_full_cache(name), -means[name], name))


def _of_part(rows: pd.DataFrame, cells: pd.DataFrame, part: str) -> pd.DataFrame:
    """compare_cells of one part, without the scores of cells that lack samples of any part."""
    own = compare_cells(rows[rows["part"] == part].drop(columns="num_planned"), allow_partial=True)
    shown = cells.loc[cells["score"].notna(), ["policy", "budget"]]
    return _without_lone_winners(own.merge(shown, on=["policy", "budget"]))


def _line(cells: pd.DataFrame, policy: str, budget: str) -> Any:
    """The line of a policy at a budget, as a named tuple; None if it has no score there.

    The full cache has no budget: it is the same beside each.
    """
    budget = "full" if is_full_cache(policy) else budget
    own = cells[(cells["policy"] == policy) & (cells["budget"] == budget)]
    return next(own[own["score"].notna()].itertuples(index=False), None)


def _score(line: Any, *, interval: bool = True) -> StyledText:
    if line is None:
        return StyledText(MISSING)
    text = f"{100 * line.score:.1f}{TIE if line.ties_best else ''}{_unbound(line)}"
    if interval and not pd.isna(line.score_low):
        text += f" [{100 * line.score_low:.0f}, {100 * line.score_high:.0f}]"
    return StyledText(text, bold=line.is_best)


def _difference(line: Any) -> StyledText:
    if line is None or pd.isna(line.difference):
        return StyledText(MISSING)
    mark = DIFFERS if line.p_holm < SIGNIFICANCE else ""
    text = f"{100 * line.difference:+.1f}{mark}{_unbound(line)}"
    if not pd.isna(line.difference_low):
        text += f" [{100 * line.difference_low:+.0f}, {100 * line.difference_high:+.0f}]"
    return StyledText(text.replace("-", MINUS))


def _unbound(line: Any) -> str:
    is_unbound = line.num_compressed == 0 and not paper_notes.keeps_all(line.policy)
    return (UNBOUND if is_unbound else "") + ("" if line.bounded else REFERENCE)


def _count_notes(cells: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    if "meta_is_sample" in rows and rows["meta_is_sample"].eq(True).any():
        yield "SAMPLE DATA: these are kvarena's own rows, not the benchmark."
    shown = cells[cells["score"].notna()]
    if len(shown):
        samples = paper_notes.counted(shown["num_ok"], "sample")
        yield f"{samples} ({paper_notes.counted(shown['num_documents'], 'document')}) per score."
        yield from paper_notes.too_few(shown)
        yield from paper_notes.partly_evicted(shown)
    if rows["part"].ne("").any():
        yield "Scores over several parts are means of the parts' scores."
    for line in cells[cells["num_ok"] < cells["num_planned"]].itertuples(index=False):
        samples = "sample" if line.num_planned == 1 else "samples"
        yield f"{line.policy} at {line.budget}: {line.num_ok} of {line.num_planned} {samples}."


if __name__ == "__main__":
    main()
