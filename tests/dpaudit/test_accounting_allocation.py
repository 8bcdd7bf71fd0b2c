"""Random allocation: never below the truth and tight, by closed forms, quadrature, exact moments and simulation."""

import importlib.util
import itertools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr, ndtri

from dpaudit import accounting
from dpaudit.accounting import DpSgd, allocation
from dpaudit.accounting.allocation import blocks, epoch_ratio
from dpaudit.accounting.events import Direction
from dpaudit.accounting.reference import reference_check, reference_range
from dpaudit.errors import EnvironmentFailure, UsageError

Floats = npt.NDArray[np.float64]


def event(sigma: float, steps: int, epoch: int, draws: int = 1) -> DpSgd:
    return DpSgd(sigma, draws / epoch, steps, sampling="allocation", epoch=epoch)


def delta_of(losses: Floats, p: Floats, infinite: float, eps: float) -> float:
    return float(np.sum(p * np.clip(-np.expm1(eps - losses), 0.0, None))) + infinite


def two_steps(shift: float, eps: float, direction: Direction) -> float:
    """delta of one of two steps, by quadrature over the first ratio; the other in closed form (Black-Scholes)."""
    y = np.linspace(-14.0, 14.0, 40_001)
    first = np.exp(shift * y - shift**2 / 2)
    weight = np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    if direction == "remove":  # E (U - c)_+ = E over the first of the call on e^Y with strike 2 c - first, over 2
        strike = 2 * math.exp(eps) - first
        k = np.maximum(strike, 1e-300)
        d = (-np.log(k) + shift**2 / 2) / shift
        value = np.where(strike > 0, ndtr(d) - k * ndtr(d - shift), 1.0 - strike)
        return float(weight @ value) / 2
    strike = 2 * math.exp(-eps) - first  # E (1 - e^eps U)_+ = e^eps / 2 E of the put
    k = np.maximum(strike, 1e-300)
    d = (-np.log(k) + shift**2 / 2) / shift
    value = np.where(strike > 0, k * ndtr(shift - d) - ndtr(-d), 0.0)
    return float(weight @ value) * math.exp(eps) / 2


@pytest.mark.parametrize("sigma", [0.5, 1.3, 10.0])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_one_of_two_steps_is_above_the_quadrature_by_little(sigma: float, direction: Direction) -> None:
    found = accounting.discrete_losses(event(sigma, 2, 2), direction)
    for eps in (0.0, 0.3 / sigma, 1.0 / sigma, 2.0 / sigma):
        exact = two_steps(1 / sigma, eps, direction)
        ours = delta_of(found.losses, found.probabilities, found.infinity_mass, eps)
        # The quadrature's own rounding is that of sums of 40,000 numbers below one.
        assert exact * (1 - 1e-9) - 1e-13 <= ours <= exact * 1.002 + 1e-12


def test_a_tiny_delta_keeps_its_digits() -> None:
    eps = accounting.epsilon(event(1.0, 2, 2), 1e-12)
    assert two_steps(1.0, eps, "remove") == pytest.approx(1e-12, rel=2e-3)
    assert two_steps(1.0, eps * (1 + 1e-9), "remove") <= 1e-12


def moment(shift: float, steps: int, order: int) -> float:
    """E_Q U^order, exactly: order! times a coefficient of (sum_j e^(s^2 j (j-1) / 2) z^j / j!)^t."""
    series = np.array([math.exp(shift**2 * j * (j - 1) / 2) / math.factorial(j) for j in range(order + 1)])
    power = np.eye(1, order + 1)[0]
    for _ in range(steps):
        power = np.convolve(power, series)[: order + 1]
    return math.factorial(order) * float(power[order]) / steps**order


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 3), (0.77, 10), (0.3, 64), (1.1, 127)])
def test_the_ratio_has_mean_one_and_its_moments_are_just_above_the_exact_ones(shift: float, steps: int) -> None:
    coarse, fine = (epoch_ratio(shift, steps, 9.0, points) for points in (1000, 4000))
    for ratio in (coarse, fine):
        values = np.exp(ratio.losses)
        assert ratio.probabilities.sum() + ratio.zero == pytest.approx(1.0, abs=ratio.relative)
        assert ratio.probabilities @ values + ratio.infinite == pytest.approx(1.0, abs=ratio.relative)
        for order in (2, 3, 4):
            excess = float(ratio.probabilities @ values**order) / moment(shift, steps, order) - 1
            assert -1e-10 <= excess <= (3e-4 if ratio is fine else 5e-3)


