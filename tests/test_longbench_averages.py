"""LongBench's tables: rounded as officially, and no mean under a name that it does not deserve."""

from typing import Any

import pandas as pd
import pytest

from kvarena.tasks.longbench.averages import BY, length_buckets, macro_averages
from kvarena.tasks.longbench.names import EN_CODE_16, NUM_ROWS, TASKS


def result_rows(scores: dict[str, list[float]], **columns: object) -> pd.DataFrame:
    shared = {"task": "longbench", "status": "ok", "model": "m", "policy": "p", "budget": "512"}
    shared |= {"question": "inside", "meta_data": "zip:data.zip", "meta_is_sample": False}
    shared |= {"meta_max_length": 3500, "meta_code_similarity": "rapidfuzz", "meta_length": 10}
    return pd.DataFrame(
        [
            {**shared, "meta_dataset": task, "score": score, **columns}
            for task, values in scores.items()
            for score in values
        ]
    )


def by_name(table: pd.DataFrame) -> dict[str, Any]:
    return {line.name_: line for line in table.rename(columns={"name": "name_"}).itertuples()}


def test_means_over_all_tasks_have_the_names_of_what_they_are() -> None:
    scores = {task: [place / 100] for place, task in enumerate(TASKS)}
    table = by_name(macro_averages(result_rows(scores)))
    assert table["English + code, 16 tasks"].score == pytest.approx(
        sum(TASKS.index(task) for task in EN_CODE_16) / 16, abs=0.005
    )
    assert table["all LongBench, 21 tasks"].score == 10
    assert table["code, 2 tasks"].score == 19.5
    assert table["synthetic, 3 tasks"].kind == "category"
    assert sum(line.kind == "category" for line in table.values()) == 6
    assert [name for name in table if name in TASKS] == list(TASKS)


def test_means_over_fewer_tasks_say_so() -> None:
    table = by_name(macro_averages(result_rows({"qasper": [0.5], "lcc": [1.0], "vcsum": [0.0]})))
    assert table["English + code, 2 of 16 tasks"].score == 75
    assert table["all LongBench, 3 of 21 tasks"].score == 50
    assert table["single-document QA, 1 of 4 tasks"].score == 50
    assert not any(", 16 tasks" in name or ", 21 tasks" in name for name in table)
    only_english = by_name(macro_averages(result_rows({"qasper": [0.5]})))
    assert not any("21" in name for name in only_english)


def test_a_score_is_rounded_as_officially_and_means_are_of_rounded_scores() -> None:
    rows = result_rows({"trec": [1.0, 0.0, 0.0], "lcc": [0.333, 0.333]})
    table = by_name(macro_averages(rows))
    assert table["trec"].score == 33.33
    assert table["lcc"].score == 33.3
    assert table["English + code, 2 of 16 tasks"].score == round((33.33 + 33.3) / 2, 2)


def test_rows_that_failed_are_counted_and_not_averaged() -> None:
    rows = result_rows({"trec": [1.0, 1.0]})
    rows.loc[1, ["status", "score"]] = ["error", float("nan")]
    line = by_name(macro_averages(rows))["trec"]
    assert (line.score, line.num_rows, line.num_ok) == (100, 2, 1)
    assert not line.complete
    rows["status"] = "error"
    table = by_name(macro_averages(rows))
    assert list(table) == ["trec"]
    assert pd.isna(table["trec"].score)


def test_a_task_is_complete_with_all_rows_of_the_official_file() -> None:
    every = {task: [1.0] * NUM_ROWS[task] for task in TASKS}
    assert macro_averages(result_rows(every))["complete"].all()
    table = by_name(macro_averages(result_rows({**every, "lcc": [1.0] * 499})))
    assert table["qasper"].complete
    assert not table["lcc"].complete
    assert not table["code, 2 tasks"].complete
    assert not table["all LongBench, 21 tasks"].complete


@pytest.mark.parametrize("column", BY)
def test_rows_of_different_runs_or_data_are_kept_apart(column: str) -> None:
    value = {"meta_is_sample": True, "meta_max_length": 7500}.get(column, "other")
    one, other = result_rows({"trec": [1.0]}), result_rows({"trec": [0.0]}, **{column: value})
    table = macro_averages(pd.concat([one, other]))
    assert sorted(table[table["kind"] == "task"]["score"]) == [0, 100]


def test_every_line_about_a_sample_says_so() -> None:
    table = macro_averages(result_rows({"trec": [1.0]}, meta_is_sample=True))
    assert table["name"].str.startswith("sample: ").all()


def test_rows_that_the_official_code_zeroes_are_counted() -> None:
    rows = pd.concat(
        [
            result_rows({"vcsum": [0.5, 0.5], "qmsum": [0.5]}, rouge_official_zero=1.0),
            result_rows({"vcsum": [0.5]}, rouge_official_zero=0.0),
            result_rows({"trec": [0.5]}),
        ]
    )
    table = by_name(macro_averages(rows))
    assert table["vcsum"].num_rouge_official_zero == 2
    assert table["trec"].num_rouge_official_zero == 0
    assert table["summarization, 2 of 4 tasks"].num_rouge_official_zero == 3


def test_e_tasks_stay_out_of_the_other_means_and_have_buckets_by_length() -> None:
    rows = pd.concat(
        [
            result_rows({"qasper_e": [1.0, 0.0]}, meta_length=3999),
            result_rows({"qasper_e": [0.25]}, meta_length=4000),
            result_rows({"qasper": [0.0]}),
        ]
    )
    table = by_name(macro_averages(rows))
    assert table["LongBench-E, 1 of 13 tasks"].score == 41.67
    assert table["English + code, 1 of 16 tasks"].score == 0
    buckets = length_buckets(rows).set_index("bucket")
    assert set(buckets["name"]) == {"qasper_e"}
    assert buckets.loc["0-4k", "score"] == 50
    assert buckets.loc["4-8k", "score"] == 25
    assert pd.isna(buckets.loc["8k+", "score"])
    assert list(buckets["num_ok"]) == [2, 1, 0]


def test_rows_of_other_tasks_are_left_out_and_missing_columns_are_named() -> None:
    rows = result_rows({"trec": [1.0]}).assign(task="fidelity-longbench")
    assert macro_averages(rows).empty
    with pytest.raises(ValueError, match="lack the columns meta_dataset"):
        macro_averages(rows.drop(columns="meta_dataset"))
