"""The study of shared contexts: what seeing the question is worth, and what sharing saves."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvarena.harness.studies import shared_contexts as study

NUM_TEXTS, NUM_QUESTIONS = 8, 4
NUM = NUM_TEXTS * NUM_QUESTIONS


def cell(policy: str, question: str, turns: str = "independent", **columns: Any) -> pd.DataFrame:
    is_first = np.arange(NUM) % NUM_QUESTIONS == 0
    shared = np.where(is_first, 100, 10)
    return pd.DataFrame(
        {
            "task": "needle",
            "policy": policy,
            "question": question,
            "turns": turns,
            "sample_id": [f"s{n}" for n in range(NUM)],
            "document": [f"d{n // NUM_QUESTIONS}" for n in range(NUM)],
            "status": "ok",
            "num_planned": NUM,
            "prompt_tokens": 100,
            "prefill_tokens_computed": 100 if question == "inside" else shared,
            "score": 1.0,
            **columns,
        }
    )


@pytest.fixture
def rows() -> pd.DataFrame:
    half = np.tile([0.0, 1.0], NUM // 2)
    return pd.concat(
        [
            cell("keydiff", "inside"),
            cell("keydiff", "after", score=half),
            cell("keydiff", "after", "dialogue", score=0.0),
            cell("h2o", "after"),
            cell("tova", "inside").iloc[:-1],
            cell("snapkv", "inside", task="fidelity-scbench", kl_mean=0.5),
            cell("snapkv", "after", task="fidelity-scbench", kl_mean=2.0),
        ],
        ignore_index=True,
    )


def test_each_way_is_compared_with_the_question_in_sight(rows: pd.DataFrame) -> None:
    summary = study.summarise(rows).set_index(["policy", "way"])
    assert summary["change"]["keydiff", "unseen"] == pytest.approx(-0.5)
    assert summary["change"]["keydiff", "dialogue"] == pytest.approx(-1)
    assert summary["change"]["snapkv", "unseen"] == pytest.approx(1.5)  # KL, not score
    assert summary["p"]["keydiff", "unseen"] == pytest.approx(2 / 2**NUM_TEXTS)  # texts are flipped
    assert np.isnan(summary["change"]["h2o", "unseen"])  # nothing to compare with
    assert "tova" not in summary.index.get_level_values("policy")  # lacks a sample
    assert set(summary["num_texts"]) == {NUM_TEXTS}


def test_what_is_shared_is_not_computed_again(rows: pd.DataFrame) -> None:
    saved = study.summarise(rows).set_index(["policy", "way"])["saved_ratio"]
    assert saved["keydiff", "in sight"] == 0
    assert saved["keydiff", "unseen"] == pytest.approx(1 - 130 / 400)


def test_table_and_picture_name_all(rows: pd.DataFrame) -> None:
    summary = study.summarise(rows)
    table = study.markdown(summary)
    assert len(table.splitlines()) == 2 + len(summary)
    assert "-0.500 [" in table
    svg = study.picture(summary).decode()
    for name in ("keydiff", "snapkv", "fidelity-scbench"):
        assert name in svg
