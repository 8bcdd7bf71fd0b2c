"""Profiles of DP-SGD: two independent constructions, closed forms, both directions, simulation."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.bounds import dp_sgd, gdp, order_statistic, pld
from dpaudit.bounds.profile import GaussianProfile
from dpaudit.errors import UsageError

EVENTS = [(1.0, 0.05, 200), (2.0, 0.5, 1), (0.5738, 0.2, 1), (4.0, 0.25, 500), (0.6, 0.01, 1000)]
ZERO = np.zeros(1)


@pytest.mark.parametrize(("sigma", "q", "steps"), EVENTS)
def test_search_grid_agrees_with_the_accountant(sigma: float, q: float, steps: int) -> None:
    fast = pld.dp_sgd_profile(sigma, q, steps)
    exact = pld.claimed_profile(DpSgd(sigma, q, steps))
    w = np.linspace(0, 1, 101)
    assert fast.error_above(w) == pytest.approx(exact.error_above(w), abs=1e-5)
    eps = pld.dp_sgd_epsilon(sigma, q, steps, 1e-5)
    assert eps == pytest.approx(accounting.epsilon(DpSgd(sigma, q, steps), 1e-5), rel=5e-4)


def test_without_sampling_it_is_the_gaussian() -> None:
    """references/auditing.md 7.6: single-guess error Phi(-1/2) = 0.3085375 from the accountant's distribution."""
    profile = pld.claimed_profile(DpSgd(1.0, 1.0, 1))
    assert profile.error_above(ZERO)[0] == pytest.approx(norm.cdf(-0.5), abs=1e-6)
    assert pld.dp_sgd_profile(2.0, 1.0, 4) == GaussianProfile(1.0)
    # q just below 1 goes the long way and must meet the closed form.
    near = pld.dp_sgd_profile(2.0, 1 - 1e-9, 4)
    w = np.linspace(0, 0.99, 30)
    assert near.error_above(w) == pytest.approx(GaussianProfile(1.0).error_above(w), abs=1e-5)
    for u in (120, 150):
        game = {"canaries": 1000, "guesses": 500, "errors": u}
        p = order_statistic.p_value(profile, **game)
        assert p == pytest.approx(order_statistic.p_value(GaussianProfile(1.0), **game), rel=1e-3, abs=1e-12)


def test_one_sampled_step_in_closed_form() -> None:
    """q, T = 1: best guess "in" above the x where the mixture is as likely as the noise, which is x = mu/2."""
    sigma, q = 0.8, 0.3
    error = 0.5 * norm.sf(0.5 / sigma) + 0.5 * ((1 - q) * norm.cdf(0.5 / sigma) + q * norm.cdf(-0.5 / sigma))
    assert pld.dp_sgd_profile(sigma, q, 1).error_above(ZERO)[0] == pytest.approx(error, abs=1e-7)


def test_simulated_dp_sgd() -> None:
    """Likelihood-ratio scores of simulated Poisson-subsampled runs err as often as the profile says."""
    sigma, q, steps, runs = 0.9, 0.2, 10, 100_000
    rng = np.random.default_rng(12)
    inside = rng.random(runs) < 0.5
    noise = sigma * rng.normal(size=(runs, steps)) + (rng.random((runs, steps)) < q) * inside[:, None]
    loss = np.log1p(q * np.expm1((2 * noise - 1) / (2 * sigma**2))).sum(axis=1)
    error = np.mean((loss > 0) != inside)
    expected = float(pld.dp_sgd_profile(sigma, q, steps).error_above(ZERO)[0])
    assert abs(error - expected) < 5.3 * math.sqrt(expected * (1 - expected) / runs)


def test_epsilon_of_the_gaussian() -> None:
    assert pld.dp_sgd_epsilon(2.0, 1.0, 4, 1e-5) == pytest.approx(gdp.epsilon_from_mu(1.0, 1e-5), abs=1e-9)
    assert gdp.epsilon_from_mu(1.3, 1e-6) == pytest.approx(accounting.gaussian_epsilon(1.3, 1e-6), abs=1e-7)


def test_noiseless_floor() -> None:
    """Without noise a canary errs only when it was never sampled: (1 - q)^T / 2; small noise must come close."""
    profile = dp_sgd.noiseless_profile(0.2, 3)
    assert profile.error_above(ZERO)[0] == pytest.approx(0.5 * 0.8**3, abs=1e-12)
    assert pld.dp_sgd_profile(0.05, 0.2, 3).error_above(ZERO)[0] == pytest.approx(0.5 * 0.8**3, abs=1e-4)
    perfect = dp_sgd.Ordered(1000, 1000, 0)
    assert dp_sgd.sigma_upper(0.2, 3, perfect, confidence=0.95) == 0.0
    assert dp_sgd.epsilon_lower(0.2, 3, perfect, delta=1e-5, confidence=0.95) == math.inf
    nothing = dp_sgd.Interfering(1000, 100, 50)
    assert dp_sgd.sigma_upper(0.2, 3, nothing, confidence=0.95) == math.inf
    assert dp_sgd.epsilon_lower(0.2, 3, nothing, delta=1e-5, confidence=0.95) == 0.0


@pytest.mark.parametrize(
    ("field", "values"), [("sigma", (0.0, 0.1, 1)), ("sample-rate", (1.0, 0.0, 1)), ("steps", (1.0, 0.1, 0))]
)
def test_outside_domain(field: str, values: tuple[float, float, int]) -> None:
    with pytest.raises(UsageError, match=field):
        pld.dp_sgd_profile(*values)
