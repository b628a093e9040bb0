"""Cells against the full cache and each other: paired, complete, corrected, and by hand."""

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvarena.harness.analysis.comparison import compare_cells, compare_pairs, is_full_cache
from kvarena.harness.analysis.intervals import holm, mean_interval, paired_difference
from kvarena.harness.errors import UsageError
from score_rows import BASE

# Rows of an early recorded run, kept so that a new recording changes no expectation.
REFERENCE = Path(__file__).parent / "golden" / "needle_rows.csv"


def make_rows(*changes: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([BASE | {"sample_id": f"s{i:02}"} | c for i, c in enumerate(changes)])


def cell(scores: Any, **labels: Any) -> pd.DataFrame:
    """A cell with these scores; the same sample ids in every cell."""
    rows = make_rows(*[{"score": score} for score in scores])
    return rows.assign(**({"run_id": str(sorted(labels.items()))} | labels))


def cells(**scores: Any) -> pd.DataFrame:
    """One cell per policy, at 512 tokens or, for full, without a bound."""
    return pd.concat(
        [
            cell(values, policy=policy, budget="full" if policy == "full" else "512")
            for policy, values in scores.items()
        ],
        ignore_index=True,
    )


def line_of(table: pd.DataFrame, policy: str, **labels: Any) -> Any:
    for name, label in {"policy": policy, **labels}.items():
        table = table[table[name] == label]
    (line,) = table.itertuples(index=False)
    return line


GENERATOR = np.random.default_rng(0)
HARD = GENERATOR.random(20)
NEAR = np.clip(HARD - 0.1 - GENERATOR.random(20) / 10, 0, 1)


# ---- one cell ----


def test_counts_medians_and_largest_values_by_hand() -> None:
    rows = make_rows(
        {"score": 1.0, "kv_bytes_kept": 10, "kv_bytes_peak": 50, "ttft_sec": 1.0},
        {"score": 0.0, "kv_bytes_kept": 30, "kv_bytes_peak": 70, "ttft_sec": 4.0},
        {"score": 0.5, "kv_bytes_kept": 20, "kv_bytes_peak": 60, "ttft_sec": 2.0, "slots": 8},
    )
    line = compare_cells(rows).iloc[0]
    assert (line.num_planned, line.num_ok, line.num_documents, line.slots) == (3, 3, 3, 8)
    assert (line.kv_bytes_kept, line.kv_bytes_peak, line.ttft_sec) == (20, 70, 2.0)
    assert line.decode_tokens_per_sec == 40.0
    interval = mean_interval([1.0, 0.0, 0.5], bounds=(0, 1))
    assert (line.score, line.score_se) == (0.5, pytest.approx(0.5 / math.sqrt(3)))
    assert (line.score_low, line.score_high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("status", ["error", "oom", "invalid", "score_error"])
def test_a_failed_row_counts_in_nothing_but_the_plan(status: str) -> None:
    failed = {"status": status, "score": 0.0, "kv_bytes_peak": 9e9, "ttft_sec": 99.0}
    line = compare_cells(make_rows({}, {}, failed), allow_partial=True).iloc[0]
    assert (line.num_planned, line.num_ok, line.num_documents) == (3, 2, 2)
    assert (line.score, line.kv_bytes_peak, line.ttft_sec) == (1.0, 3_000_000, 0.5)


def test_a_cell_with_missing_samples_has_no_score_unless_that_is_allowed() -> None:
    for rows in (make_rows({}, {"status": "oom"}), make_rows({}, {}).assign(num_planned=3)):
        line = compare_cells(rows).iloc[0]
        assert line[["score", "score_low", "score_high", "score_se"]].isna().all()
        assert not line.is_best
        assert line.num_ok < line.num_planned
        assert line.kv_bytes_kept == 2_000_000
        assert compare_cells(rows, allow_partial=True).score.item() == 1.0


def test_an_ok_row_without_a_score_is_a_missing_sample() -> None:
    line = compare_cells(make_rows({}, {"score": None})).iloc[0]
    assert (line.num_planned, line.num_ok) == (2, 1)
    assert math.isnan(line.score)


def test_missing_values_of_json_become_nan() -> None:
    nothing = dict.fromkeys(("score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec"))
    rows = make_rows({"status": "error", "decode_tokens_per_sec": None, **nothing})
    line = compare_cells(rows, allow_partial=True).iloc[0]
    assert line.num_ok == 0
    assert line[["score", "score_se", "kv_bytes_peak", "ttft_sec"]].isna().all()


def test_decode_speed_skips_rows_without_one() -> None:
    rows = make_rows({"decode_tokens_per_sec": 10.0}, {"decode_tokens_per_sec": math.nan})
    assert compare_cells(rows).decode_tokens_per_sec.item() == 10.0


def test_samples_of_one_document_count_once() -> None:
    scores = [0.1, 0.1, 0.5, 0.5, 0.9, 0.9]
    rows = cell(scores).assign(document=["a", "a", "b", "b", "c", "c"])
    line = compare_cells(rows).iloc[0]
    alone = compare_cells(cell(scores[::2])).iloc[0]
    assert line.num_documents == 3
    assert (line.score_low, line.score_high) == pytest.approx((alone.score_low, alone.score_high))
    assert compare_cells(cell(scores)).score_high.item() < line.score_high


def test_an_empty_document_is_the_samples_own() -> None:
    rows = cell([0.1, 0.5, 0.9])
    plain = compare_cells(rows)
    for nothing in ("", math.nan):
        pd.testing.assert_frame_equal(compare_cells(rows.assign(document=nothing)), plain)


def test_parts_weigh_alike_however_many_samples_they_have() -> None:
    rows = cell([1, 0, 1, 0.2, 0.4, 0.6, 0.6]).assign(part=["a"] * 3 + ["b"] * 4)
    assert compare_cells(rows).score.item() == pytest.approx((2 / 3 + 0.45) / 2)


def test_repeats_of_a_sample_are_averaged_and_add_no_certainty() -> None:
    first, second = cell([0.2, 0.6, 1.0]), cell([0.4, 0.8, 0.0], seed=1)
    line = compare_cells(pd.concat([first, second])).iloc[0]
    mean = compare_cells(cell([0.3, 0.7, 0.5])).iloc[0]
    assert (line.num_planned, line.num_ok, line.num_documents) == (6, 6, 3)
    columns = ["score", "score_low", "score_high"]
    assert line[columns].tolist() == pytest.approx(mean[columns].tolist())


def test_every_seed_has_a_plan_of_its_own() -> None:
    both = pd.concat([cell([1, 1]), cell([1], seed=1)]).assign(num_planned=2)
    for rows in (both, both.drop(columns="run_id")):
        line = compare_cells(rows).iloc[0]
        assert (line.num_planned, line.num_ok) == (4, 3)
        assert math.isnan(line.score)


def test_rows_from_before_there_was_a_plan_are_taken_as_all() -> None:
    rows = pd.concat([cell([1, 0]), cell([1], policy="tova").assign(num_planned=2)])
    table = compare_cells(rows)
    assert table.set_index("policy").num_planned.to_dict() == {"keydiff": 2, "tova": 2}
    assert table.set_index("policy").score.isna().to_dict() == {"keydiff": False, "tova": True}


def test_a_sample_that_appears_twice_in_a_cell_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="keydiff 512"):
        compare_cells(pd.concat([cell([1, 0]), cell([1, 0], run_id="other")]))


def test_other_seeds_budgets_and_variants_are_no_repeats() -> None:
    rows = [cell([1, 0]), cell([1, 0], seed=1), cell([1, 0], budget="1k")]
    rows.append(cell([1, 0], variant="chunk=64"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(compare_cells(pd.concat(rows))) == 3


def test_a_reference_that_looks_ahead_is_never_the_best() -> None:
    reference = cell([1, 1, 1, 1], policy="oracle").assign(bounded=False)
    rows = pd.concat([reference, cell([1, 0, 1, 0]), cell([0, 0, 0, 0], policy="tova")])
    table = compare_cells(rows)
    assert table.set_index("policy")["bounded"].to_dict() == {
        "oracle": False,
        "keydiff": True,
        "tova": True,
    }
    assert table.loc[table["is_best"], "policy"].tolist() == ["keydiff"]


def test_measures_outside_zero_to_one_are_compared_too() -> None:
    line = compare_cells(cell([0.5, 3.0, -1.0, 2.0]), bounds=None).iloc[0]
    assert line.score_low < 0
    assert line.score_high > 1


# ---- order and errors ----


def test_budgets_ascend_with_percentages_after_tokens_and_full_last() -> None:
    labels = ["full", "25%", "2k", "512", "12.5%", "1024", "10000"]
    table = compare_cells(pd.concat([cell([1], budget=label) for label in labels]))
    assert list(table.budget) == ["512", "1024", "2k", "10000", "12.5%", "25%", "full"]


def test_inside_a_budget_the_best_score_comes_first_then_the_name() -> None:
    rows = cells(tova=[0.2], h2o=[0.9], snapkv=[0.2], l2norm=[None])
    assert list(compare_cells(rows).policy) == ["h2o", "snapkv", "tova", "l2norm"]


def test_tasks_models_and_variants_come_before_budgets() -> None:
    changes = [{"model": "b", "budget": "1"}, {"model": "a", "budget": "9"}, {"task": "aaa"}]
    rows = pd.concat([cell([1], **change) for change in [*changes, {"variant": "x"}, {}]])
    table = compare_cells(rows)
    assert list(table.model) == ["toy", "a", "b", "toy", "toy"]
    assert list(table.variant) == ["", "", "", "", "x"]


def test_budgets_read_as_numbers_are_labels_again() -> None:
    rows = pd.concat([cell([1], budget=512), cell([1], budget=64)])
    assert list(compare_cells(rows).budget) == ["64", "512"]


@pytest.mark.parametrize("label", ["", "many", "-5", "5 %%", "k"])
def test_an_unknown_budget_is_named(label: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        compare_cells(cell([1], budget=label))


@pytest.mark.parametrize("compare", [compare_cells, compare_pairs])
def test_missing_columns_and_empty_frames_are_usage_errors(compare: Any) -> None:
    with pytest.raises(UsageError, match="ttft_sec"):
        compare(make_rows({}).drop(columns="ttft_sec"))
    with pytest.raises(UsageError, match="no rows"):
        compare(make_rows({}).iloc[:0])


# ---- against the full cache ----


def test_the_difference_to_full_is_paired() -> None:
    table = compare_cells(cells(full=HARD, keydiff=NEAR))
    line, paired = line_of(table, "keydiff"), paired_difference(NEAR, HARD)
    assert line.difference == pytest.approx(paired.mean)
    assert (line.difference_low, line.difference_high) == pytest.approx((paired.low, paired.high))
    assert line.detectable == pytest.approx(paired.detectable)
    assert line.num_pairs == 20
    # Samples differ far more than the policies do: unpaired, nothing would show.
    assert line.p_value < 0.001 < 0.2 < line.score_high - line.score_low


def test_frames_put_together_may_repeat_their_index() -> None:
    parts = [cell(NEAR), cell(HARD, policy="full", budget="full")]
    again = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(compare_cells(pd.concat(parts)), compare_cells(again))


def test_the_order_of_rows_does_not_matter() -> None:
    rows = cells(full=HARD, keydiff=NEAR)
    shuffled = rows.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare_cells(shuffled), compare_cells(rows))


def test_only_samples_of_both_are_paired() -> None:
    rows = cells(full=[1, 1, 1, 1, 0.5], keydiff=[0, 1, 1])
    line = line_of(compare_cells(rows), "keydiff")
    assert (line.num_pairs, line.difference) == (3, pytest.approx(-1 / 3))


def test_seeds_are_averaged_before_they_are_paired() -> None:
    rows = pd.concat([cells(full=[1, 1], keydiff=[1, 0]), cell([0, 0], seed=1)])
    line = line_of(compare_cells(rows), "keydiff")
    assert (line.num_pairs, line.difference) == (2, -0.75)


def test_documents_and_parts_are_those_of_the_pairs() -> None:
    labels = {"document": list("aabbcc") * 2, "part": ["x", "x", "x", "x", "y", "y"] * 2}
    rows = cells(full=[1] * 6, keydiff=[0, 0, 0.5, 0.5, 1, 1]).assign(**labels)
    line = line_of(compare_cells(rows), "keydiff")
    assert line.difference == pytest.approx((-0.75 + 0) / 2)
    assert line.p_value == 0.5  # two documents differ: 2 of 4 sign changes are as large


def test_the_full_cache_itself_has_no_difference() -> None:
    line = line_of(compare_cells(cells(full=HARD, keydiff=NEAR)), "full")
    assert math.isnan(line.difference)
    assert math.isnan(line.p_value)
    assert line.num_pairs == 0
    assert not line.is_best
    assert not line.ties_best


@pytest.mark.parametrize(
    "other",
    [
        {"task": "other"},
        {"model": "other"},
        {"variant": "chunk=64"},
        {"num_planned": 21},
        {"policy": "streaming_llm"},
    ],
)
def test_without_the_same_full_run_there_is_no_difference(other: dict[str, Any]) -> None:
    full = cell(HARD, **({"policy": "full", "budget": "full"} | other))
    table = compare_cells(pd.concat([cell(NEAR), full]))
    line = line_of(table, "keydiff")
    assert (line.num_pairs, line.score) == (0, pytest.approx(NEAR.mean()))
    assert math.isnan(line.difference)
    assert math.isnan(line.p_holm)


def test_two_versions_of_the_full_cache_are_no_reference() -> None:
    versions = [cell(HARD, policy=f"full@{code}", budget="full") for code in ("1a", "2b")]
    assert line_of(compare_cells(pd.concat([cell(NEAR), versions[0]])), "keydiff").num_pairs == 20
    assert line_of(compare_cells(pd.concat([cell(NEAR), *versions])), "keydiff").num_pairs == 0


def test_an_incomplete_cell_has_a_difference_only_if_that_is_allowed() -> None:
    rows = cells(full=HARD, keydiff=NEAR)
    rows.loc[25, "status"] = "oom"
    assert line_of(compare_cells(rows), "keydiff").num_pairs == 0
    assert line_of(compare_cells(rows, allow_partial=True), "keydiff").num_pairs == 19


def test_holm_counts_the_policies_at_one_budget() -> None:
    rows = cells(full=HARD, keydiff=NEAR, tova=np.roll(HARD, 1), h2o=HARD)
    table = compare_cells(pd.concat([rows, cell(NEAR, budget="1k")]))
    at_512 = table[table.budget == "512"]
    assert at_512.p_holm.tolist() == pytest.approx(holm(at_512.p_value).tolist())
    alone = line_of(table, "keydiff", budget="1k")
    assert alone.p_holm == alone.p_value
    assert line_of(table, "keydiff", budget="512").p_holm == pytest.approx(3 * alone.p_value)


# ---- best and ties ----


def test_the_best_is_of_those_that_evict_at_each_budget() -> None:
    rows = cells(full=[1.0] * 20, keydiff=NEAR, h2o=HARD)
    table = compare_cells(pd.concat([rows, cell(NEAR, budget="1k")]))
    assert line_of(table, "h2o").is_best
    assert not line_of(table, "keydiff", budget="512").is_best
    assert not line_of(table, "keydiff", budget="512").ties_best
    assert line_of(table, "keydiff", budget="1k").is_best


def test_what_is_not_significantly_below_the_best_ties_with_it() -> None:
    other = HARD.copy()
    other[:6] += [0.1, -0.1, 0.1, -0.1, -0.1, -0.05]
    table = compare_cells(cells(h2o=HARD, tova=other, keydiff=NEAR), bounds=None)
    assert line_of(table, "h2o").is_best
    assert line_of(table, "tova").ties_best
    assert not line_of(table, "h2o").ties_best
    assert not line_of(table, "keydiff").ties_best


def test_equal_means_are_both_best() -> None:
    scores = [0.1, 0.2, 0.3]
    table = compare_cells(cells(h2o=scores, tova=scores[::-1], snapkv=[0, 0, 0]))
    assert table.set_index("policy").is_best.to_dict() == {
        "h2o": True,
        "tova": True,
        "snapkv": False,
    }


def test_a_tie_with_one_of_two_best_is_a_tie() -> None:
    steady, jumpy = np.full(10, 0.5), np.tile([0.0, 1.0], 5)
    table = compare_cells(cells(h2o=steady, tova=jumpy, snapkv=steady - 0.1, keydiff=steady - 0.5))
    assert line_of(table, "h2o").is_best
    assert line_of(table, "tova").is_best
    assert line_of(table, "snapkv").ties_best  # with the jumpy one
    assert not line_of(table, "h2o").ties_best


def test_cells_without_a_score_are_neither_best_nor_ties() -> None:
    rows = cells(h2o=[0.1, 0.1], tova=[1.0, None])
    table = compare_cells(rows)
    assert line_of(table, "h2o").is_best
    assert not line_of(table, "tova").is_best
    assert not line_of(table, "tova").ties_best


def test_a_cell_in_which_nothing_was_evicted_is_never_the_best_that_evicts() -> None:
    rows = cells(full=[1.0] * 6, h2o=[1.0] * 6, keydiff=[0.9] * 6, tova=[0.9] * 5 + [0.8])
    rows["compressed"] = rows["policy"].isin(["keydiff", "tova"])
    table = compare_cells(rows).set_index("policy")
    assert table.num_compressed.to_dict() == {"full": 0, "h2o": 0, "keydiff": 6, "tova": 6}
    assert table.is_best.to_dict() == dict.fromkeys(table.index, False) | {"keydiff": True}
    assert table.ties_best.to_dict() == dict.fromkeys(table.index, False) | {"tova": True}
    nothing = compare_cells(rows[~rows["compressed"]])
    assert not nothing[["is_best", "ties_best"]].any(axis=None)


def test_one_sample_in_which_something_was_evicted_makes_a_rival() -> None:
    rows = cells(h2o=[1.0, 1.0], keydiff=[0.5, 0.5]).assign(compressed=[False, True, True, True])
    line = line_of(compare_cells(rows), "h2o")
    assert (line.num_compressed, line.is_best) == (1, True)


def test_cells_without_eviction_need_not_answer_the_samples_of_the_rivals() -> None:
    rows = cells(h2o=[1.0], keydiff=[0.5, 0.5], tova=[0.4, 0.4])
    rows["compressed"] = rows["policy"] != "h2o"
    assert line_of(compare_cells(rows), "keydiff").is_best


@pytest.mark.parametrize("unknown", [None, [True, math.nan], [None, None], [pd.NA, False]])
def test_rows_that_do_not_say_what_was_evicted_count_as_before(unknown: Any) -> None:
    rows = cell([1.0, 1.0])
    line = compare_cells(rows if unknown is None else rows.assign(compressed=unknown)).iloc[0]
    assert math.isnan(line.num_compressed)
    assert line.is_best


def test_only_rows_that_count_tell_what_was_evicted() -> None:
    changes = [{"compressed": True}, {"compressed": False}, {"status": "oom"}]
    line = compare_cells(make_rows(*changes), allow_partial=True).iloc[0]
    assert line.num_compressed == 1
    failed = compare_cells(make_rows({"status": "oom", "compressed": False})).iloc[0]
    assert math.isnan(failed.num_compressed)


@pytest.mark.parametrize(
    ("label", "rival"),
    [
        ("full+kivi(bits=4)", True),
        ("h2o(recent=32)+kvcomp[relative_bound_k=0.1]", True),
        ("h2o", False),
        ("h2o(scale=1e+5)", False),
        ("full", False),
    ],
)
def test_a_codec_saves_bytes_without_eviction(label: str, rival: bool) -> None:
    line = compare_cells(cell([1.0, 1.0], policy=label).assign(compressed=False)).iloc[0]
    assert line.is_best == rival


# ---- every two policies ----


def test_every_two_policies_at_one_budget_are_compared_once() -> None:
    rows = pd.concat([cells(a=HARD, b=NEAR, c=HARD, full=HARD), cell(NEAR, budget="1k")])
    pairs = compare_pairs(rows)
    assert list(zip(pairs.budget, pairs.policy, pairs.other, strict=True)) == [
        ("512", *pair) for pair in itertools.combinations("abc", 2)
    ]
    assert pairs.p_holm.tolist() == pytest.approx(holm(pairs.p_value).tolist())
    assert list(pairs.verdict) == ["a is better", "tie", "c is better"]
    paired = paired_difference(HARD, NEAR)
    first = pairs.iloc[0]
    assert first.difference_se == pytest.approx(paired.se)
    assert first[["difference", "difference_low", "difference_high", "detectable"]].tolist() == (
        pytest.approx([paired.mean, paired.low, paired.high, paired.detectable])
    )


def test_a_verdict_asks_for_significance_after_correction() -> None:
    scores = {f"p{i}": np.zeros(6) for i in range(5)} | {"best": np.linspace(0.1, 0.2, 6)}
    pairs = compare_pairs(cells(**scores))
    line = line_of(pairs, "best", other="p0")
    assert line.p_value == pytest.approx(2 / 2**6)
    assert line.verdict == "tie"
    assert compare_pairs(cells(best=scores["best"], p0=scores["p0"])).verdict.item() == (
        "best is better"
    )


def test_an_incomplete_cell_has_no_pairs() -> None:
    pairs = compare_pairs(cells(h2o=[0.1, 0.1], tova=[1.0, None]))
    assert (pairs.verdict.item(), pairs.num_pairs.item()) == ("no pairs", 0)
    partly = compare_pairs(cells(h2o=[0.1, 0.1], tova=[1.0, None]), allow_partial=True)
    assert (partly.verdict.item(), partly.num_pairs.item()) == ("tie", 1)


def test_one_policy_makes_no_pairs_but_keeps_the_columns() -> None:
    pairs = compare_pairs(cell([1, 0]))
    assert pairs.empty
    assert {"policy", "other", "p_holm", "verdict"} <= set(pairs.columns)


@pytest.mark.parametrize(
    ("label", "full"), [("full", True), ("full@3fa9", True), ("full(x=1)", True), ("fuller", False)]
)
def test_labels_of_the_full_cache_are_known(label: str, full: bool) -> None:
    assert is_full_cache(label) == full


def test_the_recorded_needles_separate_as_they_should() -> None:
    rows = pd.read_csv(REFERENCE, dtype={"budget": str})
    table = compare_cells(rows)
    assert line_of(table, "keydiff", budget="512").is_best
    at_512 = table[(table.budget == "512") & table.ties_best]
    assert set(at_512.policy) == {"streaming_llm", "tova"}
    assert (table.loc[table.policy != "full", "p_holm"] < 0.05).all()


def test_nobody_is_best_where_policies_answered_other_samples() -> None:
    easy = [{"policy": "keydiff", "sample_id": f"s{i}", "score": 1.0} for i in range(2)]
    all_of_them = [
        {"policy": "snapkv", "sample_id": f"s{i}", "score": float(i < 2)} for i in range(6)
    ]
    table = compare_cells(make_rows(*easy, *all_of_them))
    assert not table["is_best"].any()
    assert not table["ties_best"].any()
    same = compare_cells(make_rows(*easy, *all_of_them[:2]))
    assert same["is_best"].all()


def test_a_measure_without_bounds_gets_no_interval_of_scores() -> None:
    rows = make_rows(*[{"sample_id": f"s{i}", "score": 0.0} for i in range(20)])
    within, unbounded = compare_cells(rows), compare_cells(rows, bounds=None)
    assert 0 < within["score_high"].iloc[0] < 0.2
    assert not unbounded["score_high"].iloc[0] > 0


def test_where_everything_failed_there_is_a_table_without_scores() -> None:
    rows = make_rows({"status": "error"}, {"status": "oom", "sample_id": "b"})
    bare = rows.drop(columns=["score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "slots"])
    table = compare_cells(bare)
    assert table["num_ok"].tolist() == [0]
    assert table["score"].isna().all()
