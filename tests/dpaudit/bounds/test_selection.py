"""Selection rules: none may break the level on null or tied scores, and the uncorrected maximum does."""

import numpy as np
import pytest

from dpaudit.bounds import clopper_pearson, selection, steinke
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.selection import (
    Bonferroni,
    Dkw,
    Fixed,
    MonteCarlo,
    OneRunRule,
    OrderStatisticBand,
    RunsRule,
    Split,
    Threshold,
)
from dpaudit.errors import UsageError

AUDITS = 400
MOST = 46  # P[Binomial(400, 0.05) > 46] < 1e-6


def one_run_bound(m: int, r: int, v: int, delta: float, confidence: float) -> float:
    return steinke.epsilon_lower(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence)


@pytest.mark.parametrize("rule", [Fixed(10, 10), Split(), Bonferroni(), MonteCarlo(simulations=199)])
@pytest.mark.parametrize("tied", [False, True])
def test_one_run_null(rule: OneRunRule, tied: bool) -> None:
    rng = np.random.default_rng(31)
    alarms = 0
    for _ in range(AUDITS):
        scores = rng.integers(0, 3, 100).astype(float) if tied else rng.normal(size=100)
        inside = rng.random(100) < 0.5
        found = selection.one_run_lower(scores, inside, one_run_bound, rule=rule, delta=0.0, confidence=0.95, rng=rng)
        alarms += found.epsilon_lower > 0
    assert alarms <= MOST


def test_the_uncorrected_maximum_breaks_the_level() -> None:
    """What the rules are for: the best of many numbers of guesses at full confidence."""
    rng = np.random.default_rng(32)
    alarms = 0
    for _ in range(AUDITS):
        scores, inside = rng.normal(size=100), rng.random(100) < 0.5
        best = max(
            selection.one_run_lower(
                scores, inside, one_run_bound, rule=Fixed(k, k), delta=0.0, confidence=0.95, rng=rng
            ).epsilon_lower
            for k in range(5, 51, 5)
        )
        alarms += best > 0
    assert alarms > MOST


RUNS_RULES = [Threshold(0.5), Split(), Bonferroni(), Dkw(), OrderStatisticBand()]


@pytest.mark.parametrize("rule", RUNS_RULES)
@pytest.mark.parametrize("bound", [selection.epsilon_of, selection.gaussian_epsilon_of])
def test_runs_null(rule: RunsRule, bound: selection.RateBound) -> None:
    rng = np.random.default_rng(33)
    alarms = 0
    for _ in range(AUDITS):
        found = selection.runs_lower(
            rng.normal(size=60), rng.normal(size=60), bound, rule=rule, delta=1e-5, confidence=0.95
        )
        alarms += found.epsilon_lower > 0
    assert alarms <= MOST


@pytest.mark.parametrize("rule", RUNS_RULES)
def test_runs_never_above_the_ceiling(rule: RunsRule) -> None:
    apart, together = np.arange(100.0) + 1000, np.arange(100.0)
    top = clopper_pearson.ceiling(Counts(100, 0, 0, 100), delta=0.0, confidence=0.95)
    for inside, outside in ((apart, together), (together, apart), (together, together)):
        found = selection.runs_lower(inside, outside, selection.epsilon_of, rule=rule, delta=0.0, confidence=0.95)
        assert 0 <= found.epsilon_lower <= top + 1e-9


def test_fixed_is_the_plain_bound() -> None:
    scores = np.arange(200.0)
    inside = scores >= 100
    found = selection.one_run_lower(
        scores, inside, one_run_bound, rule=Fixed(30, 20), delta=1e-5, confidence=0.95, rng=np.random.default_rng(0)
    )
    assert (found.guesses, found.correct, found.n) == (50, 50, 200)
    assert found.epsilon_lower == one_run_bound(200, 50, 50, 1e-5, 0.95)


def test_monte_carlo_needs_pure_dp() -> None:
    with pytest.raises(UsageError, match="delta"):
        selection.one_run_lower(
            np.arange(10.0),
            np.arange(10) > 4,
            one_run_bound,
            rule=MonteCarlo(),
            delta=1e-5,
            confidence=0.95,
            rng=np.random.default_rng(0),
        )


def test_monte_carlo_is_sharper_than_bonferroni() -> None:
    rng = np.random.default_rng(34)
    inside = rng.random(600) < 0.5
    scores = rng.normal(size=600) + 1.5 * inside
    calibrated, union = (
        selection.one_run_lower(scores, inside, one_run_bound, rule=rule, delta=0.0, confidence=0.95, rng=rng)
        for rule in (MonteCarlo(), Bonferroni())
    )
    assert calibrated.epsilon_lower > union.epsilon_lower - 0.05 > 1.0
