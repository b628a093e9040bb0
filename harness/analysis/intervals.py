"""How sure a mean score is, and whether two policies differ on the same samples.

Samples of one document depend on each other, so documents (clusters) are what is flipped and
counted; without them every sample is its own. With strata (parts of a benchmark) the mean is the
macro average over them. The same label in two strata means two documents. Standard errors are
those of a ratio of sums over documents (Cochran, Sampling Techniques, 1977); C documents in H
strata leave C - H degrees of freedom.

A mean of scores between known bounds gets Wilson's interval (1927), with Student's t and the
effective sample size mean (1 - mean) / se^2 (Korn and Graubard, Survey Methodology 24, 1998). Any
other mean gets Student's interval. Both were chosen by measuring coverage:

  true mean held by 95 % intervals, in % of experiments    n = 20    50   200
  Wilson     0 or 1, chance 0.5 (exact)                      95.9  96.7  94.4
             0 or 1, chance 0.1 (exact)                      95.7  97.0  95.6
             the worst chance from 0.01 to 0.99              94.0  91.1  93.3
             normal                                          95.0  94.4  95.2
             skewed, beta(0.5, 2)                            94.4  94.8  95.1
             n documents of 1 to 9 samples                   94.6  95.4  95.5
  Student    normal                                          95.3  94.8  95.4
             exponential                                     92.9  93.3  94.4
At n = 20 others do worse: the percentile bootstrap holds 92 % of normal and 89 % of beta(0.5, 2)
means, BCa 92 %; the studentised bootstrap gives [3 %, 82 %] for 3 found of 20, Wilson [5 %, 38 %].

A difference gets the means that its test does not reject (sign_flips.py), so 0 lies outside of its
95 % interval exactly if p < 0.05. That test asks whether the differences scatter evenly around a
mean, which those that are mostly 0 do around no other: with one sample of 20 lost it would rule
out any gain. The limits are therefore at least those that allow for the largest share of documents
that could differ and not have shown up, as Clopper and Pearson's do: with differences as large as
the largest one seen, either way, or, on the side of 0 where p < 0.05, with none. With fewer than
six documents nothing is rejected: the limits are those of the scores. A mean over parts that
differ otherwise than by chance gets a wider interval than it needs.

  true mean held by 95 % intervals, in %             n =  5    10    20   100
  normal                                              100  95.8  95.1  94.2
  all lost, exponential                               100  90.8  92.2  94.0
  a fifth lost, evenly between 0 and 1                100  91.2  92.0  93.7
  20 % won, 5 % lost                                  100  99.2  95.4  94.8
  3 % won, 2 % lost                                   100   100   100  96.4
  16 % lost, none won                                 100  99.7  99.5  94.0
  95 % lost, none won                                 100   100  99.9  95.8
  n documents of 1 to 9 samples                       100  95.3  96.0  95.3
  five parts                                          100  98.5  95.2  95.6
  p < 0.05 without a difference, in %
  no difference: normal                                 0   5.0   5.0   5.8
  no difference: 15 % won, 15 % lost                    0   0.3   1.9   3.1
  no difference: n documents of 1 to 9 samples          0   1.4   2.6   4.2
The flips alone would hold 25 % of the means at n = 10 where 3 % are won and 2 % lost.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from kvarena.harness.analysis.sign_flips import (
    LEAST_DOCUMENTS,
    SIGNIFICANCE,
    Floats,
    SignFlips,
    sign_flip_test,
)
from kvarena.harness.errors import UsageError

POWER = 0.8

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

    @property
    def mean(self) -> float:
        """Macro mean."""
        return float(self.means.mean())

    @property
    def weights(self) -> Floats:
        """Share of each document in the mean [C]; they sum to 1."""
        return self.shares * self.sizes

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard error."""
        return len(self.sums) - len(self.counts)

    def error(self) -> float:
        """Standard error of the macro mean.

        NaN where a stratum has one document only: nothing shows its spread.
        """
        if self.counts.min() < 2:
            return math.nan
        deviations = self.shares * (self.sums - self.means[self.strata] * self.sizes)
        if math.sqrt(deviations @ deviations) <= 1e-12 * self.scale:  # rounding, not spread
            return 0.0
        correction = self.counts / (self.counts - 1)
        return math.sqrt(correction[self.strata] @ deviations**2)

    def unseen(self) -> float:
        """The largest share of unlike documents that could well not have shown up.

        A share s stays unseen with probability (1 - s)^C. In H strata the mean share is bounded as
        if each had as few documents as the smallest.
        """
        trials = len(self.counts) * self.counts.min()
        return float(1 - (SIGNIFICANCE / 2) ** (1 / trials))


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    *,
    bounds: Bounds | None = None,
) -> Interval:
    """Mean of ``values`` with its 95 % confidence interval.

    bounds: the least and largest value possible, (0, 1) for scores: Wilson's interval; None:
    Student's t.
    The limits are NaN where a stratum has one document only. Equal values do not mean certainty:
    between bounds, the limits then allow for the largest share of documents that could differ
    and not have shown up (for scores all 0 or 1 this is Clopper and Pearson's exact interval);
    without bounds they are NaN. No values give NaN and zero counts. UsageError on bad input.
    """
    if bounds and (np.less(values, bounds[0]).any() or np.greater(values, bounds[1]).any()):
        raise UsageError(f"values leave the bounds {bounds}; give the bounds they have, or none")
    documents = _by_document(values, clusters, strata)
    num_samples, num_documents = int(documents.sizes.sum()), len(documents.sums)
    if not num_documents:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean, se = documents.mean, documents.error()
    low = high = math.nan
    if se == 0 and bounds:
        low, high = _limits_of_equal(documents, bounds)
    elif se > 0:
        quantile = stdtrit(documents.degrees, 1 - SIGNIFICANCE / 2)
        low, high = mean - quantile * se, mean + quantile * se
        if bounds:
            low, high = _wilson_limits(mean, se, quantile, bounds)
    return Interval(mean, float(low), float(high), se, num_samples, num_documents)


