"""Score by turn and prefill saved: numbers worked out by hand, nothing where rows have no turn."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kvarena.harness.analysis.by_turn import has_turns, score_by_turn, turn_table
from kvarena.harness.analysis.comparison import CELL, compare_cells
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.registry import load_choice
from kvarena.harness.report.after_run import report, summaries
from kvarena.harness.report.html_page import render
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.report.turn_charts import turn_chart
from kvarena.harness.store.columns import TURNS
from kvarena.harness.store.row_files import read_sample_ids, row_model
from toy_folder import save_haystack, save_model_folder, toy_cell

NUM_CONTEXTS, PROMPT_TOKENS, QUESTION_TOKENS = 6, 100, 20
BY_TURN = {"full": (1.0, 1.0, 1.0), "keydiff": (1.0, 0.5, 0.0)}
NOTHING: dict[str, Any] = {"header": [], "lines": [], "environments": {}, "commands": {}}


def make_rows(**columns: Any) -> pd.DataFrame:
    """Six contexts, three questions to each, under the full cache and under keydiff at 64."""
    rows = [
        {
            "task": "needle-1of3-3questions",
            "model": "toy",
            "variant": "",
            "policy": policy,
            "budget": "full" if policy == "full" else "64",
            "question": "after",
            "turns": "dialogue",
            "sample_id": f"{document}-{turn}",
            "document": f"context {document}",
            "turn": turn,
            "seed": 0,
            "status": "ok",
            "score": score,
            "prediction": "1",
            "reference": "1",
            "prompt_tokens": PROMPT_TOKENS,
            "prefill_tokens_computed": PROMPT_TOKENS if turn == 1 else QUESTION_TOKENS,
            "kv_bytes_kept": 1e6,
            "kv_bytes_peak": 2e6,
            "ttft_sec": 1.0,
            "decode_tokens_per_sec": 10.0,
            "slots": 1,
            "num_planned": 3 * NUM_CONTEXTS,
        }
        for policy, scores in BY_TURN.items()
        for document in range(NUM_CONTEXTS)
        for turn, score in enumerate(scores, start=1)
    ]
    return pd.DataFrame(rows).assign(**columns)


def table_of(rows: pd.DataFrame) -> dict[str, dict[Any, Any]]:
    lines = turn_table(rows, compare_cells(rows)).to_dict("records")
    return {line["policy"]: line for line in lines}


def test_first_and_last_turn_and_what_lies_between() -> None:
    line = table_of(make_rows())["keydiff"]
    assert (line["question"], line["turns"], line["num_turns"]) == ("after", "dialogue", 3)
    assert (line["score_first"], line["score_last"], line["difference"]) == (1, 0, -1)
    assert line["num_documents"] == NUM_CONTEXTS
    # Six contexts out of six: Clopper and Pearson's limits, and two of all 64 flips.
    assert line["score_first_low"] == pytest.approx(0.025 ** (1 / 6))
    assert line["score_last_high"] == pytest.approx(1 - 0.025 ** (1 / 6))
    assert line["p_value"] == pytest.approx(2 / 64)
    assert line["difference_high"] < 0
    assert table_of(make_rows())["full"]["difference"] == 0


def test_prefill_saved_is_the_share_of_prompt_tokens_that_were_not_computed() -> None:
    saved = 1 - (PROMPT_TOKENS + 2 * QUESTION_TOKENS) / (3 * PROMPT_TOKENS)
    assert table_of(make_rows())["keydiff"]["prefill_saved"] == pytest.approx(saved)
    alone = make_rows(prefill_tokens_computed=PROMPT_TOKENS)
    assert table_of(alone)["keydiff"]["prefill_saved"] == 0
    older = make_rows().drop(columns="prefill_tokens_computed")
    assert pd.isna(table_of(older)["keydiff"]["prefill_saved"])


def test_every_turn_has_a_score_whose_interval_counts_contexts() -> None:
    rows = make_rows()
    twice = pd.concat([rows, rows.assign(seed=1)]).assign(num_planned=3 * NUM_CONTEXTS)
    for frame in (rows, twice):
        scores = score_by_turn(frame, compare_cells(frame))
        own = scores[scores["policy"] == "keydiff"]
        assert own["turn"].tolist() == [1, 2, 3]
        assert own["score"].tolist() == [1, 0.5, 0]
        assert own["score_low"].iloc[0] == pytest.approx(0.025 ** (1 / 6))


def test_the_last_turn_is_each_context_s_own() -> None:
    rows = make_rows()
    short = rows["document"].isin(["context 0", "context 1"])
    two = rows[~(short & (rows["turn"] == 3))].assign(num_planned=16)
    assert table_of(two)["keydiff"]["score_last"] == pytest.approx((2 * 0.5 + 4 * 0) / 6)
    alone = rows[~(short & (rows["turn"] > 1))].assign(num_planned=14)
    assert table_of(alone)["keydiff"]["num_documents"] == 4


def test_a_part_weighs_as_much_as_another() -> None:
    rows = make_rows()
    first = rows["document"] == "context 0"
    rows = rows.assign(part=first.map({True: "a", False: "b"}))
    rows.loc[first & (rows["turn"] == 3), "score"] = 1.0
    assert table_of(rows)["keydiff"]["score_last"] == 0.5


def test_a_cell_that_lacks_samples_has_no_line() -> None:
    rows = make_rows()
    rows.loc[rows.index[-1], ["status", "score"]] = ["error", None]
    assert list(table_of(rows)) == ["full"]
    cells = compare_cells(rows, allow_partial=True)
    line = turn_table(rows, cells).set_index("policy").loc["keydiff"]
    assert line["num_documents"] == NUM_CONTEXTS - 1


def test_the_table_has_the_declared_columns_within_their_bounds() -> None:
    rows = make_rows()
    table = turn_table(rows, compare_cells(rows))
    assert list(table.columns) == [*CELL, *(column.name for column in TURNS)]
    model = row_model(TURNS)
    for line in table.to_dict("records"):
        model.model_validate({column.name: line[column.name] for column in TURNS})


def test_rows_without_turns_have_neither_table_nor_picture() -> None:
    for rows in (make_rows(turn=None), make_rows().drop(columns=["turn", "turns", "question"])):
        assert not has_turns(rows)
        assert list(summaries("needle-1of3-3questions", rows)) == ["summary"]
        page = render(rows, compare_cells(rows), NOTHING)
        assert "by turn" not in page.lower()


# ---- what is seen ----


def test_the_page_has_a_picture_for_each_budget_and_one_table() -> None:
    rows = make_rows()
    other = rows[rows["policy"] == "keydiff"].assign(budget="128")
    rows = pd.concat([rows, other])
    page = render(rows, compare_cells(rows), NOTHING)
    assert page.count("<h3>Score by turn, budget ") == 2
    assert page.count("By turn: question=after, turns=dialogue") == 1
    assert page.count("prefill saved, %") == 1
    assert ">53.3<" in page
    assert ">-100.0 [-100, " in page


def test_lines_have_the_policies_styles_and_a_panel_has_its_budget(figures: list[Figure]) -> None:
    rows = make_rows()
    rows = pd.concat([rows, rows[rows["policy"] == "keydiff"].assign(budget="128", policy="h2o")])
    scores = score_by_turn(rows, compare_cells(rows))
    assert turn_chart(scores, "score (%)") == turn_chart(scores, "score (%)")
    figure = figures[0]
    assert [axes.get_title() for axes in figure.axes] == ["budget 64", "budget 128"]
    for axes, policy in zip(figure.axes, ("keydiff", "h2o"), strict=True):
        lines = {
            line.get_label(): line
            for line in axes.get_lines()
            if len(line.get_xdata()) and not str(line.get_label()).startswith("_")
        }
        assert set(lines) == {"full", policy}
        assert to_hex(lines[policy].get_color()) == policy_style(policy).colour.lower()
        assert list(lines[policy].get_ydata()) == [100, 50, 0]
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "question=after, turns=dialogue"
    assert [text.get_text() for text in legend.get_texts()] == ["full", "h2o", "keydiff"]


@pytest.mark.parametrize("questions", [1, 3])
def test_a_command_writes_picture_and_table_where_contexts_have_several_questions(
    tmp_path: Path, questions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(tmp_path / "toy")
    save_haystack(tmp_path / "hay")
    several = {"questions_per_context": 3, "num_needles": 3} if questions > 1 else {}
    task = load_choice("task", "needle") | {"haystack": str(tmp_path / "hay"), "max_new_tokens": 4}
    task |= {"lengths": [500], "depths": [50]} | several
    cell = toy_cell(tmp_path, "h2o", task=task, budget="128", question="after")
    path = run_cell(cell, tmp_path / "results").path
    written = report({path: read_sample_ids(path) or set()}, tmp_path / "results")
    assert all(file.exists() for file in written)
    found = [file.name for file in written if "turns" in file.name]
    name = f"needle-1of3-{questions}questions-turns.csv"
    assert found == ([name, "turns.png"] if questions > 1 else [])
    assert "score" in capsys.readouterr().out
