"""Intervals hold what they promise, p-values are those of the permutation test, and by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvarena.harness.analysis.intervals import (
    Interval,
    holm,
    mean_interval,
    paired_difference,
)
from kvarena.harness.errors import UsageError

UNIT = (0.0, 1.0)
SIZES = (20, 50, 200)
EXPERIMENTS = 1000
Draw = Callable[[np.random.Generator], tuple[Any, ...]]  # values, clusters, strata


def limits(interval: Any) -> list[float]:
    return [interval.low, interval.high]


def found(successes: int, num: int) -> np.ndarray:
    return np.r_[np.ones(successes), np.zeros(num - successes)]


def coverage(draw: Draw, mean: float, **options: Any) -> float:
    """Percent of experiments whose interval holds the true mean."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(EXPERIMENTS):
        interval = mean_interval(*draw(generator), **options)
        hits += interval.low - 1e-9 <= mean <= interval.high + 1e-9
    return 100 * hits / EXPERIMENTS


def documents(num: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores 0 or 1 of one to nine samples of each document, and the documents; mean 1/3."""
    sizes = generator.integers(1, 10, num)
    chances = generator.beta(1, 2, num)
    return generator.binomial(1, np.repeat(chances, sizes)) * 1.0, np.repeat(np.arange(num), sizes)


# ---- intervals ----


def test_limits_of_a_share_of_many_samples_are_wilsons() -> None:
    wilson = stats.binomtest(300, 10_000).proportion_ci(method="wilson")
    ours = mean_interval(found(300, 10_000), bounds=UNIT)
    assert limits(ours) == pytest.approx(list(wilson), rel=1e-3)


def test_limits_solve_wilsons_equation_with_students_t() -> None:
    scores = np.array([0.1, 0.2, 0.0, 0.7, 0.3, 1.0])
    ours = mean_interval(scores, bounds=UNIT)
    mean, effective = scores.mean(), scores.mean() * (1 - scores.mean()) / stats.sem(scores) ** 2
    for limit in limits(ours):
        distance = stats.t.ppf(0.975, 5) * math.sqrt(limit * (1 - limit) / effective)
        assert abs(mean - limit) == pytest.approx(distance, rel=1e-4)
    assert ours.se == pytest.approx(stats.sem(scores))


def test_bounds_may_lie_anywhere() -> None:
    scores = np.array([0.1, 0.2, 0.0, 0.7, 0.3, 1.0])
    ours, unit = mean_interval(10 * scores - 3, bounds=(-3, 7)), mean_interval(scores, bounds=UNIT)
    assert limits(ours) == pytest.approx([10 * limit - 3 for limit in limits(unit)])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_scores_all_alike_get_the_exact_interval_of_clopper_and_pearson(score: float) -> None:
    exact = stats.binomtest(int(20 * score), 20).proportion_ci(method="exact")
    ours = mean_interval(np.full(20, score), bounds=UNIT)
    assert limits(ours) == pytest.approx(list(exact))
    assert ours.se == 0


def test_equal_scores_leave_room_for_unlike_ones_in_both_directions() -> None:
    unseen = 1 - 0.025 ** (1 / 20)
    ours = mean_interval(np.full(20, 0.2), bounds=UNIT)
    assert limits(ours) == pytest.approx([0.2 - 0.2 * unseen, 0.2 + 0.8 * unseen])
    assert all(map(math.isnan, limits(mean_interval(np.full(20, 0.2)))))


def test_rounding_is_no_spread() -> None:
    assert mean_interval(np.full(3, 0.1), bounds=UNIT).se == 0
    assert mean_interval([0.1, 0.1, 0.3, 0.1, 0.1, 0.3], [1, 1, 1, 2, 2, 2], bounds=UNIT).se == 0


def test_equal_scores_in_several_strata_count_the_documents_of_all() -> None:
    ours = mean_interval(np.zeros(20), strata=np.repeat([0, 1], 10), bounds=UNIT)
    assert limits(ours) == pytest.approx([0, 1 - 0.025 ** (1 / 20)])
    uneven = mean_interval(np.zeros(20), strata=np.repeat([0, 1], [5, 15]), bounds=UNIT)
    assert uneven.high == pytest.approx(1 - 0.025 ** (1 / 10))
    split = mean_interval(np.repeat([0.0, 1.0], 10), strata=np.repeat([0, 1], 10), bounds=UNIT)
    assert limits(split) == pytest.approx([0.5 - ours.high, 0.5 + ours.high])


def test_one_value_has_a_mean_and_no_limits() -> None:
    for bounds in (None, UNIT):
        ours = mean_interval([0.5], bounds=bounds)
        assert (ours.mean, ours.num_samples, ours.num_clusters) == (0.5, 1, 1)
        assert all(map(math.isnan, [*limits(ours), ours.se]))


def test_a_stratum_with_one_document_leaves_no_limits() -> None:
    ours = mean_interval([0, 1, 1], strata=["a", "a", "b"], bounds=UNIT)
    assert ours.mean == 0.75
    assert all(map(math.isnan, [*limits(ours), ours.se]))


def test_no_values_have_no_mean() -> None:
    for empty in (mean_interval([]), mean_interval([], [], [], bounds=UNIT)):
        assert all(map(math.isnan, [empty.mean, *limits(empty), empty.se]))
        assert (empty.num_samples, empty.num_clusters) == (0, 0)
    assert math.isnan(paired_difference([], []).p_value)


def test_a_mean_without_bounds_gets_students_interval() -> None:
    values = np.random.default_rng(3).exponential(size=7)
    students = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert limits(mean_interval(values)) == pytest.approx(list(students))


def test_the_mean_over_strata_is_the_plain_mean_of_their_means() -> None:
    values, strata = [0.0, 1.0, 0.2, 0.4, 0.6, 0.8], [0, 0, 1, 1, 1, 1]
    ours = mean_interval(values, strata=strata, bounds=UNIT)
    assert ours.mean == pytest.approx((0.5 + 0.5) / 2)
    hand = math.hypot(stats.sem(values[:2]), stats.sem(values[2:])) / 2
    assert ours.se == pytest.approx(hand)


@pytest.mark.parametrize("bounds", [None, UNIT])
def test_copies_of_a_sample_in_one_document_make_nothing_surer(
    bounds: tuple[float, float] | None,
) -> None:
    values = np.random.default_rng(0).random(12)
    alone = mean_interval(values, bounds=bounds)
    copied = mean_interval(np.repeat(values, 5), np.repeat(np.arange(12), 5), bounds=bounds)
    assert limits(copied) == pytest.approx(limits(alone))
    assert (copied.num_samples, copied.num_clusters) == (60, 12)
    assert copied.se == pytest.approx(alone.se)


def test_large_documents_weigh_as_many_samples() -> None:
    ours = mean_interval([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1], bounds=UNIT)
    assert ours.mean == 0.75
    # Deviations of the sums, 3 - 0.75 * 3 and 0 - 0.75, over four samples; two documents.
    assert ours.se == pytest.approx(math.sqrt(2) * math.hypot(0.75, 0.75) / 4)


def test_one_label_in_two_strata_is_two_documents() -> None:
    ours = mean_interval([0, 1, 0, 1], ["a", "b", "a", "b"], [0, 0, 1, 1], bounds=UNIT)
    assert ours.num_clusters == 4


def test_the_order_of_rows_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    values, clusters, strata = generator.random(60), np.arange(60) // 3, np.arange(60) // 30
    shuffled = generator.permutation(60)
    one = mean_interval(values, clusters, strata)
    other = mean_interval(values[shuffled], clusters[shuffled], strata[shuffled])
    assert limits(one) == pytest.approx(limits(other))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: mean_interval([0.5, 1.2], bounds=UNIT), "bounds"),
        (lambda: mean_interval([0.5, -0.2], bounds=UNIT), "bounds"),
        (lambda: mean_interval([0.5, math.nan]), "missing"),
        (lambda: mean_interval([0.5, 0.2], clusters=["a"]), "clusters"),
        (lambda: mean_interval([0.5, 0.2], strata=["a"] * 3), "strata"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "pairs"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Interval], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        call()


# ---- coverage ----


@pytest.mark.parametrize("num", SIZES)
def test_intervals_of_found_or_not_cover_as_promised(num: int) -> None:
    """Exact, not simulated: summed over every number that can be found."""
    intervals = [limits(mean_interval(found(k, num), bounds=UNIT)) for k in range(num + 1)]

    def covered(chance: float) -> float:
        weights = stats.binom.pmf(np.arange(num + 1), num, chance)
        return 100 * sum(weights[k] for k, (a, b) in enumerate(intervals) if a <= chance <= b)

    for chance in (0.5, 0.2, 0.1, 0.8):
        assert covered(chance) == pytest.approx(95, abs=2.05)
    # No interval comes closer at every chance: their number of ends is finite.
    assert min(covered(chance) for chance in np.linspace(0.02, 0.98, 97)) > 93


@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda num, rng: (np.clip(rng.normal(0.5, 0.15, num), 0, 1),), 0.5),
        (lambda num, rng: (rng.beta(0.5, 2, num),), 0.2),
        (lambda num, rng: (np.where(rng.random(num) < 0.5, 0, rng.random(num)),), 0.25),
        (lambda num, rng: documents(num, rng), 1 / 3),
    ],
    ids=["normal", "skewed", "half-zero", "documents"],
)
def test_intervals_of_scores_cover_as_promised(draw: Any, mean: float, num: int) -> None:
    assert coverage(lambda rng: draw(num, rng), mean, bounds=UNIT) == pytest.approx(95, abs=2)


@pytest.mark.parametrize("num", SIZES)
def test_intervals_without_bounds_cover_as_recorded(num: int) -> None:
    normal = coverage(lambda rng: (rng.normal(size=num),), 0.0)
    exponential = coverage(lambda rng: (rng.exponential(size=num),), 1.0)
    assert normal == pytest.approx(95, abs=2)
    assert exponential == pytest.approx({20: 92.9, 50: 93.3, 200: 94.4}[num], abs=2)


@pytest.mark.parametrize(("num_strata", "num"), [(5, 20), (16, 10), (21, 2)])
def test_intervals_of_means_over_parts_cover_as_promised(num_strata: int, num: int) -> None:
    means = np.resize([0.1, 0.3, 0.5, 0.2, 0.05], num_strata)
    strata = np.repeat(np.arange(num_strata), num)

    def draw(rng: np.random.Generator) -> tuple[Any, ...]:
        return rng.beta(2 * means[strata], 2 * (1 - means[strata])), None, strata

    assert coverage(draw, means.mean(), bounds=UNIT) == pytest.approx(95, abs=2)


def test_the_interval_that_ignores_documents_would_fail() -> None:
    """So the tests above would notice."""
    assert coverage(lambda rng: documents(50, rng)[:1], 1 / 3, bounds=UNIT) < 90


# ---- paired differences ----


def scipys_p(values: np.ndarray, reference: np.ndarray, **options: Any) -> float:
    return stats.permutation_test(
        (values, reference),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        **options,
    ).pvalue


@pytest.mark.parametrize("seed", range(5))
def test_few_pairs_get_the_exact_p_value_of_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, reference = generator.normal(0.5, 1, 10), generator.normal(0, 1, 10)
    ours = paired_difference(values, reference)
    assert ours.p_value == pytest.approx(scipys_p(values, reference, n_resamples=np.inf))
    assert ours.mean == pytest.approx(np.mean(values - reference))
    assert ours.num_pairs == 10


def test_many_pairs_get_the_p_value_of_scipy_up_to_chance() -> None:
    generator = np.random.default_rng(0)
    values, reference = generator.normal(0.2, 1, 60), generator.normal(0, 1, 60)
    scipys = scipys_p(values, reference, n_resamples=10_000, rng=1)
    assert 0.02 < scipys < 0.6
    assert paired_difference(values, reference).p_value == pytest.approx(scipys, abs=0.02)


def test_found_by_one_and_not_by_the_other_is_mcnemars_exact_test() -> None:
    values, reference = found(10, 20), found(4, 20)
    assert paired_difference(values, reference).p_value == pytest.approx(2 / 2**6)
    both_ways = np.r_[values[:-1], 1.0]
    reference[-1] = 0
    assert paired_difference(both_ways, reference).p_value == pytest.approx(2 / 2**7)
    lost = np.r_[np.zeros(1), np.ones(7), np.zeros(12)]
    won = np.r_[np.ones(1), np.zeros(19)]
    exact = stats.binomtest(1, 8).pvalue
    assert paired_difference(lost, won).p_value == pytest.approx(exact)


def test_the_same_scores_are_no_difference() -> None:
    scores = np.random.default_rng(0).random(20)
    ours = paired_difference(scores, scores, bounds=UNIT)
    assert (ours.mean, ours.se, ours.p_value) == (0, 0, 1)
    unseen = 1 - 0.025 ** (1 / 20)
    assert limits(ours) == pytest.approx([-unseen, unseen])
    assert math.isnan(ours.detectable)


def test_limits_stay_within_what_is_possible() -> None:
    values = np.r_[np.ones(9), 0.0]
    for bounds in (None, UNIT):
        assert paired_difference(values, np.zeros(10), bounds=bounds).high == pytest.approx(1)
    few = paired_difference(values[:5], np.zeros(5), bounds=(0, 3))
    assert limits(few) == [-3, 3]


def test_whole_documents_change_sign() -> None:
    difference = np.array([0.1, 0.3, 0.2, 0.4, 0.6, -0.1, 0.2, 0.5])
    alone = paired_difference(difference, np.zeros(8))
    clusters = np.repeat(np.arange(8), 4)
    copied = paired_difference(np.repeat(difference, 4), np.zeros(32), clusters)
    assert copied.p_value == alone.p_value
    assert copied.detectable == pytest.approx(alone.detectable)
    assert paired_difference(np.repeat(difference, 4), np.zeros(32)).p_value < alone.p_value / 5


def test_strata_weigh_alike_in_the_p_value() -> None:
    # The macro mean of 1, 1 (weights 1/4) and four of -0.5 (weights 1/8) over all 64 signs.
    values, strata = np.array([1, 1, -0.5, -0.5, -0.5, -0.5]), [0, 0, 1, 1, 1, 1]
    ours = paired_difference(values, np.zeros(6), strata=strata)
    assert ours.mean == pytest.approx(0.25)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    sums = np.abs(np.array([0.25, 0.25, 0.0625, 0.0625, 0.0625, 0.0625]) @ signs)
    assert ours.p_value == pytest.approx(np.mean(sums >= 0.25 - 1e-12))


def test_swapping_the_two_swaps_the_sign_only() -> None:
    generator = np.random.default_rng(0)
    values, reference = generator.random(40), generator.random(40)
    one, other = paired_difference(values, reference), paired_difference(reference, values)
    assert limits(one) == pytest.approx([-limit for limit in limits(other)[::-1]])
    assert (one.mean, one.p_value) == pytest.approx((-other.mean, other.p_value))


def test_a_random_p_value_is_never_zero() -> None:
    values = np.linspace(1, 2, 40)
    assert paired_difference(values, np.zeros(40), resamples=999).p_value == 1 / 1000


@pytest.mark.parametrize("num", [10, 30])
def test_p_values_are_uniform_without_a_difference(num: int) -> None:
    generator = np.random.default_rng(0)
    p_values = np.array(
        [
            paired_difference(*generator.normal(size=(2, num)), resamples=1024).p_value
            for _ in range(EXPERIMENTS)
        ]
    )
    for level in (0.01, 0.05, 0.1, 0.5):
        assert 100 * np.mean(p_values <= level) == pytest.approx(100 * level, abs=2 + 2 * level)


def test_p_values_of_sparse_differences_are_never_too_small() -> None:
    generator = np.random.default_rng(0)
    differences = generator.choice([1.0, -1, 0], (EXPERIMENTS, 20), p=[0.15, 0.15, 0.7])
    p_values = np.array(
        [paired_difference(one, 0 * one, resamples=999).p_value for one in differences]
    )
    for level in (0.05, 0.1, 0.5):
        assert np.mean(p_values <= level) < level + 0.02


def test_detectable_is_two_point_eight_standard_errors_of_many() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    ours = paired_difference(values, np.zeros(2000))
    assert ours.detectable == pytest.approx(2.80 * ours.se, rel=2e-3)
    few = paired_difference(values[:6], np.zeros(6))
    assert few.detectable == pytest.approx((stats.t.ppf(0.975, 5) + stats.t.ppf(0.8, 5)) * few.se)
    assert math.isnan(paired_difference(values[:5], np.zeros(5)).detectable)


@pytest.mark.parametrize("num", [20, 50])
def test_a_detectable_difference_is_found_four_times_in_five(num: int) -> None:
    generator = np.random.default_rng(0)
    true = (stats.t.ppf(0.975, num - 1) + stats.t.ppf(0.8, num - 1)) / math.sqrt(num)
    significant = [
        paired_difference(generator.normal(true, 1, num), np.zeros(num), resamples=999).p_value
        < 0.05
        for _ in range(EXPERIMENTS)
    ]
    assert 100 * np.mean(significant) == pytest.approx(80, abs=4)


# ---- several tests ----


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.7]) == pytest.approx([1, 1, 1])
    assert holm([]).tolist() == []


def test_holm_leaves_tests_that_were_not_made_out_of_the_count() -> None:
    adjusted = holm([math.nan, 0.01, 0.04, math.nan])
    assert adjusted[1:3] == pytest.approx([0.02, 0.04])
    assert np.isnan(adjusted[[0, 3]]).all()
