"""What rows of forced answers say is told by the rows, not by the name of their task."""

import pandas as pd
import pytest

from kvarena.harness.analysis.distances import are_forced, distances, score_name
from kvarena.harness.report.after_run import own_summaries
from score_rows import BASE


def make_rows(task: str, **columns: object) -> pd.DataFrame:
    rows = [BASE | {"task": task, "variant": "", "sample_id": f"s{i}"} | columns for i in range(3)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("task", ["needle", "needle-2of3", "a-task-of-ones-own"])
def test_generated_answers_have_no_distances_whatever_their_task_is_called(task: str) -> None:
    assert own_summaries(task, make_rows(task)) == {}
    assert own_summaries(task, make_rows(task, kl_mean=None)) == {}
    assert score_name(make_rows(task)) == "score"


@pytest.mark.parametrize("task", ["fidelity-needle", "needle", "needle-2of3"])
def test_forced_answers_have_distances_whatever_their_task_is_called(task: str) -> None:
    rows = make_rows(task).assign(kl_mean=[1.0, 2.0, 6.0], attention_recall=0.5)
    (found,) = own_summaries(task, rows).values()
    assert list(own_summaries(task, rows)) == ["distances"]
    assert found.loc[0, ["policy", "budget", "kl_mean"]].tolist() == ["keydiff", "512", 3.0]
    assert found.loc[0, "kl_mean_se"] == pytest.approx(1.5275, abs=1e-4)
    assert found.loc[0, "attention_recall"] == 0.5
    assert are_forced(rows)
    assert score_name(rows) == "agreement"


def test_samples_that_failed_are_in_no_distance() -> None:
    rows = make_rows("fidelity-needle").assign(kl_mean=[1.0, 2.0, None], status=["ok", "ok", "oom"])
    assert distances(rows)["kl_mean"].tolist() == [1.5]


def test_nothing_scored_has_no_summary() -> None:
    assert own_summaries("longbench", make_rows("longbench").iloc[:0]) == {}
