"""e-processes: means at most one under the worst claim-abiding mechanism, Ville's level, power, merging."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpaudit.bounds import sequential
from dpaudit.bounds.sequential import Betting
from dpaudit.errors import UsageError


@given(st.floats(0, 8), st.floats(0, 0.2), st.lists(st.sampled_from([-1, 0, 1]), max_size=40))
def test_every_bet_is_fair_or_worse(eps: float, delta: float, past: list[int]) -> None:
    """Whatever the past, the factor's mean is at most 1 for every law with P[right] <= e^eps P[wrong] + delta."""
    state = sequential.play(past, epsilon=eps, delta=delta)
    now = state.log_wealth
    factors = {outcome: math.exp(state.after(outcome).log_wealth - now) for outcome in (1, 0, -1)}
    for wrong in (0.0, 0.01, 0.2, (1 - delta) / (1 + math.exp(eps))):
        right = min(math.exp(eps) * wrong + delta, 1 - wrong)
        mean = right * factors[1] + wrong * factors[-1] + (1 - right - wrong) * factors[0]
        assert mean <= 1 + 1e-9


def outcomes(eps: float, trials: int, audits: int, rng: np.random.Generator) -> np.ndarray:
    right = rng.random((audits, trials)) < 1 / (1 + math.exp(-eps))
    return np.where(right, 1, -1)


def test_ville() -> None:
    """Randomised response at the claimed eps, looked at after each of 150 trials: alarms at most the level."""
    rng = np.random.default_rng(4)
    for eps in (0.0, 1.0):
        alarms = sum(sequential.play(row, epsilon=eps).p_value <= 0.05 for row in outcomes(eps, 150, 400, rng))
        assert alarms <= 46  # P[Binomial(400, 0.05) > 46] < 1e-6


def test_a_wrong_claim_is_soon_found() -> None:
    rng = np.random.default_rng(5)
    found = [sequential.play(row[:200], epsilon=1.0).p_value <= 0.05 for row in outcomes(2.0, 2000, 100, rng)]
    assert np.mean(found) >= 0.5
    assert all(sequential.play(row, epsilon=1.0).p_value <= 0.05 for row in outcomes(2.0, 2000, 20, rng))


def test_p_value_never_rises() -> None:
    state, last = Betting(0.5), 1.0
    for outcome in np.random.default_rng(6).choice([1, -1, 0], 200, p=[0.7, 0.2, 0.1]):
        state = state.after(int(outcome))
        assert state.p_value <= last
        last = state.p_value


def test_merging() -> None:
    assert sequential.merge_by_averaging([4.0, 0.0, 2.0]) == 2.0
    assert sequential.merge_by_multiplying([4.0, 0.5]) == 2.0
    assert sequential.merge_by_multiplying([math.inf, 0.0]) == 0.0
    p = (np.arange(10_000) + 0.5) / 10_000
    assert np.mean([sequential.calibrate(float(x)) for x in p]) <= 1.0
    with pytest.raises(UsageError, match="e_values"):
        sequential.merge_by_averaging([])
    with pytest.raises(UsageError, match="e_values"):
        sequential.merge_by_averaging([-1.0])
    with pytest.raises(UsageError, match="outcome"):
        Betting(1.0).after(2)
    with pytest.raises(UsageError, match="epsilon"):
        Betting(math.nan)