def test_a_finer_lattice_is_dominated_by_a_coarser_one() -> None:
    """The convex order itself: E (U - c)_+ falls with every refinement."""
    ratios = [epoch_ratio(1.0, 6, 8.0, points) for points in (250, 1000, 4000)]
    for strike in (0.5, 1.0, 2.0, 8.0):
        calls = [float(r.probabilities @ np.maximum(np.exp(r.losses) - strike, 0.0)) + r.infinite for r in ratios]
        assert calls[0] >= calls[1] >= calls[2] > 0


def test_everybody_in_every_step_is_the_gaussian() -> None:
    for sigma, steps, epoch in ((5.0, 20, 4), (2.0, 3, 1), (30.0, 7, 7)):
        closed = accounting.gaussian_epsilon(math.sqrt(steps) / sigma, 1e-5)
        assert accounting.epsilon(event(sigma, steps, epoch, epoch), 1e-5) == pytest.approx(closed, rel=1e-12)
    assert blocks(event(1.0, 20, 10, 10)) == ((1, 20),)


def test_k_of_t_is_cut_into_blocks() -> None:
    assert blocks(event(1.0, 20, 10, 3)) == ((3, 4), (4, 2))
    assert blocks(event(1.0, 14, 7, 4)) == ((1, 2), (2, 6))
    for draws, epoch in itertools.product(range(1, 8), range(7, 12)):
        parts = blocks(event(1.0, epoch, epoch, draws))
        assert sum(size * count for size, count in parts) == epoch and sum(count for _, count in parts) == draws
    # k blocks of t / k steps are, as epochs, the same mechanism.
    assert accounting.epsilon(event(1.2, 24, 12, 3), 1e-5) == accounting.epsilon(event(1.2, 24, 4), 1e-5)


def loss(draws: int, x: Floats, sigma: float) -> Floats:
    """ln of the mean over all subsets of `draws` steps of exp(sum of (2 x - 1) / (2 sigma^2)): (n, t) -> (n,)."""
    g = (2 * x - 1) / (2 * sigma**2)
    subsets = list(itertools.combinations(range(x.shape[1]), draws))
    sums = np.stack([g[:, list(chosen)].sum(axis=1) for chosen in subsets], axis=1)
    return np.asarray(np.logaddexp.reduce(sums, axis=1) - math.log(len(subsets)))


@pytest.mark.parametrize(("epoch", "draws", "epochs"), [(4, 1, 3), (5, 2, 1), (5, 3, 2), (4, 3, 1)])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_no_simulation_of_the_mechanism_itself_exceeds_the_bound(
    epoch: int, draws: int, epochs: int, direction: Direction
) -> None:
    """delta of k-subsets, by 400,000 runs each way; the blocks of `allocation` are not used here."""
    sigma, runs = 1.0, 400_000
    rng = np.random.default_rng([epoch, draws, epochs, len(direction)])
    total = np.zeros(runs)
    for _ in range(epochs):
        x = sigma * rng.standard_normal((runs, epoch))
        if direction == "remove":
            x[np.arange(runs)[:, None], np.argsort(rng.random((runs, epoch)), axis=1)[:, :draws]] += 1.0
        total += loss(draws, x, sigma)
    found = accounting.discrete_losses(event(sigma, epoch * epochs, epoch, draws), direction)
    for eps in (0.0, 0.5, 1.0, 2.0):
        gained = np.clip(-np.expm1(eps - (total if direction == "remove" else -total)), 0.0, None)
        lowest = float(gained.mean()) - 5.0 * float(gained.std()) / math.sqrt(runs)
        ours = delta_of(found.losses, found.probabilities, found.infinity_mass, eps)
        assert lowest <= ours
        if draws == 1:  # the pair itself: tight
            assert ours <= float(gained.mean()) * 1.001 + 5.0 * float(gained.std()) / math.sqrt(runs)


def test_epochs_compose_and_one_cut_short_counts_as_whole() -> None:
    whole = event(1.3, 200, 10)
    found = accounting.epsilon(whole, 1e-5)
    assert found == pytest.approx(5.7749, abs=1e-3)
    assert accounting.epsilon(replace(whole, steps=191), 1e-5) == found
    assert accounting.epsilon(replace(whole, steps=190), 1e-5) < found
    spent = [accounting.epsilon_after(whole, steps, 1e-5) for steps in (0, 1, 10, 11, 100, 200)]
    assert spent == sorted(spent) and spent[0] == 0.0 and spent[1] == spent[2] and spent[-1] == found


