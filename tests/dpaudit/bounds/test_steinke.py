"""One-run (eps, delta) bound: closed forms, brute force over the formula, properties, coverage on its worst case."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dpaudit.bounds import steinke
from dpaudit.errors import UsageError

# (r, ceiling at 95 %, delta 0): logit(0.05^(1/r)), references/auditing.md 1.2.
CEILINGS = [
    (10, 1.0519),
    (50, 2.7847),
    (100, 3.4930),
    (200, 4.1936),
    (500, 5.1144),
    (1000, 5.8091),
    (5000, 7.4197),
    (10000, 8.1130),
    (100000, 10.4157),
]


@st.composite
def games(draw: st.DrawFn) -> tuple[int, int, int]:
    m = draw(st.integers(1, 3000))
    r = draw(st.integers(0, m))
    return m, r, draw(st.integers(0, r))


def brute_force(eps: float, m: int, r: int, v: int, delta: float) -> float:
    q = 1 / (1 + math.exp(-eps))
    averages = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q)) / np.arange(1, v + 1)
    return min(1.0, binom.sf(v - 1, r, q) + 2 * m * delta * averages.max())


@pytest.mark.parametrize(("guesses", "value"), CEILINGS)
def test_ceiling_published(guesses: int, value: float) -> None:
    got = steinke.ceiling(canaries=guesses, guesses=guesses, delta=0.0, confidence=0.95)
    assert got == pytest.approx(value, abs=5e-5)
    share = 0.05 ** (1 / guesses)
    assert got == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_delta_term_published() -> None:
    assert steinke.epsilon_lower(
        canaries=100_000, guesses=1500, correct=1429, delta=1e-5, confidence=0.95
    ) == pytest.approx(2.6688, abs=5e-5)
    assert steinke.epsilon_lower(canaries=1000, guesses=200, correct=190, delta=1e-5, confidence=0.95) == (
        pytest.approx(2.3936, abs=5e-5)
    )


def test_refuting_eight_needs_8932_guesses() -> None:
    assert steinke.ceiling(canaries=8932, guesses=8932, delta=0.0, confidence=0.95) >= 8.0
    assert steinke.ceiling(canaries=8931, guesses=8931, delta=0.0, confidence=0.95) < 8.0


@settings(max_examples=300, deadline=None)
@given(games(), st.floats(0, 12), st.floats(-8, -1))
def test_p_value_is_the_formula(game: tuple[int, int, int], eps: float, power: float) -> None:
    m, r, v = game
    got = steinke.p_value(eps, canaries=m, guesses=r, correct=v, delta=10**power)
    expected = 1.0 if v == 0 else brute_force(eps, m, r, v, 10**power)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(max_examples=200, deadline=None)
@given(games(), st.sampled_from([0.0, 1e-6, 1e-5, 1e-3]), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_monotone_and_below_ceiling(game: tuple[int, int, int], delta: float, confidence: float) -> None:
    m, r, v = game
    settings_ = {"canaries": m, "guesses": r, "delta": delta, "confidence": confidence}
    bound = steinke.epsilon_lower(correct=v, **settings_)
    assert 0 <= bound <= steinke.ceiling(**settings_) + 1e-8
    if v < r:
        assert steinke.epsilon_lower(correct=v + 1, **settings_) >= bound - 1e-8
    assert steinke.epsilon_lower(correct=v, **{**settings_, "delta": 2 * delta}) <= bound + 1e-8
    assert steinke.epsilon_lower(correct=v, **{**settings_, "confidence": 0.9999}) <= bound + 1e-8
    if bound > 0:
        assert steinke.p_value(bound, canaries=m, guesses=r, correct=v, delta=delta) <= 1 - confidence


def test_coverage_on_randomised_response() -> None:
    """Randomised response meets the theorem with equality at delta 0: violations must be binomial(2000, <= 0.05)."""
    rng = np.random.default_rng(20240501)
    m = 400
    for eps in (0.0, 1.0, 3.0):
        right = rng.binomial(m, 1 / (1 + math.exp(-eps)), size=2000)
        bounds = {
            int(v): steinke.epsilon_lower(canaries=m, guesses=m, correct=int(v), delta=0.0, confidence=0.95)
            for v in set(right)
        }
        violations = sum(bounds[int(v)] > eps for v in right)
        # P[Binomial(2000, 0.05) > 150] < 5e-7
        assert violations <= 150


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"canaries": 0}, "canaries"),
        ({"guesses": 101}, "guesses"),
        ({"correct": 51}, "correct"),
        ({"correct": -1}, "correct"),
        ({"delta": 1.0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"confidence": 1.0}, "confidence"),
        ({"guesses": 10.5}, "guesses"),
    ],
)
def test_outside_domain(arguments: dict[str, float], field: str) -> None:
    good: dict[str, float] = {"canaries": 100, "guesses": 50, "correct": 40, "delta": 1e-5, "confidence": 0.95}
    with pytest.raises(UsageError, match=field):
        steinke.epsilon_lower(**{**good, **arguments})  # type: ignore[arg-type]


def test_no_guess_shows_nothing() -> None:
    assert steinke.epsilon_lower(canaries=10, guesses=0, correct=0, delta=0.0, confidence=0.95) == 0.0
    assert steinke.p_value(0.0, canaries=10, guesses=10, correct=0, delta=1e-5) == 1.0
