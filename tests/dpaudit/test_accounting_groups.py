"""Several units of one person, and the best guess, against closed forms and integrals."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from mpmath import mp
from scipy.stats import binom, norm

from dpaudit.accounting import (
    DpSgd,
    best_guess,
    epsilon,
    gaussian_epsilon,
    group_loss,
    stated_group_loss,
)

DELTA = 1e-5


def mixture_delta(sigma: float, rate: float, units: int, eps: float) -> float:
    """The larger hockey-stick divergence of one step, by integrating the densities."""
    x = np.linspace(-12 * sigma, units + 12 * sigma, 400_001)
    inside = sum(binom.pmf(j, units, rate) * norm.pdf(x, j, sigma) for j in range(units + 1))
    outside = norm.pdf(x, 0, sigma)
    ways = ((inside, outside), (outside, inside))
    return max(float(np.trapezoid(np.maximum(p - math.exp(eps) * q, 0.0), x)) for p, q in ways)


@pytest.mark.parametrize("units", [1, 2, 5])
def test_one_sampled_step_is_the_mixture_of_gaussians(units: int) -> None:
    found = group_loss(DpSgd(0.8, 0.2, 1), units, DELTA)
    assert found.rule == "mechanism" and found.delta == DELTA
    assert mixture_delta(0.8, 0.2, units, found.epsilon) <= DELTA * 1.001  # an upper bound ...
    assert mixture_delta(0.8, 0.2, units, 0.98 * found.epsilon) > DELTA  # ... and a tight one


def test_one_unit_costs_what_the_accountant_says_and_more_cost_more_than_their_share() -> None:
    event = DpSgd(1.5, 0.1, 40)
    own = epsilon(event, DELTA)
    losses = [group_loss(event, units, DELTA).epsilon for units in (1, 2, 3)]
    assert own <= losses[0] <= 1.01 * own
    assert losses[1] > 2 * own and losses[2] > 3 * own


@pytest.mark.parametrize(("relation", "moved"), [("add-remove", 1.0), ("zero-out", 1.0), ("replace", 2.0)])
def test_everybody_in_every_step_is_one_gaussian(relation: str, moved: float) -> None:
    event = DpSgd(6.0, 1.0, 9, relation)  # type: ignore[arg-type]
    assert group_loss(event, 3, DELTA).epsilon == pytest.approx(gaussian_epsilon(3 * moved * 3 / 6.0, DELTA))
    assert best_guess(event) == pytest.approx(NormalDist().cdf(moved * 3 / 6.0 / 2))
    shuffled = DpSgd(6.0, 0.1, 90, relation, sampling="shuffle")  # type: ignore[arg-type]
    assert group_loss(shuffled, 3, DELTA) == group_loss(event, 3, DELTA)


def test_the_group_lemma_holds_where_no_pair_is_known() -> None:
    event = DpSgd(4.0, 0.1, 20, "replace")
    found = group_loss(event, 2, DELTA)
    half = found.epsilon / 2
    own = DELTA * (math.exp(half) - 1) / (math.exp(2 * half) - 1)
    assert found.rule == "group lemma" and found.delta == DELTA
    assert epsilon(event, own) <= half * 1.001 <= epsilon(event, own) * 1.01
    stated = stated_group_loss(1.0, DELTA, 2)
    assert stated.epsilon == 2.0 and stated.delta == pytest.approx(DELTA * (1 + math.e))
    assert stated_group_loss(0.0, DELTA, 4).delta == pytest.approx(4 * DELTA)
    assert stated_group_loss(400.0, DELTA, 5).delta == 1.0


def test_the_best_guess_of_one_sampled_step() -> None:
    """Total variation of q N(1) + (1 - q) N(0) against N(0) is q times that of the two Gaussians."""
    apart = 0.3 * (2 * NormalDist().cdf(0.5 / 0.7) - 1)
    assert best_guess(DpSgd(0.7, 0.3, 1)) == pytest.approx((1 + apart) / 2, abs=1e-4)
    assert best_guess(DpSgd(0.0, 0.3, 1)) == 1.0 and best_guess(DpSgd(1.0, 0.3, 0)) == 0.5


@pytest.mark.parametrize(("sigma", "rate", "steps", "units"), [(1.5, 0.05, 200, 3), (20.0, 0.001, 50_000, 2)])
def test_many_steps_of_a_group_against_dp_accounting(sigma: float, rate: float, steps: int, units: int) -> None:
    single = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma,
        sensitivities=list(range(units + 1)),
        sampling_probs=[float(binom.pmf(number, units, rate)) for number in range(units + 1)],
        value_discretization_interval=1e-3 if steps < 1000 else 1e-5,
    )
    theirs = single.self_compose(steps).get_epsilon_for_delta(DELTA)  # an upper bound too
    assert 0.98 * theirs <= group_loss(DpSgd(sigma, rate, steps), units, DELTA).epsilon <= 1.004 * theirs


@pytest.mark.parametrize(
    ("event", "units", "delta", "truth"),
    [
        # Nearly nothing is sampled away: the closed form at q = 1, where the mass of a plain FFT is lost in rounding.
        (DpSgd(123.86870197984483, 1 - 1e-12, 2223), 3, 2.236945465934236e-15, 9.3053),
        (DpSgd(19515.80007395587, 1 - 1e-12, 965411), 2, 8.88e-14, 0.68707),
        # What 1 - rate, or a weight that is a difference of distribution functions, rounds to nothing.
        (DpSgd(0.5018521607626505, 0.9999695374869898, 1, "zero-out"), 5, 7.4e-14, 122.5006),
        (DpSgd(0.7911967669965095, 0.9975255600465334, 1), 10, 6.738588428708383e-08, 145.592),
        # More units than are ever together in a batch: direct convolution, and integration in 60 digits.
        (DpSgd(213.77366690318874, 0.0014347306751267164, 1000), 200, 3.073e-13, 0.27564),
        (DpSgd(20.0, 1e-3, 1), 300, 1e-17, 0.14223),
        (DpSgd(0.8520491333344777, 1.2167804019359774e-06, 1, "zero-out"), 20, 2.5573110930631462e-05, 0.0),
        (DpSgd(0.41511673086863016, 1.222612749150456e-06, 1), 50, 1.3656654900923345e-10, 3.89587),
        (DpSgd(0.5884039457217489, 0.008418567642952197, 1), 20, 9.33e-7, 24.84),
    ],
)
def test_groups_in_the_tail(event: DpSgd, units: int, delta: float, truth: float) -> None:
    found = group_loss(event, units, delta)
    assert found.rule == "mechanism" and found.delta == delta
    assert truth * (1 - 1e-4) <= found.epsilon <= 1.005 * truth


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("units", [2, 30, 70, 200])
@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.97), (1.4, 0.0115), (2.0, 0.0002), (30.0, 0.9999)])
def test_one_step_of_any_group_is_exact(sigma: float, rate: float, units: int) -> None:
    """Both orders of the mixture in 60 digits: delta holds at the eps returned, and hardly below."""
    found = group_loss(DpSgd(sigma, rate, 1), units, 1e-9).epsilon
    mp.dps = 60
    q, m = mp.mpf(rate), 1 / mp.mpf(sigma)
    weights = [mp.binomial(units, j) * q**j * (1 - q) ** (units - j) for j in range(units + 1)]

    def tail(z: Any) -> Any:
        return mp.erfc(z / mp.sqrt(2)) / 2

    def value(eps: float) -> Any:
        def loss(z: Any) -> Any:
            return mp.log(mp.fsum(w * mp.exp(j * m * (z - j * m / 2)) for j, w in enumerate(weights)))

        def root(level: Any) -> Any:
            low, high = mp.mpf(-60), mp.mpf(60) + units * m
            for _ in range(120):
                middle = (low + high) / 2
                low, high = (middle, high) if loss(middle) < level else (low, middle)
            return low

        z = root(mp.mpf(eps))
        remove = mp.fsum(w * tail(z - j * m) for j, w in enumerate(weights)) - mp.exp(eps) * tail(z)
        if -eps <= mp.log(weights[0]):
            return remove
        z = root(mp.mpf(-eps))
        return max(remove, tail(-z) - mp.exp(eps) * mp.fsum(w * tail(j * m - z) for j, w in enumerate(weights)))

    assert value(found) <= 1e-9 * (1 + 1e-12)
    if units <= 64 and found < 600:  # beyond, a lattice serves
        assert found < 1e-9 or value(found * (1 - 1e-6)) > 1e-9


def test_many_units_are_rounded_up_to_multiples() -> None:
    """More than 64 numbers of units in a batch are lumped upwards, which costs a little and never less."""
    event = DpSgd(40.0, 0.3, 20)
    losses = [group_loss(event, units, DELTA).epsilon for units in (60, 63, 90, 120)]
    assert losses == sorted(losses)
    alone = gaussian_epsilon(120 * math.sqrt(20) / 40.0, DELTA)
    assert losses[-1] < alone


@pytest.mark.parametrize("sigma", [1e4, 1e6, 1e12, 1e300])
def test_noise_beyond_all_use_costs_no_time(sigma: float) -> None:
    """Far below what sigma = 1,000 costs."""
    found = group_loss(DpSgd(sigma, 0.1, 100), 3, 1e-5)
    assert 0 <= found.epsilon <= group_loss(DpSgd(1e3, 0.1, 100), 3, 1e-5).epsilon
