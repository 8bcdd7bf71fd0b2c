"""Clopper-Pearson, GDP and Bayes on counts: formula, monotone, ceilings, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from dpaudit.bounds import bayes, clopper_pearson, gdp
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.errors import UsageError

counts = st.builds(
    lambda n_in, n_out, a, b: Counts(
        n_in - round(a * n_in), round(a * n_in), round(b * n_out), n_out - round(b * n_out)
    ),
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.floats(0, 1),
    st.floats(0, 1),
)
METHODS = [clopper_pearson.epsilon_lower, gdp.epsilon_lower, bayes.epsilon_lower]
CEILINGS = [clopper_pearson.ceiling, gdp.ceiling, bayes.ceiling]


@settings(max_examples=60, deadline=None)
@given(counts, st.sampled_from([0.0, 1e-5, 1e-2]), st.sampled_from([0.9, 0.95, 0.999]))
def test_properties(c: Counts, delta: float, confidence: float) -> None:
    for method, ceiling in zip(METHODS, CEILINGS, strict=True):
        bound = method(c, delta=delta, confidence=confidence)
        # The Bayesian region is two-sided: an attack that is always wrong also shows leakage.
        if method is not bayes.epsilon_lower:
            assert 0 <= bound <= ceiling(c, delta=delta, confidence=confidence) + 1e-6
        assert not math.isnan(bound)
        assert method(c, delta=min(0.5, 2 * delta), confidence=confidence) <= bound + 1e-6
        assert method(c, delta=delta, confidence=0.9999) <= bound + 1e-6
    if c.fp > 0 and c.fn + c.fp <= min(c.tp + c.fn, c.fp + c.tn) / 2:
        better = Counts(c.tp, c.fn, c.fp - 1, c.tn + 1)
        for method in METHODS:
            assert (
                method(better, delta=delta, confidence=confidence)
                >= method(c, delta=delta, confidence=confidence) - 1e-4
            )


def test_clopper_pearson_formula() -> None:
    c, delta = Counts(450, 50, 30, 470), 1e-3
    fpr = stats.binomtest(30, 500, alternative="less").proportion_ci(0.975, method="exact").high
    fnr = stats.binomtest(50, 500, alternative="less").proportion_ci(0.975, method="exact").high
    expected = max(math.log((1 - delta - fnr) / fpr), math.log((1 - delta - fpr) / fnr))
    assert clopper_pearson.epsilon_lower(c, delta=delta, confidence=0.95) == pytest.approx(expected, abs=1e-9)
    mu = gdp.mu_lower(c, confidence=0.95)
    assert mu == pytest.approx(stats.norm.ppf(1 - fpr) - stats.norm.ppf(fnr), abs=1e-9)


def test_an_inverted_attack_is_worth_nothing() -> None:
    """No abs(): guessing the wrong way round shows no leakage in the direction that was fixed."""
    assert gdp.mu_lower(Counts(50, 450, 450, 50), confidence=0.95) == 0.0


def test_bayes_mass_by_double_quadrature() -> None:
    c, eps, delta = Counts(35, 15, 10, 40), 0.6, 1e-3

    def density(fpr: float, fnr: float) -> float:
        return float(stats.beta.pdf(fnr, 0.5 + c.fn, 0.5 + c.tp) * stats.beta.pdf(fpr, 0.5 + c.fp, 0.5 + c.tn))

    def low(fnr: float) -> float:
        return max(0.0, 1 - delta - math.exp(eps) * fnr, math.exp(-eps) * (1 - delta - fnr))

    def high(fnr: float) -> float:
        return max(low(fnr), min(1.0, 1 + (delta - fnr) * math.exp(-eps), delta + (1 - fnr) * math.exp(eps)))

    expected = integrate.dblquad(density, 0, 1, low, high, epsabs=1e-6)[0]
    middle = (np.arange(bayes.NODES) + 0.5) / bayes.NODES
    fnr = stats.beta.ppf(middle, 0.5 + c.fn, 0.5 + c.tp)
    got = bayes.region_mass(eps, fnr, (0.5 + c.fp, 0.5 + c.tn), delta)
    assert got == pytest.approx(expected, abs=2e-5)


def test_coverage_small() -> None:
    rng = np.random.default_rng(8)
    n, mu = 200, 1.0
    rate = stats.norm.sf(mu / 2)
    above = {"mu": 0, "eps": 0}
    truth = gdp.epsilon_from_mu(mu, 1e-5)
    for fn, fp in zip(rng.binomial(n, rate, 2000), rng.binomial(n, rate, 2000), strict=True):
        c = Counts(n - int(fn), int(fn), int(fp), n - int(fp))
        above["mu"] += gdp.mu_lower(c, confidence=0.95) > mu
        above["eps"] += clopper_pearson.epsilon_lower(c, delta=1e-5, confidence=0.95) > truth
    assert max(above.values()) <= 152  # P[Binomial(2000, 0.05) > 152] < 1e-6


def test_outside_domain() -> None:
    with pytest.raises(UsageError, match="tp"):
        Counts(-1, 2, 3, 4)
    with pytest.raises(UsageError, match="fp"):
        Counts(1, 2, 0, 0)
    with pytest.raises(UsageError, match="mu"):
        gdp.epsilon_from_mu(-1.0, 1e-5)
    assert gdp.epsilon_from_mu(1.0, 0.0) == math.inf
    assert gdp.epsilon_from_mu(0.0, 0.0) == 0.0
