"""Sampling schemes other than Poisson, each accounted by what is proven for it and by nothing more.

**Shuffled epochs.** The list of units is shuffled (independently of the data) and cut into batches; each unit is in
exactly one batch an epoch. Given the cut, changing one unit changes one batch an epoch, so an epoch is one Gaussian
mechanism on that unit (parallel composition over the others) and E epochs are mu = sqrt(E) C / sigma (replace: 2C).
This holds given every permutation, hence for their mixture. Nothing is gained from the shuffling itself: the
amplification that Poisson batches have is not proven for it (Chua et al. 2024, arXiv 2403.17673), and claiming it
understates eps. A partial epoch counts as a whole one. *The cut must not depend on the unit*: it is made over a public
number of places, and a unit that is absent leaves its place empty. A loader that closes the gap shifts every later
batch border, and one unit then touches all following batches.

**Fixed size without replacement.** A uniform subset of m of n places, gamma = m / n. With the unit drawn or not,
another unit gives way, so what moves is 2C under *every* relation that keeps n public (zero-out included: another
unit's -C may be exchanged for this one's +C). Let A be the mixture of outputs over subsets without the unit, B and B'
over those with it, in the two neighbouring data sets. Advanced joint convexity (Balle, Barthe and Gaboardi 2018,
theorem 2) gives, for alpha = 1 + gamma (alpha0 - 1) >= 1 and beta = alpha / alpha0,

    H_alpha((1-gamma) A + gamma B || (1-gamma) A + gamma B') = gamma H_alpha0(B || (1-beta) A + beta B')
                                                            <= gamma max(H_alpha0(B || A), H_alpha0(B || B')),

and coupling S with S - i + j makes each of the two at most the Gaussian's profile at distance 2C:

    h(alpha) = gamma * delta_Gaussian(2 C / sigma; ln(1 + (alpha - 1) / gamma)),       alpha >= 1,
    h(alpha) = 1 - alpha + alpha h(1 / alpha),                                         alpha < 1 (both orders of D, D').

h is convex with h(0) = 1 and h >= 1 - alpha, so a pair of distributions with this profile exists, dominates a step and
composes adaptively (Zhu, Dong and Wang 2022, arXiv 2106.08567, propositions 8 and 30, theorem 10). For alpha >= 1 a
worst case attains it: all others at -C and the unit at +C against -C.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtr

from dpaudit.accounting.events import DpSgd, GroupOfUnits, sensitivity

_DEVIATIONS = 10.0  # of the noise beyond which its mass (8e-24) is moved to infinite loss


def composed_as(event: DpSgd) -> DpSgd:
    """The event that is composed: shuffled epochs and whole data sets become full-batch steps, an allocated epoch that
    is cut short a whole one."""
    if event.sampling == "shuffle":
        return replace(event, sampling="poisson", sample_rate=1.0, steps=event.epochs)
    if event.sampling == "fixed" and event.sample_rate == 1:
        return replace(event, sampling="poisson")
    if event.sampling == "allocation":
        if event.draws == event.epoch_steps:  # everybody in every step
            return replace(event, sampling="poisson", sample_rate=1.0, epoch=None)
        return replace(event, steps=event.epochs * event.epoch_steps, epoch=event.epoch_steps)
    if event.sampling == "fixed":  # the same numbers under every relation
        return replace(event, relation="replace")
    return event


def moved(event: DpSgd) -> float:
    """What one unit (or a group) can move in one step, in units of C; 2 whatever the relation where another unit gives
    way."""
    units = event.units if isinstance(event, GroupOfUnits) else 1
    return 2.0 if event.sampling == "fixed" else units * sensitivity(event.relation)


def fixed_size_delta(sigma: float, rate: float, losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """h(e^loss) of one step with a subset of fixed size: (k,) deltas for (k,) losses of either sign."""
    size = np.abs(losses)
    # ln(1 + (e^size - 1) / rate), also where e^size overflows.
    shifted = np.where(size > 500, size - math.log(rate), np.log1p(np.expm1(np.minimum(size, 500.0)) / rate))
    base = _gaussian_deltas(2.0 / sigma, shifted)
    above = rate * base
    return np.where(losses >= 0, above, -np.expm1(np.minimum(losses, 0.0)) + np.exp(-size) * above)


def fixed_size_deltas(sigma: float, rate: float, grid: float) -> tuple[int, npt.NDArray[np.float64]]:
    """(top, deltas): the profile of one step on the losses -top * grid, ..., top * grid."""
    mu = 2.0 / sigma
    reach = mu * mu / 2 + _DEVIATIONS * mu
    amplified = float(np.logaddexp(math.log1p(-rate), math.log(rate) + reach))
    top = max(1, math.ceil(amplified / grid))
    deltas = fixed_size_delta(sigma, rate, np.arange(-top, top + 1, dtype=np.float64) * grid)
    return top, np.clip(deltas, 0.0, 1.0)


def _gaussian_deltas(mu: float, eps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`gaussian_delta` for many eps."""
    second = np.exp(np.minimum(0.0, eps + log_ndtr(-mu / 2 - eps / mu)))
    return np.maximum(0.0, ndtr(mu / 2 - eps / mu) - second)
