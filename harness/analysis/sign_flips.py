"""The sign-flip test of a mean difference, and the means that it does not reject.

If two policies differ by chance alone, each document's difference is as likely to be its negative.
The p-value is the share of sign flips whose mean is as far from 0 as the one observed. Tested for
every other mean m, on the differences less m, the same flips give an interval: the means that are
not rejected. It needs no search: less m, flipped documents add up to F and the others to R, and
|R - F| >= |R + F| says that one of the sums is positive and the other is not, so that m lies
between the means of the two sets (Hartigan's typical values, Journal of the American Statistical
Association 64, 1969). Every flip thus accepts the means between two known ones, all those pairs
enclose the observed mean, and the limits are quantiles of their ends.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.05  # two-sided
# The fewest documents whose flips can be significant: 2 of 2^6 are below 5 %, 2 of 2^5 are not.
LEAST_DOCUMENTS = math.ceil(1 - math.log2(SIGNIFICANCE))
_BLOCK = 2**22  # signs held at a time

Floats = NDArray[np.float64]


class SignFlips(NamedTuple):
    """p_value of a mean of 0; low, high: limits of the means that are not rejected at 5 %.

    The limits are infinite where no mean is rejected. 0 lies outside exactly if p_value < 0.05.
    """

    p_value: float
    low: float
    high: float


def sign_flip_test(amounts: Floats, weights: Floats, *, resamples: int, seed: int) -> SignFlips:
    """Test of the mean to which documents add ``amounts`` [C]; weights [C]: their shares in it.

    All flips are made where there are at most ``resamples`` of them, else random ones, and the
    observed one counts in (Phipson and Smyth, 2010). Documents without a difference, which cannot
    change the p-value, are not counted for that; they then change sign at random.
    """
    flips = _flips(amounts, resamples, seed)
    low, high = np.concatenate([_accepted(one, amounts, weights) for one in flips], axis=1)
    p_value = np.mean((low <= 0) & (high >= 0))
    least = math.ceil(SIGNIFICANCE * len(low))  # so many flips must accept a mean
    return SignFlips(float(p_value), float(np.sort(low)[least - 1]), float(np.sort(high)[-least]))


def _flips(amounts: Floats, resamples: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which documents change sign, in blocks [flips, C]."""
    num = len(amounts)
    # All flips of all documents, else all of those that the test of 0 turns on, else random ones.
    listed = np.arange(num) if 2**num <= resamples else np.flatnonzero(amounts)
    num_listed = 2 ** len(listed)
    is_random = num_listed > resamples
    total = 1 + resamples if is_random else resamples // num_listed * num_listed
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // num)
    for start in range(0, total, step):
        places = np.arange(start, min(start + step, total))
        flipped = generator.integers(2, size=(len(places), num), dtype=bool)
        if not is_random:
            flipped[:, listed] = places[:, None] >> np.arange(len(listed)) & 1
        elif not start:
            flipped[0] = False
        yield flipped


def _accepted(flipped: NDArray[np.bool_], amounts: Floats, weights: Floats) -> Floats:
    """Least and largest mean that each flip accepts [2, flips]."""
    sums, shares = (flipped @ np.stack([amounts, weights], axis=1)).T
    # Sums that are 0 on paper may differ from it in their last bits.
    rounding = 1e-9 * np.abs(amounts).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        means = [
            np.where(np.abs(part) <= rounding, 0, part) / share
            for part, share in ((sums, shares), (amounts.sum() - sums, weights.sum() - shares))
        ]
    # Flipping all documents or none is as far from any mean.
    some = flipped.any(axis=1) & ~flipped.all(axis=1)
    low = np.where(some, np.minimum(*means), -np.inf)
    high = np.where(some, np.maximum(*means), np.inf)
    return np.stack([low, high])
