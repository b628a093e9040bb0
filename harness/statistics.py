"""How sure a mean score is, and whether two policies differ on the same samples.

Samples of one document depend on each other, so documents (clusters) are what is resampled, flipped
and counted; without them every sample is its own. With strata (parts of a benchmark) the mean is
the macro average over them and documents are resampled within each. The same label in two strata
means two documents. Standard errors are those of a ratio of sums over documents (Cochran, Sampling
Techniques, 1977); C documents in H strata leave C - H degrees of freedom.

A mean of scores between known bounds gets Wilson's interval (1927), with Student's t and the
effective sample size mean (1 - mean) / se^2 (Korn and Graubard, Survey Methodology 24, 1998). Any
other mean, as that of a difference, gets a percentile bootstrap over documents whose limits are
stretched about the mean by t / z and by se over the se without n - 1 (cf. Hesterberg, The American
Statistician 69, 2015). Both were chosen by measuring coverage:

  true mean held by 95 % intervals, in % of experiments    n = 20    50   200
  Wilson     0 or 1, chance 0.5 (exact)                      95.9  96.7  94.4
             0 or 1, chance 0.1 (exact)                      95.7  97.0  95.6
             the worst chance from 0.01 to 0.99              94.0  91.1  93.3
             normal                                          95.0  94.4  95.2
             skewed, beta(0.5, 2)                            94.4  94.8  95.1
             n documents of 1 to 9 samples                   94.6  95.4  95.5
  bootstrap  normal                                          95.2  95.2  95.4
             exponential                                     93.1  93.2  94.8
             20 % won, 5 % lost                              96.2  93.0  94.9
             n documents of 1 to 9 samples                   94.0  93.8  95.2
At n = 20 others do worse: the percentile bootstrap holds 92 % of normal and 89 % of beta(0.5, 2)
means, BCa 92 %; the studentised bootstrap gives [3 %, 82 %] for 3 found of 20, Wilson [5 %, 38 %].
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvarena.harness.errors import UsageError

SIGNIFICANCE = 0.05  # two-sided
POWER = 0.8
_BLOCK = 2**22  # random numbers held at a time

Floats = NDArray[np.float64]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """mean, its confidence limits, its standard error, and how many values and documents it has."""

    mean: float
    low: float
    high: float
    se: float
    num_samples: int
    num_clusters: int


@dataclass(frozen=True)
class Difference:
    """Mean of values minus reference over num_pairs samples.

    p_value: of the hypothesis that each document's difference is as likely to be its negative.
    detectable: the true difference that a test at 5 % (two-sided) finds in 80 % of experiments.
    """

    mean: float
    low: float
    high: float
    se: float
    p_value: float
    num_pairs: int
    detectable: float


@dataclass(frozen=True)
class _Documents:
    """Values by document. sums, sizes: [C]; strata: [C], 0 to H - 1; scale: largest value."""

    sums: Floats
    sizes: Floats
    strata: NDArray[np.int64]
    scale: float

    @property
    def counts(self) -> NDArray[np.int64]:
        """Documents per stratum [H]."""
        return np.bincount(self.strata)

    @property
    def shares(self) -> Floats:
        """What one unit of a document's sum adds to the mean [C]."""
        per_stratum = np.bincount(self.strata, self.sizes) * len(self.counts)
        return 1 / per_stratum[self.strata]

    @property
    def means(self) -> Floats:
        """Mean per stratum [H]."""
        return np.bincount(self.strata, self.sums) / np.bincount(self.strata, self.sizes)

    def errors(self) -> tuple[float, float]:
        """Standard error of the macro mean, and the one without the correction for few documents.

        The first is NaN where a stratum has one document only: nothing shows its spread.
        """
        deviations = self.shares * (self.sums - self.means[self.strata] * self.sizes)
        plain = math.sqrt(deviations @ deviations)
        if self.counts.min() < 2:
            return math.nan, plain
        if plain <= 1e-12 * self.scale:  # rounding, not spread
            return 0.0, 0.0
        correction = self.counts / (self.counts - 1)
        return math.sqrt(correction[self.strata] @ deviations**2), plain


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    *,
    bounds: Bounds | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` with its confidence interval.

    bounds: the least and largest value possible, (0, 1) for scores: Wilson's interval. None: the
    stretched bootstrap; ``resamples`` and ``seed`` are its own.
    The limits are NaN where a stratum has one document only. Equal values do not mean certainty:
    between bounds, the limits then allow for the largest share of documents that could differ
    and not have shown up (for scores all 0 or 1 this is Clopper and Pearson's exact interval);
    without bounds they are NaN. No values give NaN and zero counts. UsageError on bad input.
    """
    if bounds and (np.less(values, bounds[0]).any() or np.greater(values, bounds[1]).any()):
        raise UsageError(f"values leave the bounds {bounds}; give the bounds they have, or none")
    if not 0 < level < 1:
        raise UsageError(f"level={level} is not between 0 and 1; 0.95 is usual")
    documents = _by_document(values, clusters, strata)
    num_samples, num_documents = int(documents.sizes.sum()), len(documents.sums)
    if not num_documents:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean, (se, plain) = float(documents.means.mean()), documents.errors()
    degrees = num_documents - len(documents.counts)
    low = high = math.nan
    if se == 0 and bounds:
        low, high = _limits_of_equal(documents, bounds, level)
    elif se > 0 and bounds:
        low, high = _wilson_limits(mean, se, t_quantile((1 + level) / 2, degrees), bounds)
    elif se > 0:
        means = _resampled_means(documents, resamples, np.random.default_rng(seed))
        normal = NormalDist().inv_cdf((1 + level) / 2)
        stretch = t_quantile((1 + level) / 2, degrees) / normal * se / plain
        tails = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        low, high = mean + stretch * (tails - mean)
    return Interval(mean, float(low), float(high), se, num_samples, num_documents)


def paired_difference(
    values: ArrayLike,
    reference: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    *,
    bounds: Bounds | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of ``values - reference``, two [n] arrays over the same samples in the same order.

    The p-value is that of flipping the sign of whole documents: over all flips where there are at
    most ``resamples`` of them, else over random ones, itself counted in (Phipson and Smyth, 2010).
    Documents without a difference cannot change it; fewer than six others never reach 5 %.
    bounds: of the values; they clip the limits, and give some to differences that are all equal.
    detectable: the estimate is normal around the true difference and found beyond t(97.5 %)
    standard errors, so 80 % of estimates are found when it is t(97.5 %) + t(80 %) of them away,
    2.80 with many documents. NaN where the standard error is 0 or NaN.
    """
    if np.shape(values) != np.shape(reference):
        num, other = np.size(values), np.size(reference)
        raise UsageError(f"{num} and {other} values are no pairs; give those of the same samples")
    widest = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if bounds else (-math.inf, math.inf)
    difference = np.subtract(values, reference, dtype=float)
    found = mean_interval(difference, clusters, strata, level=level, resamples=resamples, seed=seed)
    if not found.num_samples:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    documents = _by_document(difference, clusters, strata)
    low, high = np.clip([found.low, found.high], *widest).tolist()
    if found.se == 0 and bounds:
        low, high = _limits_of_equal(documents, widest, level)
    detectable = math.nan
    if found.se > 0:
        degrees = found.num_clusters - len(documents.counts)
        quantiles = t_quantile(1 - SIGNIFICANCE / 2, degrees) + t_quantile(POWER, degrees)
        detectable = quantiles * found.se
    p_value = _sign_flip_p(documents.shares * documents.sums, resamples, seed)
    return Difference(found.mean, low, high, found.se, p_value, found.num_samples, detectable)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values (1979), in the order given; NaN (no test) stays and counts not."""
    given = np.asarray(p_values, float)
    adjusted = np.full(given.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    scaled = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t."""
    # At x = sqrt(degrees) tan(angle) the density by angle is cos(angle)^(degrees - 1).
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(abs(2 * probability - 1), area / area[-1], angles)
    return math.copysign(math.sqrt(degrees) * math.tan(angle), probability - 0.5)


def _by_document(
    values: ArrayLike, clusters: ArrayLike | None, strata: ArrayLike | None
) -> _Documents:
    numbers = np.asarray(values, float)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise UsageError("values must be finite numbers in one dimension; leave missing ones out")
    num = len(numbers)
    labels = [np.arange(num) if clusters is None else np.asarray(clusters)]
    labels.append(np.zeros(num, int) if strata is None else np.asarray(strata))
    if any(label.shape != numbers.shape for label in labels):
        raise UsageError(f"{num} values need as many clusters and strata, one for each")
    document, stratum = (np.unique(label, return_inverse=True)[1] for label in labels)
    pairs, place = np.unique(stratum * num + document, return_inverse=True)
    sums = np.bincount(place, numbers).astype(float)
    sizes = np.bincount(place).astype(float)
    return _Documents(sums, sizes, pairs // max(num, 1), float(np.abs(numbers).max(initial=0)))


def _wilson_limits(mean: float, se: float, quantile: float, bounds: Bounds) -> Bounds:
    # Wilson solves |mean - m| = quantile * sqrt(m (1 - m) / n) for m; n is the size of a simple
    # sample of zeros and ones that would have this standard error.
    least, width = bounds[0], bounds[1] - bounds[0]
    share, error = (mean - least) / width, se / width
    ratio = quantile**2 * error**2 / (share * (1 - share))
    centre = (share + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    return least + width * (centre - half), least + width * (centre + half)


def _limits_of_equal(documents: _Documents, bounds: Bounds, level: float) -> Bounds:
    # A share s of unlike documents stays unseen with probability (1 - s)^C. In H strata the mean
    # share is bounded as if each had as few documents as the smallest.
    trials = len(documents.counts) * documents.counts.min()
    unseen = 1 - ((1 - level) / 2) ** (1 / trials)
    mean, means = documents.means.mean(), documents.means
    low = mean - unseen * (means.max() - bounds[0])
    high = mean + unseen * (bounds[1] - means.min())
    return max(float(low), bounds[0]), min(float(high), bounds[1])


def _resampled_means(
    documents: _Documents, resamples: int, generator: np.random.Generator
) -> Floats:
    means = np.zeros(resamples)
    for stratum, count in enumerate(documents.counts):
        own = documents.strata == stratum
        sums, sizes = documents.sums[own], documents.sizes[own]
        for block in _blocks(resamples, count):
            drawn = generator.integers(count, size=(block.stop - block.start, count))
            means[block] += sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means / len(documents.counts)


def _sign_flip_p(contributions: Floats, resamples: int, seed: int) -> float:
    moving = contributions[contributions != 0]
    # Sums that are equal on paper may differ in their last bits.
    observed = abs(moving.sum()) - 1e-9 * np.abs(moving).sum()
    if 2 ** min(len(moving), 60) <= resamples:
        sums = np.zeros(1)
        for contribution in moving:
            sums = np.concatenate([sums + contribution, sums - contribution])
        return float(np.mean(np.abs(sums) >= observed))
    generator = np.random.default_rng(seed)
    extreme = 0
    for block in _blocks(resamples, len(moving)):
        signs = generator.choice([-1.0, 1.0], size=(block.stop - block.start, len(moving)))
        extreme += int(np.sum(np.abs(signs @ moving) >= observed))
    return (1 + extreme) / (1 + resamples)


def _blocks(total: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
