"""Simultaneous limits: exact crossing probabilities against simulation and closed forms, order between bands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpaudit.bounds import bands


@pytest.mark.parametrize("n", [1, 5, 50, 700])
def test_order_statistic_band_holds_as_often_as_it_says(n: int) -> None:
    band = bands.order_statistic(n, 0.05)
    rng = np.random.default_rng(n)
    draws = np.sort(rng.random((20_000 if n < 100 else 3000, n)), axis=1)
    held = np.mean(np.all(draws <= band[:-1], axis=1))
    # n <= 200 uses every k: exactly 0.95; above, unconstrained k only make it hold more often.
    error = 5.3 * np.sqrt(0.05 * 0.95 / len(draws))
    assert held > 0.95 - error
    if n <= bands.GRID:
        assert held < 0.95 + error


@given(st.integers(1, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_crossing_probability_of_one_constraint(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    limit = data.draw(st.floats(0.01, 0.99))
    exact = stats.beta.cdf(limit, k + 1, n - k)
    assert bands.crossing_free(n, np.array([k]), np.array([limit])) == pytest.approx(exact, abs=1e-9)


def test_crossing_probability_of_two_points() -> None:
    """n = 2: P[min <= a, max <= b] = 2ab - a^2 for a <= b."""
    a, b = 0.3, 0.8
    assert bands.crossing_free(2, np.array([0, 1]), np.array([a, b])) == pytest.approx(2 * a * b - a * a, abs=1e-12)


def test_bands_are_ordered_and_sound() -> None:
    for n in (20, 1000, 5000):
        exact, union = bands.order_statistic(n, 0.025), bands.bonferroni(n, 0.025)
        alone = stats.beta.ppf(1 - 0.025, np.arange(n) + 1, n - np.arange(n))
        assert np.all(exact[:-1] >= alone - 1e-12)
        assert np.all(np.diff(exact) >= 0) and exact[-1] == 1.0
        if n <= bands.GRID:
            assert np.all(exact <= union + 1e-12)
        assert exact[0] < bands.dkw(n, 0.025)[0]  # the tail is where it is tighter
