"""Trade-off curves against closed forms: the Gaussian, one subsampled step, randomised response."""

import math
from typing import Any

import matplotlib.pyplot
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

import dpaudit
from dpaudit.accounting import DpSgd
from dpaudit.analysis import tradeoff
from dpaudit.errors import UsageError

matplotlib.use("agg")
ALPHAS = np.r_[0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]


def test_losses_give_the_gaussian() -> None:
    """sigma 2, 16 steps, everybody: mu = 2, once in closed form and once from the accountant's losses."""
    exact, found = tradeoff.GaussianCurve(2.0), tradeoff.of_losses(DpSgd(2.0, 1.0, 16))
    assert np.allclose(exact.beta(ALPHAS[1:-1]), found.beta(ALPHAS[1:-1]), rtol=1e-6, atol=0)
    assert np.all(found.beta(ALPHAS[1:-1]) <= exact.beta(ALPHAS[1:-1]) * (1 + 1e-9))  # never above the mechanism
    assert found.advantage() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-7) == pytest.approx(exact.advantage())


def _turn(first: Any, second: Any, third: Any) -> float:
    a, b = second - first, third - first
    return float(a[0] * b[1] - a[1] * b[0])


@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.1), (1.5, 0.5), (0.4, 0.02)])
def test_one_subsampled_step(sigma: float, rate: float) -> None:
    """Q = N(0, sigma^2), P = (1-q) Q + q N(1, sigma^2): tests by threshold both ways, and their lower convex hull."""
    x = np.linspace(-9 * sigma, 1 + 9 * sigma, 4_001)
    alpha, beta = ndtr(-x / sigma), (1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma)
    points = np.r_[np.c_[alpha, beta], np.c_[beta, alpha], [[0, 1], [1, 0]]]
    hull: list[Any] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    corners = np.array(hull)
    found = tradeoff.of_losses(DpSgd(sigma, rate, 1))
    assert np.allclose(found.beta(ALPHAS), np.interp(ALPHAS, *corners.T), atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 4.0), st.floats(0.01, 0.9), st.integers(1, 200), st.floats(1e-7, 0.5))
def test_what_a_curve_is(sigma: float, rate: float, steps: int, delta: float) -> None:
    """Convex, decreasing, symmetric, below chance; and eps at delta is the steepest line below it."""
    found = dpaudit.tradeoff(sigma=sigma, rate=rate, steps=steps)
    x = np.linspace(0.0, 1.0, 401)
    y = found.beta(x)
    assert np.all(np.diff(y) <= 1e-12) and np.all(np.diff(y, 2) >= -1e-9) and np.all(y <= 1 - x + 1e-9)
    inside = y[(y > 1e-6) & (y < 1)]
    assert np.allclose(found.beta(inside), x[(y > 1e-6) & (y < 1)], atol=1e-6)
    eps = found.epsilon(delta)
    assert np.all(y >= 1 - delta - np.exp(eps) * x - 1e-3 * (1 + eps))
    assert 0 <= found.advantage() <= 1 and found.accuracy() == 0.5 * (1 + found.advantage())
    assert found.advantage() == pytest.approx(np.max(1 - x - y), abs=5e-3)


def test_a_bare_eps_is_randomised_response() -> None:
    found = dpaudit.tradeoff(epsilon=math.log(3), delta=0.0)
    assert found.beta(0.25) == pytest.approx(0.25) and found.tpr(0.1) == pytest.approx(0.3)
    assert (
        found.advantage() == pytest.approx(0.5) == pytest.approx(dpaudit.tradeoff(epsilon=1e-9, delta=0.5).advantage())
    )
    assert found.epsilon(0.0) == pytest.approx(math.log(3))
    with pytest.raises(UsageError, match="at which eps is stated"):
        found.epsilon(1e-5)


def test_full_batches_are_in_closed_form() -> None:
    found = dpaudit.tradeoff(dpaudit.claim(sigma=2.0, rate=1.0, steps=4))
    assert found.beta(0.3) == pytest.approx(float(ndtr(-ndtri(0.3) - 1.0)))
    assert found.epsilon(1e-5) == pytest.approx(float(found.claim.epsilon))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: dpaudit.tradeoff(), "nothing is claimed"),
        (lambda: dpaudit.tradeoff(sigma=0.0, rate=0.1, steps=5), "sigma"),
        (lambda: dpaudit.tradeoff(sigma=1.0, rate=0.1), "steps: missing"),
        (lambda: dpaudit.tradeoff("runs/mine"), "claim: got str"),
        (lambda: dpaudit.tradeoff(epsilon=1).beta(1.5), "alpha"),
        (lambda: dpaudit.tradeoff(epsilon=1).tpr([0.1, float("nan")]), "fpr"),
        (lambda: dpaudit.claim(), "nothing is claimed"),
        (lambda: dpaudit.claim(sigma=1.0, rate=0.1, steps=2.5), "steps"),
        (lambda: dpaudit.claim(epsilon=True), "epsilon"),
        (lambda: dpaudit.claim(epsilon=-1), "epsilon"),
    ],
)
def test_what_is_wrong_is_one_line(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        made()
    assert "\n" not in str(caught.value)


def test_plot_and_reprs() -> None:
    found = dpaudit.tradeoff(sigma=0.8, rate=0.04, steps=60)
    x, y = found.plot().lines[0].get_data()
    assert np.allclose(y, found.beta(x)) and found.plot(log=True).get_yscale() == "log"
    assert "advantage" in repr(found) and "<table>" in found._repr_html_()
    matplotlib.pyplot.close("all")
