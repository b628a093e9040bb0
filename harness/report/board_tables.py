"""What a page of the board shows of its cells: the report's columns, and where numbers come from.

Each line has what the page's filters ask for, a link to the file of its rows, and the command.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kvarena.harness.analysis.comparison import CELL, Line
from kvarena.harness.analysis.distances import score_name
from kvarena.harness.budget import parse_budget
from kvarena.harness.files import file_name
from kvarena.harness.report.html_tables import SortedText, TableColumn, table_columns
from kvarena.harness.report.text_tables import counted
from kvarena.tasks.base import content_id

NOT_RECORDED = "-"
# What each filter is called, by the attribute data-NAME of a line.
FILTERS = {
    "study": "study",
    "variant": "settings",
    "policy": "policy",
    "protect": "protection",
    "shape": "shape",
    "codec": "codec",
    "budget": "budget",
    "front": "Pareto front",
}


@dataclass(frozen=True)
class Filter:
    """One choice above a table: its attribute, its name, and the values that lines have."""

    name: str
    label: str
    values: list[str]


def link_name(*texts: str) -> str:
    """A name of a file that a link can hold as it is; other texts give other names."""
    text = "--".join(filter(None, texts))
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", file_name(text)).strip("_.")
    return plain if plain == text else f"{plain}-{content_id(*texts)[:8]}"


def origins(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``cells`` with what their rows say of them: protect, shape, codec, commit, run_ids, num_rows.

    Both of one study. Several values stand with commas; NOT_RECORDED is what rows lack.
    """
    names = {"protect": "protect", "shape": "shape", "codec_used": "codec", "commit": "commit"}
    own = rows.assign(
        variant=rows["variant"].fillna(""),
        **{new: _texts(rows, name) for new, name in names.items()},
    )
    own["codec_used"] = own["codec_used"].str.replace(r"[(\[].*", "", regex=True)
    own["commit"] = own["commit"].str.replace(r"\+$", " + changes", regex=True)
    groups = own.groupby(CELL)
    told = {name: groups[name].agg(_joined) for name in names}
    told |= {"run_ids": groups["run_id"].unique(), "num_rows": groups.size()}
    return cells.join(pd.DataFrame(told), on=CELL)


def _texts(rows: pd.DataFrame, name: str) -> pd.Series:
    if name not in rows:
        return pd.Series(NOT_RECORDED, index=rows.index)
    return rows[name].astype(object).where(rows[name].notna(), NOT_RECORDED).astype(str)


def _joined(values: pd.Series) -> str:
    return ", ".join(sorted(values.unique()))


def line_data(cells: pd.DataFrame) -> list[dict[str, str]]:
    """By line, the values that FILTERS ask for."""
    return [
        {
            "study": line["study"],
            "variant": line["variant"],
            "policy": re.split(r"[(@+]", line["policy"])[0],
            "protect": line["protect"],
            "shape": line["shape"],
            "codec": line["codec_used"],
            "budget": line["budget"],
            "front": "on it" if line["on_front"] else "beaten",
        }
        for line in cells.to_dict("records")
    ]


def filters(data: Sequence[dict[str, str]]) -> list[Filter]:
    """Those of which the lines have at least two values, budgets from small to large."""
    found = []
    for name, label in FILTERS.items():
        values = sorted({line[name] for line in data})
        if name == "budget":
            values.sort(key=lambda budget: parse_budget(budget).sort_key)
        if len(values) > 1:
            found.append(Filter(name, label, values))
    return found


def board_columns(cells: pd.DataFrame, command_names: Sequence[str]) -> list[TableColumn]:
    """The columns of a page's table.

    cells: with ``study``, ``rows_file`` and ``on_front``, and as origins gives them;
    command_names: what stands for each line's command, C1 for the place #C1 of the page.
    """
    lines = cells.to_dict("records")
    policy, budget, score, *rest = table_columns(cells)
    links = [line["rows_file"] for line in lines]
    score = _with_links(score, links)
    front = TableColumn(
        "Pareto front",
        "Pareto front: no other cell of the study in bounded memory reaches its "
        f"{score_name(cells)} in as few bytes kept and betters one of the two.",
        [SortedText("yes", 0) if line["on_front"] else SortedText("", "") for line in lines],
    )
    rows = TableColumn(
        "rows",
        "Rows: all numbers of a line come from the rows of its file, one a sample.",
        [
            SortedText(counted(line["num_rows"], "row"), float(line["num_rows"]), link)
            for line, link in zip(lines, links, strict=True)
        ],
    )
    made_by = TableColumn(
        "made by",
        "Made by: the command, below the table.",
        [SortedText(name, name, f"#{name.split()[0]}") for name in command_names],
    )
    told = ("protect", "shape", "codec_used")
    lacking = any(line[name] == NOT_RECORDED for line in lines for name in told)
    unsaid = f"{NOT_RECORDED}: the rows do not say." if lacking else ""
    columns = [
        policy,
        budget,
        score,
        *rest[: _num_kl(rest)],
        front,
        _plain("study", lines, "study"),
        _plain("settings", lines, "variant"),
        _plain("protection", lines, "protect", unsaid),
        _plain("shape", lines, "shape"),
        _plain("codec", lines, "codec_used"),
        *rest[_num_kl(rest) :],
        rows,
        _plain("commit", lines, "commit", "Commit: of the code; + changes: with uncommitted ones."),
        made_by,
    ]
    several = [one for one in columns if one.heading not in ("study", "settings") or _differs(one)]
    return [one for one in several if any(shown.text not in ("", "-") for shown in one.texts)]


def _num_kl(columns: Sequence[TableColumn]) -> int:
    """1 where the first column is the KL, which stands beside the score; else 0."""
    return int(columns[0].heading.startswith("KL"))


def _with_links(column: TableColumn, links: Sequence[str]) -> TableColumn:
    texts = [shown._replace(href=link) for shown, link in zip(column.texts, links, strict=True)]
    return column._replace(texts=texts)


def _differs(column: TableColumn) -> bool:
    return len({shown.text for shown in column.texts}) > 1


def _plain(heading: str, lines: Sequence[Line], name: str, reading: str = "") -> TableColumn:
    return TableColumn(heading, reading, [SortedText(line[name], line[name]) for line in lines])
