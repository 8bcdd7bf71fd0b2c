"""Laplace noise in the accountant: closed forms for one step, pure DP for many, and what no theorem covers."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Relation
from dpaudit.errors import UsageError


def hockey_stick(mu: float, epsilon: float) -> float:
    """delta(eps) of Lap(0) against Lap(mu), scale 1, for any real eps: 1 - e^((eps - mu)/2) inside (-mu, mu)."""
    if epsilon >= mu:
        return 0.0
    return 1 - math.exp(epsilon) if epsilon <= -mu else 1 - math.exp((epsilon - mu) / 2)


def subsampled(mu: float, q: float, epsilon: float) -> float:
    """One Poisson-subsampled step, the worse of both directions, from the mixture written out."""
    removed = q * hockey_stick(mu, math.log1p(math.expm1(epsilon) / q))
    rest = 1 - math.exp(epsilon) * (1 - q)
    added = rest * hockey_stick(mu, math.log(math.exp(epsilon) * q / rest)) if rest > 0 else 0.0
    return max(removed, added)


@pytest.mark.parametrize("relation", ["add-remove", "zero-out", "replace"])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_one_step_on_everybody_is_the_closed_form(sigma: float, relation: Relation) -> None:
    mu = (2.0 if relation == "replace" else 1.0) / sigma
    for delta in (1e-5, 1e-2):
        exact = mu + 2 * math.log1p(-delta)
        assert exact - 1e-9 <= accounting.epsilon(DpSgd(sigma, 1.0, 1, relation, "laplace"), delta) <= exact + 1e-4


@pytest.mark.parametrize(("sigma", "q", "delta"), [(1.0, 0.2, 1e-3), (0.5, 0.1, 1e-2), (2.0, 0.5, 1e-5)])
def test_one_subsampled_step_is_the_mixture_written_out(sigma: float, q: float, delta: float) -> None:
    exact = brentq(lambda epsilon: subsampled(1 / sigma, q, epsilon) - delta, 1e-12, 1 / sigma)
    assert exact - 1e-9 <= accounting.epsilon(DpSgd(sigma, q, 1, "add-remove", "laplace"), delta) <= exact + 1e-4


def test_two_steps_against_an_integral_over_the_first() -> None:
    sigma, delta = 0.8, 1e-3
    grid = np.linspace(-30.0, 31.0, 61_001)
    mass = np.exp(-np.abs(grid) / sigma) / (2 * sigma) * (grid[1] - grid[0])
    loss = (np.abs(grid - 1) - np.abs(grid)) / sigma

    def excess(epsilon: float) -> float:
        second = [hockey_stick(1 / sigma, rest) for rest in (epsilon - loss).tolist()]
        return float(mass @ np.array(second)) - delta

    exact = brentq(excess, 0.0, 2 / sigma, xtol=1e-6)
    assert accounting.epsilon(DpSgd(sigma, 1.0, 2, "add-remove", "laplace"), delta) == pytest.approx(exact, abs=1e-3)


def test_many_numbers_are_dominated_by_one_that_carries_all_of_the_shift() -> None:
    """Two coordinates moved by s and mu - s leak no more than one moved by mu: the claim of trainers.zeroth_order."""
    mu = 1.7
    grid = np.linspace(-30.0, 32.0, 3101)
    mass = np.exp(-np.abs(grid)) * (grid[1] - grid[0]) / 2
    for share in (0.1, 0.3, 0.5):
        parts = [np.abs(grid - mu * part) - np.abs(grid) for part in (share, 1 - share)]
        total, weight = (parts[0][:, None] + parts[1]).ravel(), np.outer(mass, mass).ravel()
        for epsilon in (0.0, 0.5, 1.0, 1.5):
            both = float((weight * -np.expm1(np.minimum(0.0, epsilon - total))).sum())
            assert both <= hockey_stick(mu, epsilon) + 1e-4


def test_steps_add_up_to_at_most_their_pure_guarantees() -> None:
    event = DpSgd(4.0, 1.0, 10, "add-remove", "laplace")
    assert accounting.epsilon(event, 1e-9) <= 10 / 4.0 + 1e-3
    assert accounting.epsilon(event, 1e-3) < accounting.epsilon(event, 1e-9)
    checked = accounting.rdp_epsilon(event, 1e-9)
    assert checked is not None and accounting.epsilon(event, 1e-9) - 1e-3 <= checked <= 1.01 * 10 / 4.0


@pytest.mark.parametrize("q", [0.2, 1.0])
def test_sigma_for_a_target_is_never_too_small(q: float) -> None:
    sigma = accounting.noise_multiplier_for(epsilon=3.0, delta=1e-5, sample_rate=q, steps=40, noise="laplace")
    assert accounting.epsilon(DpSgd(sigma, q, 40, "add-remove", "laplace"), 1e-5) <= 3.0
    assert accounting.epsilon(DpSgd(sigma / 1.005, q, 40, "add-remove", "laplace"), 1e-5) > 3.0


def test_what_no_theorem_covers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^relation: got 'replace'; accepted"):
        DpSgd(1.0, 0.2, 5, "replace", "laplace")
    assert accounting.rdp_epsilon(DpSgd(1.0, 0.2, 5, "add-remove", "laplace"), 1e-5) is None
    with pytest.raises(UsageError, match=r"^noise: got 'uniform'"):
        DpSgd(1.0, 0.2, 5, "add-remove", "uniform")  # type: ignore[arg-type]
