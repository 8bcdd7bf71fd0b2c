"""Testers for sampled mechanisms: coverage at the known divergence, power, domain."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from dpaudit.bounds import gdp, hockey_stick
from dpaudit.errors import UsageError

EDGES = np.linspace(-4, 5, 46)
AUDITS = 1000
MOST = 86  # P[Binomial(1000, 0.05) > 86] < 1e-6


def test_coverage_at_the_truth() -> None:
    """N(1, 1) against N(0, 1): the true delta at eps = 1 bounds all three testers but for the level."""
    rng = np.random.default_rng(1)
    truth = gdp.delta_from_mu(1.0, 1.0)
    above = {"histogram": 0, "counts": 0, "bounded": 0}
    for _ in range(AUDITS):
        p, q = rng.normal(size=2000) + 1, rng.normal(size=2000)
        histogram = hockey_stick.histogram_delta_lower(p, q, epsilon=1.0, edges=EDGES, confidence=0.95)
        counts = hockey_stick.delta_lower(
            hits_p=int((p > 1.5).sum()), n_p=2000, hits_q=int((q > 1.5).sum()), n_q=2000, epsilon=1.0, confidence=0.95
        )
        bounded = hockey_stick.delta_lower_bounded(
            norm.cdf(8 * (p - 1.5)), norm.cdf(8 * (q - 1.5)), epsilon=1.0, confidence=0.95
        )
        above["histogram"] += histogram > truth
        above["counts"] += counts > truth
        above["bounded"] += bounded > truth
    assert all(count <= MOST for count in above.values()), above


def test_power() -> None:
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=40_000) + 1, rng.normal(size=40_000)
    truth = gdp.delta_from_mu(1.0, 1.0)
    assert hockey_stick.histogram_delta_lower(p, q, epsilon=1.0, edges=EDGES, confidence=0.95) > 0.7 * truth
    soft = hockey_stick.delta_lower_bounded(
        norm.cdf(8 * (p - 1.5)), norm.cdf(8 * (q - 1.5)), epsilon=1.0, confidence=0.95
    )
    assert soft > 0.5 * truth
    eps = hockey_stick.histogram_epsilon_lower(p, q, guess=2.0, edges=EDGES, delta=1e-5, confidence=0.95)
    assert 1.5 < eps < gdp.epsilon_from_mu(1.0, 1e-5)


def test_epsilon_and_delta_agree() -> None:
    at = {"hits_p": 900, "n_p": 1000, "hits_q": 20, "n_q": 1000, "confidence": 0.95}
    eps = hockey_stick.epsilon_lower(delta=1e-3, **at)  # type: ignore[arg-type]
    assert hockey_stick.delta_lower(epsilon=eps, **at) == pytest.approx(1e-3, abs=1e-9)  # type: ignore[arg-type]
    assert eps <= hockey_stick.epsilon_ceiling(n_p=1000, n_q=1000, delta=1e-3, confidence=0.95)
    values = np.r_[np.ones(900), np.zeros(100)]
    soft = hockey_stick.bounded_epsilon_lower(values, 1 - values, delta=1e-3, confidence=0.95)
    assert hockey_stick.delta_lower_bounded(values, 1 - values, epsilon=soft, confidence=0.95) >= 1e-3
    assert 0 < soft < math.log(9)


def test_outside_domain() -> None:
    with pytest.raises(UsageError, match="under_p"):
        hockey_stick.delta_lower_bounded([0.1, 1.2], [0.1, 0.2], epsilon=1.0, confidence=0.95)
    with pytest.raises(UsageError, match="edges"):
        hockey_stick.histogram_delta_lower([1.0] * 9, [1.0] * 9, epsilon=1.0, edges=[1.0, 1.0], confidence=0.95)
    with pytest.raises(UsageError, match="samples_q"):
        hockey_stick.histogram_delta_lower([1.0] * 9, [math.nan] * 9, epsilon=1.0, edges=EDGES, confidence=0.95)
    with pytest.raises(UsageError, match="hits_p"):
        hockey_stick.delta_lower(hits_p=11, n_p=10, hits_q=0, n_q=10, epsilon=1.0, confidence=0.95)