def paired_difference(
    values: ArrayLike,
    reference: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    *,
    bounds: Bounds | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of ``values - reference``, two [n] arrays over the same samples in the same order.

    The p-value is that of flipping the sign of whole documents: over all flips where there are at
    most ``resamples`` of them, else over random ones, itself counted in (Phipson and Smyth, 2010).
    Documents without a difference cannot change it; fewer than six others never reach 5 %.
    The limits leave 0 out exactly where it is below 5 %; see the module.
    bounds: of the values. They set the limits that differences cannot: those of fewer than six
    documents, and of differences that are all 0; without bounds those are NaN.
    detectable: the estimate is normal around the true difference and found beyond t(97.5 %)
    standard errors, so 80 % of estimates are found when it is t(97.5 %) + t(80 %) of them away,
    2.80 with many documents. NaN where the standard error is 0 or NaN, or documents are so few
    that none is ever found.
    """
    if np.shape(values) != np.shape(reference):
        num, other = np.size(values), np.size(reference)
        raise UsageError(f"{num} and {other} values are no pairs; give those of the same samples")
    # Scores that are equal on paper may differ in their last bits.
    differences = np.round(np.subtract(values, reference, dtype=float), 12)
    documents = _by_document(differences, clusters, strata)
    num_documents = len(documents.sums)
    if not num_documents:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    amounts = documents.shares * documents.sums
    flips = sign_flip_test(amounts, documents.weights, resamples=resamples, seed=seed)
    widest = bounds[1] - bounds[0] if bounds else math.inf
    low, high = (
        limit if math.isfinite(limit) else math.nan
        for limit in np.clip(_with_unseen(documents, flips, widest), -widest, widest).tolist()
    )
    se, detectable = documents.error(), math.nan
    if se > 0 and num_documents >= LEAST_DOCUMENTS:
        detectable = se * float(stdtrit(documents.degrees, [1 - SIGNIFICANCE / 2, POWER]).sum())
    num_pairs = int(documents.sizes.sum())
    return Difference(documents.mean, low, high, se, flips.p_value, num_pairs, detectable)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values (1979), in the order given; NaN (no test) stays and counts not."""
    given = np.asarray(p_values, float)
    adjusted = np.full(given.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    scaled = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


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


def _limits_of_equal(documents: _Documents, bounds: Bounds) -> Bounds:
    unseen, mean, means = documents.unseen(), documents.mean, documents.means
    low = mean - unseen * (means.max() - bounds[0])
    high = mean + unseen * (bounds[1] - means.min())
    return max(float(low), bounds[0]), min(float(high), bounds[1])


def _with_unseen(documents: _Documents, flips: SignFlips, widest: float) -> Bounds:
    # As if the largest share of unlike documents had not shown up: with a difference as large as
    # the largest seen, or as any can be where there was none. A sign that is sure stays so: towards
    # 0, the unseen ones have no difference.
    reach = float(np.abs(documents.sums / documents.sizes).max()) or widest
    seen, unseen = (1 - documents.unseen()) * documents.mean, documents.unseen() * reach
    is_sure = flips.p_value < SIGNIFICANCE
    low = seen if is_sure and seen > 0 else seen - unseen
    high = seen if is_sure and seen < 0 else seen + unseen
    return min(low, flips.low), max(high, flips.high)
