"""The Gaussian mechanism in closed form: the oracle of every accountant, and exact where nothing is subsampled."""

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from dpaudit.accounting.events import check_delta


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta(eps) of N(0,1) against N(mu,1): Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle & Wang 2018)."""
    if mu <= 0 or epsilon == math.inf:
        return 0.0
    first = float(ndtr(mu / 2 - epsilon / mu))
    second = math.exp(min(0.0, epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))))
    return max(0.0, first - second)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest eps >= 0 with gaussian_delta(mu, eps) <= delta; inf for mu = inf."""
    check_delta(delta)
    if mu > 1e150:  # mu^2 / 2 overflows
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    found = float(
        brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, high, xtol=1e-300, rtol=1e-13, maxiter=1000)
    )
    # The two terms of delta cancel for a small mu, and at a root near 0: never below it.
    return found * (1.0 + 1e-12 + 1e-15 / min(mu, 1.0)) + 1e-14 * min(mu, 1.0)
