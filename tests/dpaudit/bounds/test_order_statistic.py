"""Order-statistics tail: brute-force simulation of the channel, a second quadrature, profiles, properties, coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from dpaudit.analysis import simulate
from dpaudit.bounds import dp_sgd, order_statistic
from dpaudit.bounds.profile import DiscreteProfile, GaussianProfile, Profile, epsilon_delta, laplace
from dpaudit.errors import UsageError


def brute_force(profile: Profile, n: int, r: int, u: int, audits: int, rng: np.random.Generator) -> float:
    """Draw quantiles of confidence, keep the r largest, toss an error with the slope of G at each."""
    w = np.sort(rng.random((audits, n)), axis=1)[:, n - r :]
    h = 1e-6
    gamma = (profile.error_above((w - h).ravel()) - profile.error_above((w + h).ravel())) / (2 * h)
    errors = (rng.random(w.shape) < gamma.reshape(w.shape)).sum(axis=1)
    return float(np.mean(errors <= u))


@pytest.mark.parametrize(
    ("profile", "n", "r", "u"),
    [
        (GaussianProfile(1.0), 40, 20, 3),
        (GaussianProfile(0.3), 30, 29, 11),
        (GaussianProfile(2.0), 25, 1, 0),
        (laplace(1.5), 40, 20, 4),
        (epsilon_delta(1.0, 0.05), 30, 15, 3),
        (DiscreteProfile(np.array([0.0, 0.5, 3.0]), np.array([0.3, 0.4, 0.3])), 20, 10, 2),
        (GaussianProfile(1.0), 30, 30, 7),
    ],
)
def test_tail_is_the_simulated_one(profile: Profile, n: int, r: int, u: int) -> None:
    audits = 60_000
    simulated = brute_force(profile, n, r, u, audits, np.random.default_rng(7))
    exact = order_statistic.p_value(profile, canaries=n, guesses=r, errors=u)
    # 5.3 standard errors: false alarm below 2e-7 per case.
    assert abs(simulated - exact) < 5.3 * np.sqrt(exact * (1 - exact) / audits) + 1e-9


@pytest.mark.parametrize(("n", "r", "u"), [(10, 9, 2), (5, 1, 0), (300, 299, 90), (1000, 10, 1), (2000, 1000, 250)])
def test_quadrature(n: int, r: int, u: int) -> None:
    """Against adaptive quadrature in the Beta's own quantiles (skewed cuts included)."""
    profile = GaussianProfile(0.8)

    def integrand(level: float) -> float:
        w = stats.beta.ppf(level, n - r, r + 1)
        mean = float(profile.error_above(np.array([w]))[0]) / (1 - w)
        return float(stats.binom.cdf(u, r, mean))

    expected = integrate.quad(integrand, 0, 1, limit=200, epsabs=1e-10, epsrel=1e-8)[0]
    got = order_statistic.p_value(profile, canaries=n, guesses=r, errors=u)
    assert got == pytest.approx(expected, rel=2e-4)


def test_gaussian_profile_is_the_closed_form() -> None:
    for mu in (0.1, 1.0, 6.0, 30.0):
        profile = GaussianProfile(mu)
        t = np.linspace(0, mu / 2 + 6, 50)
        w = 1 - (stats.norm.sf(t - mu / 2) + stats.norm.sf(t + mu / 2))
        assert profile.error_above(w) == pytest.approx(stats.norm.sf(t + mu / 2), abs=1e-12)
    fine = DiscreteProfile(*_gaussian_cells(1.0))
    w = np.linspace(0, 0.999, 40)
    assert fine.error_above(w) == pytest.approx(GaussianProfile(1.0).error_above(w), abs=1e-6)
    x = np.linspace(0, 0.69, 40)
    assert fine.wrong_for(x) == pytest.approx(GaussianProfile(1.0).wrong_for(x), abs=1e-5)


def _gaussian_cells(mu: float) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(-9, 9 + mu, 40_001)
    p, q = np.diff(stats.norm.cdf(edges - mu)), np.diff(stats.norm.cdf(edges))
    middle = 0.5 * (edges[1:] + edges[:-1])
    return np.abs(mu * (middle - mu / 2)), 0.5 * (p + q)


def test_laplace_profile() -> None:
    """Forced guess: error exp(-eps/2) / 2; half of all outputs or more lie at |L| = eps."""
    for eps in (0.2, 1.0, 4.0):
        profile = laplace(eps)
        assert profile.error_above(np.zeros(1))[0] == pytest.approx(0.5 * np.exp(-eps / 2), abs=1e-6)
        assert profile.error_above(np.array([0.9]))[0] == pytest.approx(0.1 / (1 + np.exp(eps)), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_monotone_and_below_ceiling(n: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, n))
    u = data.draw(st.integers(0, r))
    at = {"canaries": n, "guesses": r, "delta": 1e-5, "confidence": 0.95}
    bound = order_statistic.epsilon_lower(errors=u, **at)  # type: ignore[arg-type]
    assert 0 <= bound <= order_statistic.ceiling(**at) + 1e-6  # type: ignore[arg-type]
    if u:
        assert order_statistic.epsilon_lower(errors=u - 1, **at) >= bound - 1e-6  # type: ignore[arg-type]
    surer = order_statistic.epsilon_lower(canaries=n, guesses=r, errors=u, delta=1e-5, confidence=0.999)
    wider = order_statistic.epsilon_lower(canaries=n, guesses=r, errors=u, delta=1e-3, confidence=0.95)
    assert surer <= bound + 1e-6 and wider <= bound + 1e-6
    family = dp_sgd.sigma_upper(1.0, 1, dp_sgd.Ordered(n, r, u), confidence=0.95)
    mu = order_statistic.mu_lower(canaries=n, guesses=r, errors=u, confidence=0.95)
    if 0 < mu < 60:
        assert 1 / family == pytest.approx(mu, rel=1e-4, abs=2e-5)


def test_coverage_small() -> None:
    """Exact channel, fixed guesses: violations are binomial(2000, 0.05) at most (false alarm below 1e-6 at 152)."""
    rng = np.random.default_rng(20240502)
    for mu in (0.0, 1.0, 2.0):
        scores, inside = simulate.gaussian(2000, 200, mu, rng)
        right = simulate.right_guesses(scores, inside, 50, 50, rng)
        bounds = [
            order_statistic.mu_lower(canaries=200, guesses=100, errors=100 - int(v), confidence=0.95) for v in right
        ]
        assert sum(bound > mu for bound in bounds) <= 152


def test_outside_domain() -> None:
    with pytest.raises(UsageError, match="errors"):
        order_statistic.p_value(GaussianProfile(1.0), canaries=10, guesses=5, errors=6)
    with pytest.raises(UsageError, match="profile"):
        DiscreteProfile(np.array([1.0]), np.array([0.5]))
    assert order_statistic.p_value(GaussianProfile(1.0), canaries=10, guesses=0, errors=0) == 1.0
