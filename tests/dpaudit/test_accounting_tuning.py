"""Repeat at random and publish the best: the theorem re-derived, and the whole procedure computed exactly."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr
from scipy.stats import binom, geom, logser

from dpaudit import accounting
from dpaudit.accounting import DpSgd, Repetitions
from dpaudit.errors import UsageError
from dpaudit.ledger import tuning_row

DELTA = 1e-5
Floats = npt.NDArray[np.float64]


def gamma_of(repetitions: Repetitions, mean: float) -> float:
    if repetitions == "geometric":
        return 1 / mean
    low, high = 1e-12, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / middle - 1) / math.log(1 / middle) > mean else (low, middle)
    return high


def to_dp(orders: Floats, renyi: Floats) -> float:
    """Canonne, Kamath and Steinke 2020, proposition 12."""
    eps = renyi + np.log1p(-1 / orders) - (math.log(DELTA) + np.log(orders)) / (orders - 1)
    return float(eps.min())


def by_hand(mu: float, mean: float, repetitions: Repetitions) -> float:
    """Theorems 2 and 6 for a Gaussian with mu: e(lambda) = lambda mu^2 / 2, on a fine grid of orders."""
    orders = 1 + np.geomspace(1e-3, 400, 4000)
    run = orders * mu**2 / 2
    if repetitions == "poisson":
        eps = np.log1p(1 / (orders - 1))
        # d by the same route as theirs: the best Renyi conversion at each eps
        log_delta = (orders - 1) * (run - eps[:, None]) + (orders - 1) * np.log1p(-1 / orders) - np.log(orders)
        whole = run + mean * np.exp(np.minimum(log_delta.min(axis=1), 0.0)) + math.log(mean) / (orders - 1)
    else:
        eta, gamma = (1.0 if repetitions == "geometric" else 0.0), gamma_of(repetitions, mean)
        constant = (1 + eta) * ((1 - 1 / orders) * run + math.log(1 / gamma) / orders).min()
        whole = run + constant + math.log(mean) / (orders - 1)
    return to_dp(orders, whole)


@pytest.mark.parametrize("repetitions", ["geometric", "logarithmic", "poisson"])
@pytest.mark.parametrize("mean", [1.5, 10.0])
def test_the_theorem_by_hand(repetitions: Repetitions, mean: float) -> None:
    sigma, steps = 5.0, 16
    got = accounting.tuning(DpSgd(sigma, 1.0, steps), DELTA, mean_runs=mean, repetitions=repetitions)
    hand = by_hand(math.sqrt(steps) / sigma, mean, repetitions)
    assert hand - 1e-6 <= got.epsilon <= 1.01 * hand + 1e-3
    assert got.single == accounting.rdp_epsilon(DpSgd(sigma, 1.0, steps), DELTA)
    replaced = accounting.tuning(
        DpSgd(2 * sigma, 1.0, steps, "replace"), DELTA, mean_runs=mean, repetitions=repetitions
    )
    assert replaced.epsilon == pytest.approx(got.epsilon, rel=1e-9)  # twice the sensitivity, twice the noise


def generating(repetitions: Repetitions, mean: float) -> Callable[[Floats], Floats]:
    """E[z^K]."""
    if repetitions == "poisson":
        return lambda z: np.exp(mean * (z - 1))
    gamma = gamma_of(repetitions, mean)
    if repetitions == "geometric":
        return lambda z: gamma * z / (1 - (1 - gamma) * z)
    return lambda z: np.log1p(-(1 - gamma) * z) / math.log(gamma)


def best_of(mean_output: float, edges: Floats, repetitions: Repetitions, mean: float) -> Floats:
    """Probabilities, on cells, of the largest of K outputs N(mean_output, 1); Poisson: the first cell holds K = 0."""
    cumulative = generating(repetitions, mean)(ndtr(edges - mean_output))
    return np.diff(np.concatenate([[0.0], cumulative]))


@pytest.mark.parametrize("repetitions", ["geometric", "logarithmic", "poisson"])
def test_the_bound_holds_for_the_whole_procedure_and_a_single_run_does_not(repetitions: Repetitions) -> None:
    """The run publishes N(mu, 1) or N(0, 1) and the largest wins: P(best <= x) = E[F(x)^K], exactly."""
    mu, mean = 0.7, 12.0
    tuned = accounting.tuning(DpSgd(1 / mu, 1.0, 1), DELTA, mean_runs=mean, repetitions=repetitions)
    edges = np.linspace(-9, 11, 200_001)
    with_unit, without = (best_of(centre, edges, repetitions, mean) for centre in (mu, 0.0))

    def delta_at(eps: float) -> float:
        gaps = [np.maximum(0.0, one - math.exp(eps) * other).sum() for one, other in
                ((with_unit, without), (without, with_unit))]  # fmt: skip
        return float(max(gaps))

    assert delta_at(tuned.epsilon) <= DELTA
    assert delta_at(accounting.gaussian_epsilon(mu, DELTA)) > 2 * DELTA  # what quoting one run's eps would hide


@pytest.mark.parametrize("repetitions, law", [("geometric", geom(1 / 6)), ("logarithmic", None)])
def test_runs_are_drawn_from_the_law(repetitions: Repetitions, law: object) -> None:
    rng, count = np.random.default_rng(5), 4000
    drawn = np.array([accounting.draw_runs(6.0, repetitions, rng) for _ in range(count)])
    law = law or logser(1 - gamma_of(repetitions, 6.0))
    for value in range(1, 9):  # false alarm below 1e-6 in all
        share = float(law.pmf(value))  # type: ignore[attr-defined]
        low, high = binom.ppf(5e-9, count, share), binom.ppf(1 - 5e-9, count, share)
        assert low <= int((drawn == value).sum()) <= high
    assert accounting.draw_runs(1.0, repetitions, rng) == 1
    assert accounting.draw_runs(3.0, "poisson", rng) >= 0


def test_what_has_no_bound_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^tuning: no Rényi bound"):
        accounting.tuning(DpSgd(1.0, 0.1, 10, "replace"), DELTA, mean_runs=5)
    with pytest.raises(UsageError, match=r"^mean-runs: got"):
        accounting.tuning(DpSgd(1.0, 0.1, 10), DELTA, mean_runs=0.5)
    with pytest.raises(UsageError, match=r"^repetitions: got"):
        accounting.tuning(DpSgd(1.0, 0.1, 10), DELTA, mean_runs=5, repetitions="always 5")  # type: ignore[arg-type]
    assert accounting.tuning(DpSgd(0.0, 0.1, 10), DELTA, mean_runs=5).epsilon == math.inf


def test_the_ledger_row_says_unaccounted_unless_it_was_paid_for() -> None:
    row = tuning_row(24, what="the learning rate with the best validation accuracy")
    assert row.status == "UNACCOUNTED" and "24 runs" in row.evidence
    paid = accounting.tuning(DpSgd(3.0, 0.2, 100), DELTA, mean_runs=8)
    row = tuning_row(5, accounted=paid)
    assert row.status == "accounted" and f"{paid.epsilon:.4g}" in row.evidence and "5 runs" not in row.evidence
    with pytest.raises(ValueError, match="no row"):
        tuning_row(1)
