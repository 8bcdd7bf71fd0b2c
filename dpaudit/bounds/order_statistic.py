"""One-run tail by order statistics: Xiang et al., "Tight Privacy Audit in One Run" (2025, arXiv 2509.08704).

n canaries with fair coins; the r most confident guesses are released, u of them wrong. If every canary is an
independent draw through one channel and is guessed as well as can be, the confidence of the best unreleased guess sits
at quantile W ~ Beta(n - r, r + 1), and given W the released ones err independently with the mean error above W:

    P[errors <= u] = E_W[ P[Bin(r, G(W) / (1 - W)) <= u] ]   (r < n),      P[Bin(n, G(0)) <= u]   (r = n).

A worse guesser, or a mechanism that leaks less (a larger G), only errs more. The bound is the
largest member of a family whose p-value is at most 1 - confidence.

What it assumes: the family, *and* that canaries do not share their fate. The tail is exact for canaries on separate
directions of the noise (orthogonal injected gradients); it is NOT a theorem for every mechanism with this trade-off
curve: one that tosses a single hidden coin for all canaries and leaks more or less by it can satisfy the curve and
break the tail (tests/dpaudit/bounds/test_interference.py shows it). docs/statistics.md reports what simulations of
canaries that meet (clipped sums, shared batches, correlated noise) found, which is evidence and not proof.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaln

from dpaudit import validate
from dpaudit.bounds.gdp import epsilon_from_mu
from dpaudit.bounds.profile import GaussianProfile, Profile
from dpaudit.bounds.roots import largest_below

Floats = npt.NDArray[np.float64]

# The integrand is smooth on the scale of the Beta's standard deviation; 18 of them leave less than 1e-70 outside.
NODES, WIDTH = 1201, 18.0


def _at_most(u: int, trials: int, error: Floats) -> Floats:
    """P[Binomial(trials, error) <= u]."""
    if u >= trials:
        return np.ones_like(error)
    return np.asarray(betainc(trials - u, u + 1, 1.0 - np.clip(error, 0.0, 1.0)), dtype=np.float64)


@lru_cache(maxsize=1024)
def _cut(n: int, r: int) -> tuple[Floats, Floats]:
    """Nodes of W ~ Beta(n - r, r + 1) and their weights, which sum to 1."""
    a, b = n - r, r + 1
    mean = a / (a + b)
    sd = math.sqrt(a * b / (a + b + 1)) / (a + b)
    low, high = max(0.0, mean - WIDTH * sd), min(1.0, mean + WIDTH * sd)
    edges = np.linspace(low, high, NODES + 1)
    w = 0.5 * (edges[1:] + edges[:-1])
    log_density = (a - 1) * np.log(w) + (b - 1) * np.log1p(-w) - betaln(a, b)
    weights = np.exp(log_density) * (high - low) / NODES
    return w, weights / weights.sum()


def p_value(profile: Profile, *, canaries: int, guesses: int, errors: int) -> float:
    """P[at most `errors` wrong among `guesses` released of `canaries`] for independent canaries with this profile."""
    n = validate.count("canaries", canaries, least=1)
    r = validate.count("guesses", guesses, most=n)
    u = validate.count("errors", errors, most=r)
    if u == r:
        return 1.0
    if r == n:
        return float(_at_most(u, n, profile.error_above(np.zeros(1)))[0])
    w, weights = _cut(n, r)
    tail = _at_most(u, r, profile.error_above(w) / (1.0 - w))
    return min(1.0, float(weights @ tail))


def family_lower(
    family: Callable[[float], Profile],
    *,
    canaries: int,
    guesses: int,
    errors: int,
    confidence: float,
    most: float = 1e3,
    tolerance: float = 1e-9,
) -> float:
    """The largest parameter of an increasingly leaky `family` that is refuted; `most` if every member is."""
    level = 1.0 - validate.confidence(confidence)

    def tail(parameter: float) -> float:
        return p_value(family(parameter), canaries=canaries, guesses=guesses, errors=errors)

    return largest_below(tail, level, most=most, tolerance=tolerance)


@lru_cache(maxsize=1 << 14)
def mu_lower(*, canaries: int, guesses: int, errors: int, confidence: float) -> float:
    """Lower bound on mu within the Gaussian family. Memoised on counts."""
    return family_lower(
        GaussianProfile, canaries=canaries, guesses=guesses, errors=errors, confidence=confidence, tolerance=1e-7
    )


def epsilon_lower(*, canaries: int, guesses: int, errors: int, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` within the Gaussian family (`assumes: gaussian`)."""
    validate.delta(delta)
    mu = mu_lower(canaries=canaries, guesses=guesses, errors=errors, confidence=confidence)
    return epsilon_from_mu(mu, delta)


def ceiling(*, canaries: int, guesses: int, delta: float, confidence: float) -> float:
    """The largest bound that this game can show: no error at all."""
    return epsilon_lower(canaries=canaries, guesses=guesses, errors=0, delta=delta, confidence=confidence)
