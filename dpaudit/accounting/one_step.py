"""eps of a single step in closed form, where the sampling has one: no lattice, and no rounding of an FFT.

Poisson batches under add-remove and zero-out: delta_q(ln(1 + q (e^g - 1))) = q delta(g), with delta that of the noise
alone (Balle, Barthe and Gaboardi 2018, theorem 9); the order "without the unit first" leaks less for every eps >= 0
(Zhu, Dong and Wang 2022, proposition 30). Subsets of fixed size: the same with twice the distance
(dpaudit.accounting.schemes).
Poisson batches under replace, and several units: with z where the loss is eps, delta = P(z, inf) - e^eps Q(z, inf).
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from dpaudit.accounting.events import DpSgd, GroupOfUnits
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.group_step import Group
from dpaudit.accounting.pairs import UNIT, TwoSided
from dpaudit.accounting.schemes import moved

_WIDEST = 600.0  # eps whose exponential is a number
_ROUNDED = 1e-14  # what rounding may take from eps near 0


def one_step_epsilon(step: DpSgd, delta: float) -> float:
    """The smallest eps >= 0 of one step, rounded up; inf where there is no closed form, or none that a float holds."""
    if step.steps != 1 or step.sampling == "allocation":
        return math.inf
    if isinstance(step, GroupOfUnits):
        return _least(Group(step, 40.0).delta, delta)
    shift, rate = moved(step) / step.noise_multiplier, step.sample_rate
    if step.relation == "replace" and step.sampling != "fixed" and rate < 1:
        return _replaced(step, delta)
    if delta >= rate:  # more than the step can differ by
        return 0.0
    own = _laplace(shift, delta / rate) if step.noise == "laplace" else _gaussian(shift, delta / rate)
    if own > _WIDEST:
        return math.inf
    return math.log1p(rate * math.expm1(own)) * (1.0 + 1e-12) + _ROUNDED


def _gaussian(shift: float, delta: float) -> float:
    return gaussian_epsilon(shift, delta) if delta < 1 else 0.0


def _laplace(shift: float, delta: float) -> float:
    """delta(eps) = 1 - e^((eps - shift) / 2) for eps <= shift."""
    return max(0.0, shift + 2.0 * math.log1p(-delta)) * (1.0 + 1e-12)


def _replaced(step: DpSgd, delta: float) -> float:
    shift, rate = 0.5 * moved(step) / step.noise_multiplier, step.sample_rate
    pair = TwoSided(shift, rate, 40.0)

    def value(epsilon: float) -> float:
        z = float(pair.outputs(np.array([epsilon]))[0])
        alone, there, opposite = float(ndtr(-z)), float(ndtr(shift - z)), float(ndtr(-shift - z))
        terms = rate * there, rate * math.exp(epsilon) * opposite, (1.0 - rate) * math.expm1(epsilon) * alone
        # Rounded up: each term is right to some units of roundoff, z included.
        rounding = 64.0 * UNIT * (1.0 + z * z + shift * (abs(z) + shift)) * sum(terms)
        return terms[0] - terms[1] - terms[2] + rounding

    return _least(value, delta)


def _least(value: Callable[[float], float], delta: float) -> float:
    """The smallest eps >= 0 with value(eps) <= delta, which falls; inf where that is beyond what floats hold."""
    if value(0.0) <= delta:
        return 0.0
    high = 1.0
    while value(high) > delta:
        high *= 2.0
        if high > _WIDEST:
            return math.inf
    found = float(brentq(lambda epsilon: value(epsilon) - delta, 0.0, high, xtol=1e-300, rtol=1e-13, maxiter=1000))
    return found * (1.0 + 1e-12) + _ROUNDED
