"""The interval of a difference and its test agree, and hold what intervals.py records."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvarena.harness.analysis import intervals, sign_flips
from kvarena.harness.analysis.intervals import Difference, paired_difference
from kvarena.harness.analysis.sign_flips import LEAST_DOCUMENTS, SIGNIFICANCE, sign_flip_test

UNIT = (0.0, 1.0)
Draw = Callable[[int, np.random.Generator], tuple[Any, ...]]  # differences, clusters, strata


def difference(differences: Any, *labels: Any, **options: Any) -> Difference:
    values = np.asarray(differences, float)
    return paired_difference(values, np.zeros_like(values), *labels, **options)


def leaves_zero_out(found: Difference) -> bool:
    return found.low > 0 or found.high < 0


def flips_of(differences: Any, *, resamples: int = 10_000, seed: int = 0) -> sign_flips.SignFlips:
    values = np.asarray(differences, float)
    weights = np.full(len(values), 1 / len(values))
    return sign_flip_test(values * weights, weights, resamples=resamples, seed=seed)


# ---- the test and the means it accepts ----


def p_of_mean(mean: float, amounts: np.ndarray, weights: np.ndarray) -> float:
    """Share of all flips of the differences less a mean that are as far from 0, one by one."""
    moved = amounts - mean * weights
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * len(moved))).reshape(len(moved), -1)
    return float(np.mean(np.abs(moved @ signs) >= abs(moved.sum()) - 1e-12))


@pytest.mark.parametrize("num", [6, 7, 9])
def test_the_limits_are_where_the_test_begins_to_reject(num: int) -> None:
    generator = np.random.default_rng(num)
    sizes = generator.integers(1, 5, num) * 1.0
    weights = sizes / sizes.sum()
    amounts = weights * generator.normal(0.3, 1, num).round(1)  # with a 0 or two, and ties
    found = sign_flip_test(amounts, weights, resamples=10_000, seed=0)
    assert found.p_value == pytest.approx(p_of_mean(0, amounts, weights))
    for inside, outside in ((found.low, found.low - 1e-6), (found.high, found.high + 1e-6)):
        assert p_of_mean(inside, amounts, weights) >= SIGNIFICANCE
        assert p_of_mean(outside, amounts, weights) < SIGNIFICANCE


def test_six_documents_accept_what_lies_between_the_least_and_the_largest() -> None:
    found = flips_of([0.3, -0.1, 0.7, 0.2, 0.5, 0.4])
    assert (found.low, found.high) == pytest.approx((-0.1, 0.7))


def test_five_documents_reject_no_mean() -> None:
    assert LEAST_DOCUMENTS == 6
    assert flips_of([-1.0] * 5) == (2 / 2**5, -math.inf, math.inf)
    assert flips_of([-1.0] * 6).p_value == 2 / 2**6


def test_random_flips_come_close_to_all_of_them() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, 13)
    every, some = flips_of(values), flips_of(values, resamples=5000)
    assert every != some
    assert some == pytest.approx(every, abs=0.03)
    assert some == flips_of(values, resamples=5000)
    assert some != flips_of(values, resamples=5000, seed=1)


def test_few_that_differ_among_many_have_the_exact_p_value() -> None:
    values = np.r_[np.full(6, -1.0), np.zeros(200)]
    assert flips_of(values).p_value == 2 / 2**6
    assert flips_of(np.zeros(200)).p_value == 1


def test_small_blocks_change_nothing_but_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    whole, listed = flips_of(values), flips_of(values[:10])
    monkeypatch.setattr(sign_flips, "_BLOCK", 700)
    assert flips_of(values) == pytest.approx(whole, abs=0.03)
    assert flips_of(values[:10]) == listed


# ---- the interval of a difference ----


def test_a_larger_loss_never_looks_surer_to_be_none_at_five_samples() -> None:
    """What the first report showed: -100 [-100, +4] beside -80 [-100, -17], both with p > 0.05."""
    larger, smaller = difference([-1] * 5, bounds=UNIT), difference([-1] * 4 + [0], bounds=UNIT)
    assert (larger.p_value, smaller.p_value) == (0.0625, 0.125)
    for one in (larger, smaller):
        assert (one.low, one.high) == (-1, 1)
        assert math.isnan(one.detectable)


@pytest.mark.parametrize("num", [6, 10, 20, 100])
def test_the_larger_a_loss_of_all_the_farther_its_limits_are_from_none(num: int) -> None:
    unseen = 1 - 0.025 ** (1 / num)
    losses = [-0.1, -0.2, -0.5, -1.0]
    highs = [difference([loss] * num, bounds=UNIT).high for loss in losses]
    assert highs == pytest.approx([(1 - unseen) * loss for loss in losses])
    assert highs == sorted(highs, reverse=True)


@pytest.mark.parametrize("num", range(1, 9))
def test_fewer_than_six_documents_never_leave_zero_out(num: int) -> None:
    copies = np.repeat(np.arange(num), 4)
    for found in (difference([-1.0] * num), difference([-1.0] * 4 * num, copies, bounds=UNIT)):
        assert leaves_zero_out(found) == (num >= 6)
    without_bounds = difference([-1.0] * num)
    assert math.isnan(without_bounds.high) == (num < 6)


def test_samples_that_did_not_differ_rule_no_gain_out() -> None:
    """A shift moves them all to one side, so the flips alone would say [-16, 0]."""
    found = difference([-1.0] + [0.0] * 19, bounds=UNIT)
    unseen = 1 - 0.025 ** (1 / 20)
    assert found.p_value == 1
    assert (found.low, found.high) == pytest.approx(
        (-0.05 * (1 - unseen) - unseen, -0.05 * (1 - unseen) + unseen)
    )


def test_without_bounds_equal_scores_have_no_limits() -> None:
    found = difference([0.0] * 20)
    assert (found.mean, found.p_value) == (0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_scores_that_are_equal_on_paper_are_equal() -> None:
    found = paired_difference([0.1 + 0.2] * 8, [0.3] * 8, bounds=UNIT)
    assert (found.mean, found.p_value) == (0, 1)


def test_a_part_with_one_document_has_an_interval() -> None:
    found = difference(np.linspace(-0.3, -0.1, 8), None, range(8), bounds=UNIT)
    assert -0.3 < found.low < -0.2 < found.high < -0.1
    assert math.isnan(found.se)


@pytest.mark.parametrize("seed", range(300))
def test_zero_lies_outside_exactly_if_the_test_rejects_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num = int(generator.integers(1, 40))
    values = generator.choice(
        [
            generator.choice([1.0, -1, 0], num, p=[0.1, 0.4, 0.5]),
            generator.choice([0.0, -0.1], num, p=[0.4, 0.6]),
            np.clip(generator.normal(0.15, 0.3, num), -1, 1),
            np.where(generator.random(num) < 0.4, -generator.random(num), 0),
            np.full(num, -generator.random()),
        ]
    )
    clusters = generator.integers(0, 30, num) if seed % 2 else None
    strata = generator.integers(0, 3, num) if seed % 3 else None
    found = difference(values, clusters, strata, bounds=UNIT, resamples=500)
    assert leaves_zero_out(found) == (found.p_value < SIGNIFICANCE)
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12


# ---- coverage ----


def shares(won: float, lost: float) -> Draw:
    return lambda num, rng: (rng.choice([1.0, -1, 0], num, p=[won, lost, 1 - won - lost]),)


def documents(num: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """One to nine samples of each document, which lose 0 to 50 % and win 5 %: mean -7/60."""
    sizes = rng.integers(1, 10, num)
    lost = np.repeat(rng.beta(1, 2, num) / 2, sizes)
    uniform = rng.random(len(lost))
    return (uniform > 0.95) * 1.0 - (uniform < lost), np.repeat(np.arange(num), sizes)


def documents_without_a_difference(num: int, rng: np.random.Generator) -> tuple[Any, ...]:
    values, clusters = documents(num, rng)
    return values * rng.choice([-1, 1], num)[clusters], clusters


def five_parts(num: int, rng: np.random.Generator) -> tuple[Any, ...]:
    strata = np.arange(num) % 5
    won = np.array([0.45, 0.2, 0.25, 0.15, 0.05])[strata]
    uniform = rng.random(num)
    return (uniform < won) * 1.0 - (uniform > 0.85), None, strata


# The lines of the table in intervals.py, with their true means.
DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda num, rng: (rng.normal(0.3, 1, num),), 0.3),
    "all lost, exponential": (lambda num, rng: (-rng.exponential(size=num),), -1.0),
    "a fifth lost, evenly between 0 and 1": (
        lambda num, rng: (np.where(rng.random(num) < 0.2, -rng.random(num), 0),),
        -0.1,
    ),
    "20 % won, 5 % lost": (shares(0.2, 0.05), 0.15),
    "3 % won, 2 % lost": (shares(0.03, 0.02), 0.01),
    "16 % lost, none won": (shares(0, 0.16), -0.16),
    "95 % lost, none won": (shares(0, 0.95), -0.95),
    "n documents of 1 to 9 samples": (documents, 0.05 - 1 / 6),
    "five parts": (five_parts, 0.07),
    "no difference: normal": (lambda num, rng: (rng.normal(size=num),), 0.0),
    "no difference: 15 % won, 15 % lost": (shares(0.15, 0.15), 0.0),
    "no difference: n documents of 1 to 9 samples": (documents_without_a_difference, 0.0),
}
SIZES = (5, 10, 20, 100)


def measure(name: str, num: int, experiments: int, resamples: int) -> tuple[float, float]:
    """Percent of intervals that hold the true mean, and of tests that reject 0."""
    draw, mean = DRAWS[name]
    is_score = "normal" not in name and "exponential" not in name
    generator, held, rejected = np.random.default_rng(3), 0, 0
    for _ in range(experiments):
        found = difference(
            *draw(num, generator), bounds=UNIT if is_score else None, resamples=resamples
        )
        # Without limits an interval leaves nothing out.
        held += not (found.low > mean + 1e-9 or found.high < mean - 1e-9)
        rejected += found.p_value < SIGNIFICANCE
        assert leaves_zero_out(found) == (found.p_value < SIGNIFICANCE)
    return 100 * held / experiments, 100 * rejected / experiments


def recorded(name: str) -> list[float]:
    """The figures of a line in the table of intervals.py."""
    (line,) = [
        line for line in (intervals.__doc__ or "").splitlines() if line.startswith(f"  {name}  ")
    ]
    return [float(figure) for figure in line[len(name) + 2 :].split()]


@pytest.mark.parametrize("num", [5, 10, 20])
@pytest.mark.parametrize("name", DRAWS)
def test_intervals_of_differences_hold_the_true_mean(name: str, num: int) -> None:
    held, rejected = measure(name, num, experiments=150, resamples=300)
    assert held >= 86  # 90 at worst, less three standard errors of so few experiments
    if name.startswith("no difference"):
        assert rejected <= 11


@pytest.mark.slow
@pytest.mark.parametrize(("place", "num"), list(enumerate(SIZES)))
@pytest.mark.parametrize("name", DRAWS)
def test_intervals_of_differences_hold_what_is_recorded(name: str, place: int, num: int) -> None:
    held, rejected = measure(name, num, experiments=2000, resamples=2000)
    measured = rejected if name.startswith("no difference") else held
    assert measured == pytest.approx(recorded(name)[place], abs=2)
    assert held > 90


@pytest.mark.slow
def test_the_flips_alone_would_hold_too_few() -> None:
    """So the tests above would notice."""
    draw, mean = DRAWS["3 % won, 2 % lost"]
    generator = np.random.default_rng(0)
    limits = [flips_of(*draw(10, generator), resamples=1024) for _ in range(500)]
    assert np.mean([one.low <= mean <= one.high for one in limits]) < 0.4
