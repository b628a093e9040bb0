"""The board: a static site of a results folder, an index and a page per model and task.

``python -m kvarena.harness.report.board <results_dir>`` writes ``<results_dir>/board/``;
``make board``. Tables have filters, each number links to a file with its rows and to the command
that makes them again, and a picture shows which cells no other one beats in the same bytes. The
site loads nothing from elsewhere: it opens from a folder, and works as a static Space of Hugging
Face, for which its README.md has the front matter. Texts of benchmarks and answers stay out of it.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kvarena.harness.analysis.comparison import CONTEST, compare_cells
from kvarena.harness.analysis.distances import score_name, with_kl, with_kl_limits
from kvarena.harness.analysis.published import beside, with_parts
from kvarena.harness.analysis.row_frame import without_texts
from kvarena.harness.budget import parse_budget
from kvarena.harness.entry import on_folder
from kvarena.harness.errors import UsageError
from kvarena.harness.report.board_studies import Study, find_studies, without_rows
from kvarena.harness.report.board_tables import (
    board_columns,
    filters,
    line_data,
    link_name,
    origins,
)
from kvarena.harness.report.budget_charts import on_front
from kvarena.harness.report.html_page import template
from kvarena.harness.report.html_pictures import Picture, memory_picture
from kvarena.harness.report.html_tables import SortedText, TableColumn, coverage_warnings
from kvarena.harness.report.text_tables import (
    counted,
    evictions,
    marks_in_words,
    write_csv,
)

TITLE = "kvarena board"
FRONT_MATTER = f"""---
title: {TITLE}
sdk: static
app_file: index.html
pinned: false
---

KV-cache compression policies under equal memory budgets. `make board` of kvarena wrote this folder;
open index.html.
"""


class Page(NamedTuple):
    """Of one task and model: its file, and what the template shows."""

    file: str
    task: str
    model: str
    shown: dict[str, Any]  # of any kind, as the template takes it
    cells: pd.DataFrame


def main() -> None:
    """Write the site of the folder that the argument names; exits with 2 on bad input."""
    on_folder(lambda folder: print(write_board(folder)), __doc__)


def write_board(results_dir: Path) -> Path:
    """Write the site and return its first page.

    Raises UsageError when there is nothing to show, or a folder that is no board is in the way.
    """
    studies = find_studies(results_dir)
    target = results_dir / "board"
    if target.exists() and not _is_board(target):
        raise UsageError(f"{target} is there and is no board; move it away")
    with tempfile.TemporaryDirectory(dir=results_dir, prefix=".board-") as temporary:
        site = Path(temporary) / "board"
        _write_site(site, studies, without_rows(results_dir))
        if target.exists():
            shutil.rmtree(target)
        site.rename(target)
    return target / "index.html"


def _is_board(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.exists() and readme.read_text(encoding="utf-8").startswith(
        FRONT_MATTER.partition("sdk")[0]
    )


def _write_site(site: Path, studies: Sequence[Study], missing: Sequence[str]) -> None:
    compared = [(study, _compared(study)) for study in studies]
    keys = sorted({key for _, cells in compared for key in _pairs(cells)})
    pages = [_page(site, task, model, compared) for task, model in keys]
    for page in pages:
        text = template("board_page.html.j2").render(page.shown)
        (site / page.file).write_text(text, encoding="utf-8")
    index = template("board_index.html.j2").render(
        title=TITLE,
        num_cells=counted(sum(len(page.cells) for page in pages), "cell"),
        num_rows=counted(sum(len(study.rows) for study in studies), "sample"),
        columns=_index_columns(pages),
        studies=[_about(study) for study in studies],
        missing=missing,
    )
    (site / "index.html").write_text(index, encoding="utf-8")
    (site / "README.md").write_text(FRONT_MATTER, encoding="utf-8")


def _pairs(frame: pd.DataFrame) -> set[tuple[str, str]]:
    return set(frame[["task", "model"]].astype(str).itertuples(index=False, name=None))


def _compared(study: Study) -> pd.DataFrame:
    """The study's cells, as the report compares them, and where each comes from."""
    rows = study.rows
    cells = with_kl_limits(with_kl(compare_cells(rows), rows), rows)
    cells = beside(with_parts(cells, rows))
    cells = origins(cells, rows).assign(study=study.name)
    front = [on_front(own) for _, own in cells.groupby(CONTEST)]
    return cells.assign(on_front=pd.concat(front))


