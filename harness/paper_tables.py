"""Tables for a paper: tidy rows, comparisons, and Markdown and LaTeX of every task and model.

``python -m kvarena.harness.paper_tables <results_dir>`` reads all cells below the folder and
writes into its ``tables/``: rows.parquet and rows.csv (one line per sample), summary.csv and
pairs.csv (see comparison.py), and per task, model and variant one .md and one .tex (booktabs, and
graphicx for wide tables).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kvarena.harness import table_notes
from kvarena.harness.comparison import SECTION, compare_cells, compare_pairs, is_full_cache
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.files import file_name, replacing
from kvarena.harness.published import beside, with_parts
from kvarena.harness.results import find_cells
from kvarena.harness.rows import read_rows
from kvarena.harness.statistics import SIGNIFICANCE
from kvarena.harness.table_notes import AT_LEAST, DIFFERS, TIE
from kvarena.harness.tables import storable, write_csv

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    AT_LEAST: r"$\geq$",
    MINUS: "$-$",
    MISSING: "--",
    TIE: r"$^{\dagger}$",
    DIFFERS: "$^{*}$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
_WIDE = 6  # columns of numbers that fit the width of a page


class Entry(NamedTuple):
    """What a place of a table says, as plain text."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """One table as plain text. lines: policy -> its entries, one for each of ``columns``."""

    name: str
    caption: str
    columns: list[str]
    lines: dict[str, list[Entry]]
    notes: list[str]


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
    for labels, own in cells.groupby(SECTION, sort=False):
        tables = grids(own, rows[(rows[SECTION] == list(labels)).all(axis=1)])
        stem = file_name("-".join(str(label) for label in labels if label))
        for suffix, render in ((".md", to_markdown), (".tex", to_latex)):
            written.append(folder / f"{stem}{suffix}")
            with replacing(written[-1]) as temporary:
                temporary.write_text("\n".join(map(render, tables)), encoding="utf-8")
    for stale in {*folder.glob("*.md"), *folder.glob("*.tex")} - set(written):
        stale.unlink()  # of cells that have another name now, it would look current
    return written


def grids(cells: pd.DataFrame, rows: pd.DataFrame) -> list[Grid]:
    """Scores, differences to the full cache, and per budget the scores by part if there are any.

    cells: what compare_cells gives of ``rows``, which are of one task, model and variant.
    """
    place = ", ".join(str(label) for label in cells.iloc[0][SECTION] if label)
    evicting = ~cells["policy"].map(is_full_cache)
    budgets = list(cells.loc[evicting if evicting.any() else ~evicting, "budget"].unique())
    policies = _ranked(cells)
    counts = list(_count_notes(cells, rows))
    all_parts = sorted(set(rows["part"]) - {""})

    def grid(
        kind: str, caption: str, columns: list[str], lines: dict[str, list[Entry]], *notes: str
    ) -> Grid:
        # A LaTeX label must not hold a comment sign and the like.
        name = re.sub("[^A-Za-z0-9]+", "-", f"{place} {kind}".replace("%", " percent"))
        return Grid(name, f"{caption} on {place}.", columns, lines, [*counts, *notes])

    scores = {policy: [_score(_line(cells, policy, one)) for one in budgets] for policy in policies}
    tables = [
        grid(
            "score",
            "Score in %, by KV cache budget,",
            budgets,
            scores,
            table_notes.intervals(cells),
            table_notes.bold("budget"),
        )
    ]
    if cells["difference"].notna().any():
        differences = {
            policy: [_difference(_line(cells, policy, one)) for one in budgets]
            for policy in policies
            if not is_full_cache(policy)
        }
        caption = "Score minus that of the full cache, in points, by KV cache budget,"
        note = table_notes.difference(cells)
        tables.append(grid("difference", caption, budgets, differences, note))
    parts = {part: _of_part(rows, cells, part) for part in all_parts}
    for budget in budgets if parts else []:
        lines = {
            policy: [
                *[_score(_line(own, policy, budget), interval=False) for own in parts.values()],
                _score(_line(cells, policy, budget)),
            ]
            for policy in policies
        }
        caption = f"Score in % by part at a KV cache budget of {budget}"
        footnotes = (table_notes.intervals(cells), table_notes.bold("part"))
        tables.append(grid(f"parts {budget}", caption, [*parts, "average"], lines, *footnotes))
    return tables


def _ranked(cells: pd.DataFrame) -> list[str]:
    """Policies by their mean over budgets, best first, under the full cache."""
    means = cells.groupby("policy")["score"].mean().fillna(-1)
    return sorted(means.index, key=lambda name: (not is_full_cache(name), -means[name], name))


def _of_part(rows: pd.DataFrame, cells: pd.DataFrame, part: str) -> pd.DataFrame:
    """compare_cells of one part, without the scores of cells that lack samples of any part."""
    own = compare_cells(rows[rows["part"] == part].drop(columns="num_planned"), allow_partial=True)
    shown = cells.loc[cells["score"].notna(), ["policy", "budget"]]
    return own.merge(shown, on=["policy", "budget"])


def _line(cells: pd.DataFrame, policy: str, budget: str) -> Any:
    """The line of a policy at a budget, as a named tuple; None if it has no score there.

    The full cache has no budget: it is the same beside each.
    """
    budget = "full" if is_full_cache(policy) else budget
    own = cells[(cells["policy"] == policy) & (cells["budget"] == budget)]
    return next(own[own["score"].notna()].itertuples(index=False), None)


def _score(line: Any, *, interval: bool = True) -> Entry:
    if line is None:
        return Entry(MISSING)
    text = f"{100 * line.score:.1f}{TIE if line.ties_best else ''}"
    if interval and not pd.isna(line.score_low):
        text += f" [{100 * line.score_low:.0f}, {100 * line.score_high:.0f}]"
    return Entry(text, bold=line.is_best)


def _difference(line: Any) -> Entry:
    if line is None or pd.isna(line.difference):
        return Entry(MISSING)
    text = f"{100 * line.difference:+.1f}{DIFFERS if line.p_holm < SIGNIFICANCE else ''}"
    if not pd.isna(line.difference_low):
        text += f" [{100 * line.difference_low:+.0f}, {100 * line.difference_high:+.0f}]"
    return Entry(text.replace("-", MINUS))


def _count_notes(cells: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    if "meta_is_sample" in rows and rows["meta_is_sample"].eq(True).any():
        yield "SAMPLE DATA: these are kvarena's own rows, not the benchmark."
    shown = cells[cells["score"].notna()]
    if len(shown):
        documents = table_notes.span(shown["num_documents"])
        yield f"n = {table_notes.span(shown['num_ok'])} samples ({documents} documents) per score."
    if rows["part"].ne("").any():
        yield "Scores over several parts are means of the parts' scores."
    for line in cells[cells["num_ok"] < cells["num_planned"]].itertuples(index=False):
        yield f"{line.policy} at {line.budget}: {line.num_ok} of {line.num_planned} samples."


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def to_markdown(grid: Grid) -> str:
    """A caption, a GitHub table and the notes."""

    def entry(one: Entry) -> str:
        text = escape_markdown(one.text)
        return f"**{text}**" if one.bold else text

    header = ["policy", *map(escape_markdown, grid.columns)]
    lines = [header, ["---", *["---:"] * len(grid.columns)]]
    lines += [[escape_markdown(name), *map(entry, entries)] for name, entries in grid.lines.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = escape_markdown(" ".join(grid.notes))
    return f"**{escape_markdown(grid.caption)}**\n\n{table}\n\n{notes}\n"


def to_latex(grid: Grid) -> str:
    """A table environment; the document loads booktabs, and graphicx for wide tables."""

    def entry(one: Entry) -> str:
        text = escape_latex(one.text)
        return rf"\textbf{{{text}}}" if one.bold else text

    def line(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\"

    lines = [
        line([escape_latex(name), *map(entry, entries)]) for name, entries in grid.lines.items()
    ]
    if len(lines) > 1 and is_full_cache(next(iter(grid.lines))):
        lines.insert(1, r"\midrule")
    wide = len(grid.columns) > _WIDE
    texts = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(grid.caption)}}}",
        rf"\label{{tab:{grid.name}}}",
        *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
        r"\toprule",
        line(["policy", *map(escape_latex, grid.columns)]),
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}" + ("}" if wide else ""),
        r"\par\smallskip",
        rf"\parbox{{\linewidth}}{{\footnotesize {escape_latex(' '.join(grid.notes))}}}",
        r"\end{table}",
        "",
    ]
    return "\n".join(texts)


if __name__ == "__main__":
    main()