@pytest.mark.parametrize(("sigma", "steps", "epoch", "draws"), [(1.07, 200, 10, 1), (1.3, 50, 10, 2), (1.3, 20, 10, 3)])
def test_the_reference_implementation_encloses_the_number(sigma: float, steps: int, epoch: int, draws: int) -> None:
    found = event(sigma, steps, epoch, draws)
    eps = accounting.epsilon(found, 1e-5)
    bounds = reference_range(found, 1e-5, eps)
    assert not isinstance(bounds, str)
    assert 0.9 * eps < bounds[0] <= eps <= bounds[1] < 1.12 * eps
    check = reference_check(found, 1e-5, eps)
    assert check.epsilon == bounds[1] and check.note.startswith("at least")
    with pytest.raises(ArithmeticError, match="lies below"):
        reference_check(found, 1e-5, 0.85 * eps)


def test_cross_checks_name_the_reference_and_what_others_do_not_know() -> None:
    names = [(c.accountant.split()[0], c.epsilon is not None) for c in accounting.cross_check(event(2.0, 8, 4), 1e-5)]
    assert names == [("PLD_accounting", True), ("dp-accounting", False), ("opacus", False)]
    assert accounting.rdp_epsilon(event(2.0, 8, 4), 1e-5) is None


def test_without_the_reference_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting.require_reference()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'dpaudit\[allocation\]'") as failure:
        accounting.require_reference()
    assert "\n" not in str(failure.value)


def test_sigma_is_found_and_allocation_lies_far_below_shuffling() -> None:
    words = {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 200}
    sigma = accounting.noise_multiplier_for(**words, sampling="allocation")  # type: ignore[arg-type]
    assert (
        accounting.epsilon(event(sigma, 200, 10), 1e-5) <= 8.0 < accounting.epsilon(event(sigma / 1.002, 200, 10), 1e-5)
    )
    shuffled = accounting.noise_multiplier_for(**words, sampling="shuffle")  # type: ignore[arg-type]
    assert sigma < 1.1 and shuffled > 2.6


def test_noise_that_hides_nothing_costs_no_more_than_without_amplification() -> None:
    for sigma in (0.02, 0.05, 0.1, 0.3):
        found = accounting.epsilon(event(sigma, 40, 10), 1e-5)
        plain = accounting.gaussian_epsilon(math.sqrt(4) / sigma, 1e-5)
        assert 0.5 * plain < found <= plain


def test_the_trade_off_and_guesses_and_groups_know_it() -> None:
    found = event(1.0, 20, 10)
    fpr = np.array([0.01, 0.1, 0.5])
    tpr = accounting.largest_tpr(found, fpr)
    plain = ndtr(ndtri(fpr) + math.sqrt(2.0))
    assert (fpr < tpr).all() and (tpr < plain).all()
    assert 0.5 < accounting.best_guess(found) < (1 + accounting.gaussian_delta(math.sqrt(2.0), 0.0)) / 2
    pair = accounting.group_loss(found, 2, 1e-5)
    assert pair.rule == "group lemma" and pair.epsilon > accounting.epsilon(found, 1e-5)


def test_a_release_beside_it_composes() -> None:
    training = replace(event(1.3, 40, 10), relation="zero-out")
    release = accounting.release_event(2.0, "zero-out")
    both = accounting.joint_epsilon([training, release], 1e-5)
    alone = accounting.epsilon(training, 1e-5)
    assert alone < both < alone + accounting.gaussian_epsilon(0.5, 1e-5)
    sigma = accounting.noise_multiplier_beside(
        [release], epsilon=both, delta=1e-5, sample_rate=0.1, steps=40, relation="zero-out", sampling="allocation"
    )
    assert sigma == pytest.approx(1.3, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"relation": "replace"}, "relation"),
        ({"noise": "laplace"}, "sampling"),
        ({"sample_rate": 0.3}, "sample-rate"),
        ({"sample_rate": 0.0}, "sample-rate"),
        ({"sample_rate": 0.25, "epoch": 10}, "sample-rate"),
        ({"epoch": 0}, "epoch"),
        ({"epoch": 2.5}, "epoch"),
        ({"sampling": "poisson", "epoch": 10}, "epoch"),
    ],
)
def test_what_is_not_allocation_is_refused_in_one_line(change: dict[str, object], field: str) -> None:
    plain = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "sampling": "allocation"}
    with pytest.raises(UsageError, match=field) as failure:
        DpSgd(**{**plain, **change})  # type: ignore[arg-type]
    assert "\n" not in str(failure.value)


def test_pieces_are_epochs_of_one_draw() -> None:
    pairs = allocation.pieces(event(1.0, 20, 10, 7))
    assert [(step.sampling, step.steps, count) for step, count in pairs] == [("poisson", 1, 8), ("allocation", 2, 6)]