def _page(
    site: Path, task: str, model: str, compared: Sequence[tuple[Study, pd.DataFrame]]
) -> Page:
    """Write the rows of one task and model, and say what its page shows."""
    name = link_name(task, model)
    own = [
        (study, cells[(cells["task"] == task) & (cells["model"] == model)])
        for study, cells in compared
    ]
    own = [(study, cells) for study, cells in own if len(cells)]
    parts, pictures, warnings, commands = [], [], [], Commands()
    is_sample = False
    for study, cells in own:
        rows = study.rows[(study.rows["task"] == task) & (study.rows["model"] == model)]
        is_sample |= "meta_is_sample" in rows and bool(rows["meta_is_sample"].eq(True).any())
        files = [_write_rows(site, name, study, rows, line) for line in cells.to_dict("records")]
        made_by = [commands.names(study, run_ids) for run_ids in cells["run_ids"]]
        parts.append(cells.assign(rows_file=files, made_by=made_by))
        for variant in cells["variant"].unique():
            contest = cells[cells["variant"] == variant]
            where = f"{study.name}, {variant}" if variant else study.name
            of_contest = rows[rows["variant"].fillna("") == variant]
            warnings += [f"{where}: {text}" for text in coverage_warnings(of_contest, contest)]
            if contest["score"].notna().any():
                pictures.append(_picture(contest, where))
    cells = _sorted(pd.concat(parts, ignore_index=True))
    write_csv(cells.drop(columns=["run_ids", "made_by"]), site / f"{name}.csv")
    data = line_data(cells)
    shown = {
        "title": f"{task}, {model}",
        "site": TITLE,
        "num_cells": counted(len(cells), "cell"),
        "num_rows": counted(cells["num_rows"].sum(), "sample"),
        "score": score_name(cells),
        "lacks_limits": bool((cells["score"].notna() & cells["score_low"].isna()).any()),
        "is_sample": is_sample,
        "warnings": warnings,
        "pictures": pictures,
        "filters": filters(data),
        "data": data,
        "columns": board_columns(cells, cells["made_by"].tolist()),
        "longest_name": cells["policy"].str.len().max(),
        "marks": marks_in_words(evictions(cells)),
        "cells_file": f"{name}.csv",
        "commands": commands.listed,
        "studies": [_about(study) for study, _ in own],
    }
    return Page(f"{name}.html", task, model, shown, cells)


def _sorted(cells: pd.DataFrame) -> pd.DataFrame:
    """Small budgets first, as the report has them, then as they stood."""
    rank = cells["budget"].map(lambda label: parse_budget(label).sort_key)
    return cells.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


def _picture(contest: pd.DataFrame, where: str) -> Picture:
    picture = memory_picture(contest)
    return picture._replace(title=f"{picture.title}: {where}")


class Commands:
    """C1, C2, ...: the commands of a page, each once with the machines that it ran on."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, str], str] = {}

    def names(self, study: Study, run_ids: Sequence[str]) -> str:
        """What stands for the commands of a cell, several for one that ran with several seeds."""
        keys = [
            (study.name, study.command(run_id), study.environments.get(run_id, ""))
            for run_id in run_ids
        ]
        found = [self._names.setdefault(key, f"C{len(self._names) + 1}") for key in keys]
        return " ".join(dict.fromkeys(found))

    @property
    def listed(self) -> list[dict[str, str]]:
        """Name, study, command and environment of each."""
        return [
            {"name": name, "study": study, "command": command, "environment": environment}
            for (study, command, environment), name in self._names.items()
        ]


def _write_rows(
    site: Path, name: str, study: Study, rows: pd.DataFrame, line: dict[Any, Any]
) -> str:
    """The rows of one cell as a file; returns its place from the page."""
    own = rows[(rows["policy"] == line["policy"]) & (rows["budget"] == line["budget"])]
    own = own[own["variant"].fillna("") == line["variant"]]
    file = link_name(line["policy"], line["budget"], line["variant"], study.name) + ".csv"
    write_csv(without_texts(own).dropna(axis="columns", how="all"), site / "rows" / name / file)
    return f"rows/{name}/{file}"


def _index_columns(pages: Sequence[Page]) -> list[TableColumn]:
    def column(heading: str, texts: Sequence[SortedText]) -> TableColumn:
        return TableColumn(heading, "", list(texts))

    def counts(heading: str, numbers: Sequence[int]) -> TableColumn:
        return column(heading, [SortedText(f"{number}", float(number)) for number in numbers])

    budgets = [list(dict.fromkeys(page.cells["budget"])) for page in pages]
    policies = [{line["policy"] for line in page.shown["data"]} for page in pages]
    return [
        column("task", [SortedText(page.task, page.task, page.file) for page in pages]),
        column("model", [SortedText(page.model, page.model) for page in pages]),
        counts("policies", list(map(len, policies))),
        column("budgets", [SortedText(", ".join(own), float(len(own))) for own in budgets]),
        counts("cells", [len(page.cells) for page in pages]),
        counts("without a score", [int(page.cells["score"].isna().sum()) for page in pages]),
        counts("samples", [int(page.cells["num_rows"].sum()) for page in pages]),
        counts("studies", [page.cells["study"].nunique() for page in pages]),
    ]


def _about(study: Study) -> dict[str, str]:
    return {
        "name": study.name,
        "text": f"{counted(len(study.rows), 'sample')}, {study.about}",
    }


if __name__ == "__main__":
    main()
