"""f-DP one-run bound: the recursion against a linear programme over the theorem's constraints, properties, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm

from dpaudit.analysis import simulate
from dpaudit.bounds import mahloujifar, steinke
from dpaudit.bounds.profile import GaussianProfile, epsilon_delta
from dpaudit.errors import UsageError

GAMES = [(10, 10, 9), (20, 12, 11), (30, 20, 16), (12, 12, 7), (8, 3, 3)]


def programme(m: int, guesses: int, correct: int, tangents: list[tuple[float, float]]) -> float:
    """max P[>= correct right] over laws p of the number right with r_{i+1} <= slope * h_i + offset for all tangents."""
    right = np.arange(guesses + 1)
    rows, limits = [], []
    for i in range(guesses):
        r = np.where(right >= i + 1, right / m, 0.0)
        h = np.where(right >= i, (guesses - right) / m, 0.0)
        for slope, offset in tangents:
            rows.append(r - slope * h)
            limits.append(offset)
    best = linprog(
        -(right >= correct).astype(float),
        A_ub=np.array(rows),
        b_ub=limits,
        A_eq=np.ones((1, guesses + 1)),
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
    )
    return float(-best.fun)


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize(("eps", "delta"), [(1.0, 0.0), (1.0, 0.01), (0.5, 0.1), (2.0, 1e-3)])
def test_recursion_is_the_programme(game: tuple[int, int, int], eps: float, delta: float) -> None:
    m, guesses, correct = game
    expected = programme(m, guesses, correct, [(math.exp(eps), delta)])
    got = mahloujifar.p_value(epsilon_delta(eps, delta), canaries=m, guesses=guesses, correct=correct)
    assert expected - 1e-7 <= got <= expected * 1.0015 + 1e-7


@pytest.mark.parametrize("game", [(10, 10, 9), (20, 12, 11), (8, 3, 3)])
def test_recursion_on_a_gaussian_curve(game: tuple[int, int, int]) -> None:
    mu = 0.7
    at = np.linspace(-5, 5, 300)
    slopes = norm.pdf(at + mu) / norm.pdf(at)
    tangents = list(zip(slopes, norm.cdf(at + mu) - slopes * norm.cdf(at), strict=True))
    m, guesses, correct = game
    got = mahloujifar.p_value(GaussianProfile(mu), canaries=m, guesses=guesses, correct=correct)
    # Tangents enclose the curve from outside, so the programme is the larger one, by a hair.
    assert got == pytest.approx(programme(m, guesses, correct, tangents), rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.data())
def test_monotone_and_below_ceiling(m: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    for bound in (mahloujifar.epsilon_lower, mahloujifar.epsilon_lower_any):
        here = bound(canaries=m, guesses=r, correct=v, delta=1e-5, confidence=0.95)
        top = bound(canaries=m, guesses=r, correct=r, delta=1e-5, confidence=0.95)
        assert 0 <= here <= top + 1e-6
        if v:
            assert bound(canaries=m, guesses=r, correct=v - 1, delta=1e-5, confidence=0.95) <= here + 1e-6
        assert bound(canaries=m, guesses=r, correct=v, delta=1e-5, confidence=0.999) <= here + 1e-6
        assert bound(canaries=m, guesses=r, correct=v, delta=1e-3, confidence=0.95) <= here + 1e-6


def test_near_steinke_without_delta() -> None:
    """At delta = 0 both bound the same thing; neither may be far from the other."""
    for m, r, v in [(500, 100, 97), (1000, 500, 400), (300, 300, 200)]:
        ours = mahloujifar.epsilon_lower_any(canaries=m, guesses=r, correct=v, delta=0.0, confidence=0.95)
        theirs = steinke.epsilon_lower(canaries=m, guesses=r, correct=v, delta=0.0, confidence=0.95)
        assert 0.95 * theirs < ours <= theirs + 1e-6


def test_coverage_small() -> None:
    rng = np.random.default_rng(5)
    for mu in (0.0, 1.0):
        scores, inside = simulate.gaussian(2000, 200, mu, rng)
        right = simulate.right_guesses(scores, inside, 20, 20, rng)
        bounds = {
            int(v): mahloujifar.mu_lower(canaries=200, guesses=40, correct=int(v), confidence=0.95) for v in set(right)
        }
        assert sum(bounds[int(v)] > mu for v in right) <= 152  # P[Binomial(2000, 0.05) > 152] < 1e-6


def test_p_value_and_bound_agree() -> None:
    mu = mahloujifar.mu_lower(canaries=500, guesses=100, correct=88, confidence=0.95)
    below = mahloujifar.p_value(GaussianProfile(mu), canaries=500, guesses=100, correct=88)
    above = mahloujifar.p_value(GaussianProfile(mu + 1e-3), canaries=500, guesses=100, correct=88)
    assert below <= 0.05 * 1.001 and above > 0.05


def test_outside_domain() -> None:
    with pytest.raises(UsageError, match="correct"):
        mahloujifar.p_value(GaussianProfile(1.0), canaries=10, guesses=5, correct=6)
    assert mahloujifar.p_value(GaussianProfile(1.0), canaries=10, guesses=5, correct=0) == 1.0
