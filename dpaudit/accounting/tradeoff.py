"""The trade-off curve of a mechanism: how often members are found (TPR) when others are called members at most so often.

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
from dpaudit.accounting.pld import COARSE, discrete_losses
from dpaudit.accounting.schemes import composed_as, moved
from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]

_BOUNDS = 600  # pairs (eps, delta(eps)) of each direction whose smallest bound is taken
_RARE = 1e-12  # probability of losses beyond which no pair is tried


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
    found = np.ones_like(rates)
    for epsilon, delta in _profile(step, "remove"):
        found = np.minimum(found, math.exp(epsilon) * rates + delta)
    for epsilon, delta in _profile(step, "add"):
        found = np.minimum(found, 1.0 - math.exp(-epsilon) * np.clip(1.0 - rates - delta, 0.0, None))
    return np.maximum(found, rates)


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
def _profile(step: DpSgd, direction: Direction) -> tuple[tuple[float, float], ...]:
    """Pairs (eps, delta(eps)) from eps = 0 to the largest loss that is not all too rare."""
    found = discrete_losses(step, direction, COARSE)
    above = np.cumsum(found.probabilities[::-1])[::-1]
    kept = found.losses[above > _RARE]
    top = max(float(kept[-1]) if kept.size else 0.0, 0.0)
    return tuple(
        (float(epsilon), float(np.sum(found.probabilities * _excess(epsilon - found.losses))) + found.infinity_mass)
        for epsilon in np.linspace(0.0, top, _BOUNDS)
    )


def _excess(log_ratio: Floats) -> Floats:
    """max(0, 1 - e^x)."""
    return np.asarray(-np.expm1(np.minimum(log_ratio, 0.0)), dtype=np.float64)
