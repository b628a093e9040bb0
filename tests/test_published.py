"""Published figures: every line keeps the rules, and only what is the same thing is compared."""

import csv
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.harness.analysis.published import (
    COLUMNS,
    GRADES,
    PUBLISHED,
    SCORE_SCALE,
    beside,
    load_published,
    with_parts,
)
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.tasks.longbench.names import EN_CODE_16, TASKS
from kvarena.tasks.longbench.task import LongBench

FIGURE = {
    "paper": "Paper", "url": "https://example.org/1", "table": "Table 1",
    "model": "Llama-3.1-8B-Instruct", "task": "longbench", "part": "en_code16", "metric": "score",
    "policy": "keydiff", "budget": "2k", "chunk": "128", "value": "44.33", "unit": "percent",
    "protocol": "by the book", "confidence": "S", "note": "",
}  # fmt: skip
CELL = {
    "task": "longbench", "model": "llama-3.1-8b-instruct", "variant": "", "policy": "keydiff",
    "budget": "2k", "score": 0.4, "part": "en_code16",
}  # fmt: skip


def written(folder: Path, *changes: dict[str, str], name: str = "a.csv") -> Path:
    """A folder whose file has one line for each of ``changes`` to ``FIGURE``."""
    with (folder / name).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(FIGURE | change for change in changes)
    return folder


def compared(folder: Path, *cells: dict[str, object]) -> pd.DataFrame:
    return beside(pd.DataFrame([CELL | cell for cell in cells]), load_published(folder))


# ---- the files ----


def test_every_line_of_the_repository_is_valid_and_graded() -> None:
    found = load_published()
    num_lines = sum(
        len(path.read_text("utf-8").splitlines()) - 1 for path in PUBLISHED.glob("*.csv")
    )
    assert len(found) == num_lines > 60
    readme = (PUBLISHED / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in readme for name in (*COLUMNS, *GRADES))


def test_keydiffs_table_is_there_whole() -> None:
    found = load_published()
    found = found[(found["paper"] == "KeyDiff") & (found["model"] == "Llama-3.1-8B-Instruct")]
    table = found.pivot(index="policy", columns="budget", values="value")
    assert table.loc["full", "full"] == 49.2
    assert table.loc["keydiff", ["2k", "6k", "8k"]].tolist() == [44.33, 48.51, 49.03]
    assert table.loc["h2o", ["2k", "4k", "8k"]].tolist() == [16.89, 26.37, 38.2]
    assert table.loc["snapkv", ["2k", "8k"]].tolist() == [39.6, 48.06]
    assert table.loc["tova", ["2k", "8k"]].tolist() == [37.52, 47.09]
    assert table.loc["streaming_llm", "8k"] == 44.68


def faults(figure: dict[str, Any]) -> list[str]:
    """What keeps a line from being compared, by the rules of results/published/README.md."""
    may_be_empty = ("part", "budget", "chunk", "note")
    score = figure["value"] * SCORE_SCALE.get(figure["unit"], math.nan)
    rules = {
        "texts": all(
            str(text) == str(text).strip() and (str(text) or name in may_be_empty)
            for name, text in figure.items()
        ),
        "url": figure["url"].startswith("https://"),
        "chunk": figure["chunk"].isdigit() or not figure["chunk"],
        "confidence": figure["confidence"] in GRADES,
        "unit": figure["unit"] in ("percent", "share", "points", "x", "tokens/s"),
        "value": math.isfinite(figure["value"]),
        "score": figure["metric"] != "score" or 0 <= score <= 1,
        "part": figure["task"] != "longbench" or bool(LongBench.parts(figure["part"])),
    }
    if figure["budget"]:
        parse_budget(figure["budget"])
    return [name for name, is_kept in rules.items() if not is_kept]


def test_every_line_of_the_repository_keeps_the_rules() -> None:
    found = load_published()
    for figure in found.to_dict("records"):
        assert faults(figure) == [], figure
    # Of one table a figure is there once.
    once = ["paper", "table", "model", "task", "part", "metric", "policy", "budget"]
    assert not found.duplicated(once).any()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"paper": ""}, "texts"),
        ({"model": " Llama"}, "texts"),
        ({"url": "http://example.org"}, "url"),
        ({"confidence": "X"}, "confidence"),
        ({"unit": "points per cent"}, "unit"),
        ({"chunk": "many"}, "chunk"),
        ({"value": "nan"}, "value"),
        ({"value": "144"}, "score"),
        ({"value": "44.33", "unit": "share"}, "score"),
        ({"part": ""}, "part"),
    ],
)
def test_the_rules_find_a_bad_line(tmp_path: Path, change: dict[str, str], fault: str) -> None:
    (figure,) = load_published(written(tmp_path, change)).to_dict("records")
    assert fault in faults(figure)


def test_without_the_files_nothing_stands_beside_a_cell(tmp_path: Path) -> None:
    """A wheel has none."""
    assert load_published(tmp_path / "none").empty
    line = beside(pd.DataFrame([CELL]), load_published(tmp_path)).iloc[0]
    assert math.isnan(line["published"])
    assert line["published_source"] == ""


# ---- beside our cells ----


