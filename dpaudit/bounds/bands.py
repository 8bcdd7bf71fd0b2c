"""Upper limits on error rates that hold for every threshold at once, for bounds whose threshold is chosen by looking.

Let k of n independent scores lie beyond a threshold. Wherever the threshold sits between two scores, the true rate
beyond it is at most the (k+1)-th smallest of n uniforms in law, Beta(k + 1, n - k). A band is a vector b, b[k] for
k = 0..n, with P[all U_(k+1) <= b[k]] >= 1 - error. Ties are harmless: a threshold can't split them, so it only uses
some of the k.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaincinv, gammaln

from dpaudit import validate

Floats = npt.NDArray[np.float64]

GRID = 200  # values of k that carry a constraint of their own when n is large


def bonferroni(n: int, error: float) -> Floats:
    """Clopper-Pearson at error / n for each of the n informative k (b[n] = 1 says nothing)."""
    k = np.arange(n)
    return np.asarray(np.r_[betaincinv(k + 1, n - k, 1.0 - error / n), 1.0], dtype=np.float64)


def dkw(n: int, error: float) -> Floats:
    """Dvoretzky-Kiefer-Wolfowitz with Massart's constant, one-sided: k/n + sqrt(ln(1/error) / 2n), for error <= 1/2."""
    validate.real("error", error, low=0.0, high=0.5, open_low=True)
    return np.minimum(1.0, np.arange(n + 1) / n + math.sqrt(math.log(1.0 / error) / (2.0 * n)))


@lru_cache(maxsize=256)
def _band(n: int, error: float) -> Floats:
    points = _grid(n)
    low, high = math.log(error / n), math.log(error)
    # log of the local level: at error/n the union bound holds, at error it can't.
    for _ in range(20):  # the level to a millionth, rounded to the safe side
        middle = 0.5 * (low + high)
        if crossing_free(n, points, _local(n, points, math.exp(middle))) >= 1.0 - error:
            low = middle
        else:
            high = middle
    limits = _local(n, points, math.exp(low))
    # A k without a constraint of its own takes the limit of the next larger one that has.
    band: Floats = np.r_[limits[np.searchsorted(points, np.arange(n))], 1.0]
    band.setflags(write=False)
    return band


def order_statistic(n: int, error: float) -> Floats:
    """Equal local levels (Berk-Jones type): every k has the same one-sided level, the largest at which the whole band
    holds with probability 1 - error, computed exactly. Tighter than DKW in the tails, where audits look. Memoised."""
    return _band(validate.count("n", n, least=1), float(error))


def _grid(n: int) -> npt.NDArray[np.intp]:
    if n <= GRID:
        return np.arange(n)
    ends = np.unique(np.round(np.geomspace(1, n / 2, GRID // 2)).astype(np.intp)) - 1
    return np.unique(np.r_[ends, n - 1 - ends])


def _local(n: int, points: npt.NDArray[np.intp], level: float) -> Floats:
    return np.asarray(betaincinv(points + 1, n - points, 1.0 - level), dtype=np.float64)


def crossing_free(n: int, points: npt.NDArray[np.intp], limits: Floats) -> float:
    """P[U_(k+1) <= limits at every k of `points`] for n uniforms; exact.

    At least k + 1 points must lie below the limit of k. A Poisson process of rate n conditioned on n points is a sample
    of n uniforms, so the count moves by independent Poisson steps and states that break a constraint are dropped.
    """
    start, weights = 0, np.ones(1)  # P[count = start + i and no constraint broken so far]
    before = 0.0
    for k, limit in zip(points, limits, strict=True):
        start, weights = _advance(start, weights, n, limit - before)
        drop = max(0, k + 1 - start)
        start, weights = start + drop, weights[drop:]
        before = float(limit)
        if weights.size == 0:
            return 0.0
    start, weights = _advance(start, weights, n, 1.0 - before)
    if not start <= n < start + weights.size:
        return 0.0
    log_all = n * math.log(n) - n - float(gammaln(n + 1))
    return min(1.0, float(weights[n - start]) / math.exp(log_all))


def _advance(start: int, weights: Floats, n: int, step: float) -> tuple[int, Floats]:
    """Convolve the law of the count with Poisson(n * step), within the n points there are and 12 sd of it."""
    mean = n * max(step, 0.0)
    low = max(0, math.floor(mean - 12 * math.sqrt(mean) - 12))
    high = min(n - start, math.ceil(mean + 12 * math.sqrt(mean) + 12))
    if high < low:
        return start + low, np.zeros(0)
    jumps = np.arange(low, high + 1)
    pmf = np.exp(jumps * math.log(mean) - mean - gammaln(jumps + 1)) if mean > 0 else (jumps == 0).astype(np.float64)
    moved = np.convolve(weights, pmf)[: n - start - low + 1]
    # The law is narrow: what lies 1e-30 below its top is dropped to keep the convolution short.
    keep = np.nonzero(moved > moved.max(initial=0.0) * 1e-30)[0]
    if keep.size == 0:
        return start + low, np.zeros(0)
    return start + low + int(keep[0]), moved[keep[0] : keep[-1] + 1]


def coverage_of_beta(n: int, k: int, limit: float) -> float:
    """P[U_(k+1) <= limit]: the level that one k has on its own."""
    return float(betainc(k + 1, n - k, limit))
