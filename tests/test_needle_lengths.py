"""The study of needles by length: every length a contest of its own, and its pairs said aloud."""

import numpy as np
import pandas as pd
import pytest

from kvarena.harness.studies import needle_lengths as study

NUM = 20
LENGTHS = (1000, 7000)


def cell(policy: str, found: dict[int, float], budget: str = "512") -> pd.DataFrame:
    """``found``: share of needles by length."""
    parts = [
        pd.DataFrame(
            {
                "task": "needle",
                "model": "smollm2-135m",
                "policy": policy,
                "budget": budget,
                "run_id": f"{policy}-{min(found)}",
                "seed": 0,
                "sample_id": [f"{length}-{n}" for n in range(NUM)],
                "document": [f"{length}-{n}" for n in range(NUM)],
                "meta_length_target": float(length),
                "status": "ok",
                "num_planned": NUM * len(found),
                "score": (np.arange(NUM) < share * NUM).astype(float),
            }
        )
        for length, share in found.items()
    ]
    numbers = ("kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "decode_tokens_per_sec")
    return pd.concat(parts, ignore_index=True).assign(slots=8, **dict.fromkeys(numbers, 1.0))


@pytest.fixture
def rows() -> pd.DataFrame:
    return pd.concat(
        [
            cell("full", dict.fromkeys(LENGTHS, 1.0), "full"),
            cell("keydiff", {1000: 0.9, 7000: 0.5}),
            cell("snapkv", {1000: 0.8}),
            cell("snapkv", {7000: 0.0}),  # lengths may be cells of their own
            cell("tova(protect=4+64)", {1000: 0.1}),
            cell("h2o", dict.fromkeys(LENGTHS, 1.0)).iloc[:-1],
        ],
        ignore_index=True,
    )


def test_each_length_has_scores_and_pairs_of_its_own(rows: pd.DataFrame) -> None:
    summary = study.summarise(rows).set_index(["policy", "length"])
    assert summary["score"]["keydiff", 1000] == pytest.approx(0.9)
    assert summary["score"]["keydiff", 7000] == pytest.approx(0.5)
    assert "h2o" not in summary.index.get_level_values("policy")  # lacks a sample
    pairs = study.pairs_of(rows).set_index("length")
    assert pairs["verdict"][7000] == "keydiff is better"
    assert list(pairs["verdict"][1000]) == ["tie", "keydiff is better", "snapkv is better"]
    assert (pairs[["policy", "other"]] != "full").all(axis=None)  # of another budget


def test_tables_and_picture_name_all(rows: pd.DataFrame) -> None:
    summary, pairs = study.summarise(rows), study.pairs_of(rows)
    scores = study.scores_table(summary, pairs).splitlines()
    assert scores[0] == "| policy | 1000 tokens | 7000 tokens |"
    assert [line.split("`")[1] for line in scores[2:5]] == ["full", "keydiff", "snapkv"]
    assert "| 90 [" in scores[3]
    assert scores[5].startswith("| `tova` | 10 [")
    assert scores[5].endswith("| not run |")
    assert scores[6].startswith("| smallest detectable difference")
    found = study.pairs_table(pairs).splitlines()[2:]
    assert len(found) == 3
    assert found[-1].startswith("| 7000 | `keydiff` | `snapkv` | 50 [")
    svg = study.picture(summary).decode()
    for name in ("keydiff", "snapkv", "full", "7000"):
        assert name in svg
