"""Trade-off curves against closed forms: Gaussians, one sampled step, and one pair (eps, delta)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from dpaudit.accounting import DpSgd, best_guess, largest_tpr, stated_largest_tpr
from dpaudit.errors import UsageError

RATES = np.array([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 1.0])


def one_step(sigma: float, rate: float, fpr: float) -> float:
    """The likelihood ratio grows with the output, so the best test is a threshold on it."""
    cut = norm.isf(fpr)
    return float((1 - rate) * norm.sf(cut) + rate * norm.sf(cut - 1 / sigma))


def test_one_sampled_step_is_the_threshold_test() -> None:
    found = largest_tpr(DpSgd(0.8, 0.2, 1), RATES)
    exact = np.array([one_step(0.8, 0.2, float(rate)) for rate in RATES])
    assert np.all(found >= exact - 1e-12)  # an upper bound ...
    assert found == pytest.approx(exact, rel=0.01, abs=2e-6)  # ... and a tight one


@pytest.mark.parametrize(("relation", "moved"), [("add-remove", 1.0), ("replace", 2.0)])
def test_everybody_in_every_step_is_one_gaussian(relation: str, moved: float) -> None:
    found = largest_tpr(DpSgd(6.0, 1.0, 9, relation), RATES)  # type: ignore[arg-type]
    assert found == pytest.approx(norm.cdf(norm.ppf(RATES) + moved * 3 / 6.0))
    shuffled = DpSgd(6.0, 0.1, 90, relation, sampling="shuffle")  # type: ignore[arg-type]
    assert largest_tpr(shuffled, RATES) == pytest.approx(found)


def test_many_small_steps_are_nearly_gaussian() -> None:
    """Central limit of sampled steps: mu = q sqrt(T (e^(1 / s^2) - 1)) (Bu, Dong, Long and Su 2020)."""
    sigma, rate, steps = 4.0, 0.01, 10_000
    mu = rate * math.sqrt(steps * math.expm1(1 / sigma**2))
    assert largest_tpr(DpSgd(sigma, rate, steps), [0.01, 0.1, 0.5]) == pytest.approx(
        norm.cdf(norm.ppf([0.01, 0.1, 0.5]) + mu), rel=0.02
    )


def test_a_mechanism_allows_far_less_than_its_own_epsilon_and_delta() -> None:
    event = DpSgd(1.519, 0.1549, 194)
    rates = largest_tpr(event, [0.001, 0.01, 0.1])
    assert np.all(rates < stated_largest_tpr(8.0, 1e-5, [0.001, 0.01, 0.1]))
    grid = np.linspace(0, 1, 401)
    advantage = float(np.max(largest_tpr(event, grid) - grid))
    assert advantage == pytest.approx(2 * best_guess(event) - 1, abs=1e-3)


def test_a_curve_is_concave_rises_and_stays_above_guessing() -> None:
    grid = np.linspace(0, 1, 201)
    curve = largest_tpr(DpSgd(1.2, 0.119, 168), grid)
    assert np.all(np.diff(curve) >= -1e-12) and np.all(np.diff(curve, 2) <= 1e-9) and np.all(curve >= grid)
    assert curve[-1] == 1.0


@given(st.floats(0.01, 12), st.floats(0, 1))
def test_one_pair_obeys_both_inequalities_with_equality_in_one(epsilon: float, fpr: float) -> None:
    delta = 1e-5
    tpr = float(stated_largest_tpr(epsilon, delta, fpr)[0])
    assert 0 <= tpr <= 1
    assert tpr <= math.exp(epsilon) * fpr + delta + 1e-12
    assert 1 - fpr <= math.exp(epsilon) * (1 - tpr) + delta + 1e-9
    tight = min(math.exp(epsilon) * fpr + delta, 1 - math.exp(-epsilon) * max(1 - fpr - delta, 0.0), 1.0)
    assert tpr == pytest.approx(tight)


def test_without_noise_everything_shows_and_without_steps_nothing() -> None:
    assert largest_tpr(DpSgd(0.0, 0.1, 5), RATES) == pytest.approx(np.ones(RATES.size))
    assert largest_tpr(DpSgd(1.0, 0.1, 0), RATES) == pytest.approx(RATES)


@pytest.mark.parametrize("event", [DpSgd(0.05, 0.1, 10), DpSgd(1e-4, 0.5, 3), DpSgd(0.3, 1e-6, 5), DpSgd(50.0, 0.9, 2)])
def test_extreme_mechanisms_have_curves_too(event: DpSgd) -> None:
    curve = largest_tpr(event, RATES)
    assert np.all(np.isfinite(curve)) and np.all(curve >= RATES) and np.all(curve <= 1)
    # somebody who knows the record is found whenever it was drawn and the noise is too small to hide it
    if event.noise_multiplier < 0.1:
        assert curve[1] >= 1 - (1 - event.sample_rate) ** event.steps - 1e-9


def test_a_rate_outside_is_refused() -> None:
    with pytest.raises(UsageError, match="fpr"):
        largest_tpr(DpSgd(1.0, 0.1, 5), [1.5])


def test_the_threshold_oracle_can_fail() -> None:
    noise = brentq(lambda sigma: one_step(sigma, 0.2, 0.01) - 0.1, 0.1, 3.0)
    assert largest_tpr(DpSgd(2 * noise, 0.2, 1), [0.01])[0] < 0.09