def test_the_same_thing_gets_the_figure_its_source_and_the_difference(tmp_path: Path) -> None:
    line = compared(written(tmp_path, {}), {}).iloc[0]
    assert line["published"] == pytest.approx(0.4433)
    assert line["published_source"] == "Paper, Table 1"
    assert line["published_confidence"] == "S"
    assert line["published_difference"] == pytest.approx(0.4 - 0.4433)


@pytest.mark.parametrize(
    "cell",
    [
        {"model": "Llama-3.1-8B-Instruct"},
        {"model": "meta-llama/Llama-3.1-8B-Instruct"},
        {"budget": "2048"},
        {"part": ",".join(reversed(EN_CODE_16))},
    ],
)
def test_other_names_of_the_same_thing_match(tmp_path: Path, cell: dict[str, object]) -> None:
    assert compared(written(tmp_path, {}), cell)["published"].notna().all()


@pytest.mark.parametrize(
    "cell",
    [
        {"model": "llama-3.2-3b-instruct"},
        {"task": "fidelity-longbench"},
        {"policy": "keydiff(anchor=median)"},
        {"policy": "snapkv"},
        {"budget": "2000"},
        {"budget": "full"},
        {"budget": "25%"},
        {"part": ",".join(TASKS)},
        {"part": ",".join(EN_CODE_16[1:])},
        {"part": "qasper"},
        {"part": ""},
    ],
)
def test_anything_else_stays_empty(tmp_path: Path, cell: dict[str, object]) -> None:
    line = compared(written(tmp_path, {}), cell).iloc[0]
    assert pd.isna(line["published"])
    assert pd.isna(line["published_difference"])
    assert line["published_source"] == line["published_confidence"] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "score_difference"},
        {"model": "not stated"},
        {"task": "not stated"},
        {"budget": ""},
    ],
)
def test_a_figure_without_score_model_task_or_budget_equals_nothing(
    tmp_path: Path, change: dict[str, str]
) -> None:
    cell = {name: value or "full" for name, value in change.items() if name != "metric"}
    assert compared(written(tmp_path, change), cell)["published"].isna().all()


def test_percent_and_share_are_the_same_score(tmp_path: Path) -> None:
    share = {"value": "0.4433", "unit": "share", "budget": "4k"}
    found = compared(written(tmp_path, {}, share), {}, {"budget": "4k"})
    assert found["published"].tolist() == pytest.approx([0.4433, 0.4433])


def test_of_several_papers_the_best_graded_figure_is_taken(tmp_path: Path) -> None:
    grades = {"S": "41", "A": "42", "P": "43", "K": "44"}
    changes = [{"paper": g, "confidence": g, "value": value} for g, value in grades.items()]
    line = compared(written(tmp_path, *changes), {}).iloc[0]
    assert (line["published_source"], line["published"]) == ("P, Table 1", pytest.approx(0.43))
    assert line["published_confidence"] == "P"


def test_cells_keep_their_order_index_and_columns(tmp_path: Path) -> None:
    cells = pd.DataFrame([CELL | {"policy": name} for name in ("tova", "keydiff", "h2o")])
    cells.index = pd.Index([7, 3, 5])
    found = beside(cells, load_published(written(tmp_path, {})))
    pd.testing.assert_frame_equal(found[cells.columns], cells)
    assert found["published"].notna().tolist() == [False, True, False]


def test_cells_without_a_needed_column_are_refused() -> None:
    with pytest.raises(UsageError, match="cells lack the columns budget, score"):
        beside(pd.DataFrame([{"task": "needle", "model": "m", "policy": "full"}]))


def test_what_comes_with_kvarena_is_the_default() -> None:
    found = beside(pd.DataFrame([CELL | {"policy": "full", "budget": "full"}]))
    assert found["published"].tolist() == pytest.approx([0.492])
    assert found["published_source"].iloc[0].startswith("KeyDiff, ")


# ---- which parts a score is over ----


def sample_rows(*rows: dict[str, object]) -> pd.DataFrame:
    named = {name: CELL[name] for name in ("task", "model", "variant", "policy", "budget")}
    return pd.DataFrame([named | {"part": "", "status": "ok"} | row for row in rows])


def test_a_cell_is_over_the_parts_of_its_good_rows() -> None:
    rows = sample_rows(
        {"part": "qasper"}, {"part": "lcc"}, {"part": "lcc"}, {"part": "trec", "status": "oom"},
        {"part": "hotpotqa", "policy": "h2o"}, {"policy": "tova"},
    )  # fmt: skip
    cells = pd.DataFrame([CELL | {"policy": name} for name in ("keydiff", "h2o", "tova", "full")])
    assert with_parts(cells, rows)["part"].tolist() == ["lcc,qasper", "hotpotqa", "", ""]


def test_sample_data_is_over_no_part_of_the_benchmark() -> None:
    rows = sample_rows({"part": "qasper", "meta_is_sample": True})
    assert with_parts(pd.DataFrame([CELL]), rows)["part"].tolist() == [""]
    rows["meta_is_sample"] = False
    assert with_parts(pd.DataFrame([CELL]), rows)["part"].tolist() == ["qasper"]


def test_rows_without_parts_and_variants_have_none() -> None:
    rows = sample_rows({}).drop(columns=["part", "variant"])
    assert with_parts(pd.DataFrame([CELL]), rows)["part"].tolist() == [""]
