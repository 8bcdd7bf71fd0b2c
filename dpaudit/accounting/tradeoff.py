"""The trade-off curve of a mechanism: the largest true positive rate (TPR) of any attack at each false positive rate.

Every attack on a mechanism with privacy profile delta(eps), "remove" from the run with the unit (P) and "add" from the
run without it (Q), obeys for every eps >= 0

    TPR <= e^eps FPR + delta_remove(eps)     and     1 - FPR <= e^eps (1 - TPR) + delta_add(eps),

and the smallest of these bounds is the curve itself (Dong, Roth and Su 2022, proposition 2.13; Kulynych et al. 2024,
arXiv 2407.02191, read a mechanism by it). It is far below what one pair (eps, delta) allows. The profile is rounded up
by the accountant, so the curve is an upper bound for every attack.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from dpaudit.accounting.events import Direction, DpSgd, trivial
from dpaudit.accounting.groups import WIDEST
from dpaudit.accounting.pld import COARSE, discrete_losses
from dpaudit.accounting.schemes import composed_as, moved
from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]

_BOUNDS = 600  # pairs (eps, delta(eps)) of each direction whose smallest bound is taken
_RARE = 1e-12  # probability of losses beyond which no pair is tried
_LARGEST = (
    600.0  # eps whose exponential is a number; a profile that is known up to there is an upper bound all the same
)
_ROUNDING = 1e-12  # of two sums of many probabilities, and of their difference


def largest_tpr(event: DpSgd, fpr: npt.ArrayLike) -> Floats:
    """The largest true positive rate of any attack on `event` at each false positive rate: shapes (k,) -> (k,)."""
    rates = _rates(fpr)
    step = composed_as(event)
    known = trivial(step)
    if known is not None:
        return np.ones_like(rates) if known else rates
    if step.noise == "gaussian" and step.sample_rate == 1:
        mu = moved(step) * math.sqrt(step.steps) / step.noise_multiplier
        return np.asarray(ndtr(ndtri(rates) + mu), dtype=np.float64)
    if moved(step) / step.noise_multiplier > WIDEST:
        return np.ones_like(rates)
    epsilons, deltas = _profile(step, "remove")
    rising = np.exp(epsilons)[:, None] * rates + deltas[:, None]
    epsilons, deltas = _profile(step, "add")
    closing = 1.0 - np.exp(-epsilons)[:, None] * np.clip(1.0 - rates - deltas[:, None], 0.0, None)
    found = np.minimum(rising.min(axis=0), closing.min(axis=0))
    return np.asarray(np.clip(found, rates, 1.0), dtype=np.float64)


def stated_largest_tpr(epsilon: float, delta: float, fpr: npt.ArrayLike) -> Floats:
    """The same from one pair (eps, delta) alone: shapes (k,) -> (k,)."""
    rates = _rates(fpr)
    rising = math.exp(min(epsilon, 700.0)) * rates + delta
    closing = 1.0 - math.exp(-epsilon) * np.clip(1.0 - rates - delta, 0.0, None)
    return np.minimum(np.minimum(rising, closing), 1.0)


def _rates(fpr: npt.ArrayLike) -> Floats:
    rates = np.atleast_1d(np.asarray(fpr, dtype=np.float64))
    if not np.all((rates >= 0) & (rates <= 1)):
        raise rejected("fpr", fpr, "numbers from 0 to 1")
    return rates


@lru_cache(maxsize=64)
def _profile(step: DpSgd, direction: Direction) -> tuple[Floats, Floats]:
    """eps from 0 to the largest loss that is not all too rare, and delta(eps): shapes (k,)."""
    found = discrete_losses(step, direction, COARSE)
    above = np.r_[np.cumsum(found.probabilities[::-1])[::-1], 0.0]  # P(loss >= that of each place)
    other = np.r_[np.cumsum((found.probabilities * np.exp(-np.maximum(found.losses, 0.0)))[::-1])[::-1], 0.0]
    kept = found.losses[above[:-1] > _RARE]
    top = min(max(float(kept[-1]) if kept.size else 0.0, 0.0), _LARGEST)
    epsilons = np.linspace(0.0, top, _BOUNDS)
    first = np.searchsorted(found.losses, epsilons, side="right")
    # Both sums are of losses above eps only, where P exceeds e^eps Q; what rounding took from them is added.
    deltas = np.maximum(above[first] - np.exp(epsilons) * other[first], 0.0) + found.infinity_mass + _ROUNDING
    return epsilons, np.minimum(deltas, 1.0)
