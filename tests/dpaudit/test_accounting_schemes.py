"""Fixed-size and shuffled batches: the proofs against brute force over small data sets, and against second codings."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr

from dpaudit import accounting
from dpaudit.accounting import DpSgd, Scheme
from dpaudit.accounting.schemes import fixed_size_delta
from dpaudit.documents import Relation
from dpaudit.errors import UsageError

RELATIONS: tuple[Relation, ...] = ("add-remove", "zero-out", "replace")
Mixture = dict[float, float]  # mean -> weight


def fixed_batches(values: tuple[float, ...], size: int) -> Mixture:
    """Law of the sum over a uniform subset."""
    sums = [sum(chosen) for chosen in itertools.combinations(values, size)]
    return {value: sums.count(value) / len(sums) for value in set(sums)}


def hockey_stick(first: Mixture, second: Mixture, sigma: float, eps: float) -> float:
    """H_{e^eps}(first || second) of two mixtures of N(mean, sigma^2), by integration on a fine grid."""
    x = np.linspace(-12 * sigma - 6, 12 * sigma + 6, 60_001)

    def density(mixture: Mixture) -> npt.NDArray[np.float64]:
        parts = [weight * np.exp(-0.5 * ((x - mean) / sigma) ** 2) for mean, weight in mixture.items()]
        return np.asarray(sum(parts)) / (sigma * math.sqrt(2 * math.pi))

    gap = np.maximum(0.0, density(first) - math.exp(eps) * density(second))
    return float(np.trapezoid(gap, x))


@pytest.mark.parametrize("eps", [0.3, 1.5])
def test_no_neighbours_exceed_the_fixed_size_profile_and_the_worst_attain_it(eps: float) -> None:
    """Every data set of 4 places with values -1, 0, 1 (C = 1), batches of 2, every relation, both orders."""
    sigma, size, places = 1.1, 2, 4
    bound = float(fixed_size_delta(sigma, size / places, np.array([eps]))[0])
    worst: dict[Relation, float] = {}
    for rest in itertools.combinations_with_replacement((-1.0, 0.0, 1.0), places - 1):
        laws = {value: fixed_batches((*rest, value), size) for value in (-1.0, 0.0, 1.0)}
        pairs: list[tuple[Relation, Mixture, Mixture]] = [("replace", laws[1.0], laws[-1.0])]
        pairs += [("zero-out", laws[value], laws[0.0]) for value in (-1.0, 1.0)]
        # add-remove: the same batch size out of one place less
        pairs += [("add-remove", laws[value], fixed_batches(rest, size)) for value in (-1.0, 1.0)]
        for relation, one, other in pairs:
            found = max(hockey_stick(one, other, sigma, eps), hockey_stick(other, one, sigma, eps))
            worst[relation] = max(worst.get(relation, 0.0), found)
    assert all(value <= bound * (1 + 1e-6) for value in worst.values())
    assert worst["replace"] == pytest.approx(bound, rel=1e-5)
    assert worst["add-remove"] == pytest.approx(bound, rel=1e-5)  # two units change places: 2C, not C
    assert worst["zero-out"] > float(fixed_size_delta(2 * sigma, size / places, np.array([eps]))[0])  # more than C


def test_the_profile_below_one_is_that_of_the_other_order() -> None:
    losses = np.array([-2.0, -0.4, -0.01])
    sigma, rate = 0.9, 0.3
    got = fixed_size_delta(sigma, rate, losses)
    with_unit = {2.0: rate, 0.0: 1 - rate}  # P = N(2), Q = N(0): (P, (1 - rate) P + rate Q), turned round
    truth = [hockey_stick({0.0: 1.0}, with_unit, sigma, float(loss)) for loss in losses]
    assert got == pytest.approx(truth, rel=1e-5)


def second_coding(sigma: float, rate: float, steps: int, delta: float) -> float:
    """eps of T fixed-size steps from cell probabilities instead of hockey sticks, composed by plain convolution."""
    grid = 2e-3
    top = math.log1p(rate * math.expm1(2 / sigma**2 + 20 / sigma))
    edges = np.arange(0, math.ceil(top / grid) + 1) * grid
    # The noise at which the loss ln(1 - rate + rate e^(2 (x - 1) / sigma^2)) reaches each edge.
    x = 1 + sigma**2 / 2 * np.log1p(np.expm1(edges) / rate)
    above = (1 - rate) * ndtr(-x / sigma) + rate * ndtr(-(x - 2) / sigma)
    positive = above[:-1] - above[1:]
    losses = np.arange(-len(positive), len(positive) + 1) * grid
    # Rounded up, so pessimistic; the other order has e^-loss times the probability at -loss.
    mass = np.concatenate([(positive * np.exp(-edges[1:]))[::-1], [0.0], positive])
    mass[len(positive)] = 1 - mass.sum()
    composed = mass
    for _ in range(steps - 1):
        composed = np.convolve(composed, mass)
    values = np.arange(len(composed)) * grid + steps * losses[0]
    low, high = 0.0, float(values[-1])
    for _ in range(60):
        middle = (low + high) / 2
        keep = values > middle
        stick = float(composed[keep] @ -np.expm1(middle - values[keep]))
        low, high = (middle, high) if stick > delta else (low, middle)
    return high


@pytest.mark.parametrize("sigma, rate, steps", [(2.0, 0.25, 1), (2.5, 0.1, 3)])
def test_composition_of_fixed_size_steps_against_a_second_coding(sigma: float, rate: float, steps: int) -> None:
    got = accounting.epsilon(DpSgd(sigma, rate, steps, "replace", sampling="fixed"), 1e-5)
    assert got <= second_coding(sigma, rate, steps, 1e-5) <= got + steps * 3e-3


def test_fixed_size_lies_between_an_attained_case_and_renyi() -> None:
    """sigma = 1, q = 0.01, T = 1000: all others at -C and the unit at +C or -C is a Poisson pair at sigma / 2."""
    for relation in RELATIONS:
        got = accounting.epsilon(DpSgd(1.0, 0.01, 1000, relation, sampling="fixed"), 1e-5)
        assert got == pytest.approx(14.8207, abs=1e-3)  # 8 times the eps that Poisson batches would have
    attained = accounting.epsilon(DpSgd(0.5, 0.01, 1000), 1e-5)
    renyi = accounting.rdp_epsilon(DpSgd(1.0, 0.01, 1000, "replace", sampling="fixed"), 1e-5)
    assert renyi == pytest.approx(20.987, abs=1e-3)  # Wang, Balle and Kasiviswanathan, as dp-accounting computes it
    assert attained < got < renyi
    whole = [
        accounting.epsilon(DpSgd(2.0, 1.0, 5, "zero-out", sampling=scheme), 1e-5) for scheme in ("fixed", "poisson")
    ]
    assert whole[0] == whole[1]  # nobody gives way when everybody is in


def test_losses_of_fixed_size_steps_reproduce_eps() -> None:
    event = DpSgd(2.0, 0.2, 10, "replace", sampling="fixed")
    losses = accounting.discrete_losses(event, "add")
    eps = accounting.epsilon(event, 1e-5)
    above = losses.losses > eps
    stick = losses.infinity_mass + losses.probabilities[above] @ -np.expm1(eps - losses.losses[above])
    assert stick == pytest.approx(1e-5, rel=1e-3)


def shuffled_hockey_stick(values: tuple[float, ...], other: tuple[float, ...], sigma: float, eps: float) -> float:
    """One epoch of batches of two over a shuffled list, all outputs seen: the exact law on a two-dimensional grid."""
    axis = np.linspace(-8 * sigma - 3, 8 * sigma + 3, 401)

    def law(data: tuple[float, ...]) -> npt.NDArray[np.float64]:
        total = np.zeros((len(axis), len(axis)))
        orders = list(itertools.permutations(data))
        for order in orders:
            means = (order[0] + order[1], sum(order[2:]))
            density = [np.exp(-0.5 * ((axis - mean) / sigma) ** 2) for mean in means]
            total += np.outer(*density)
        return total / len(orders) / (2 * math.pi * sigma**2)

    gap = np.maximum(0.0, law(values) - math.exp(eps) * law(other))
    return float(gap.sum() * (axis[1] - axis[0]) ** 2)


def test_a_shuffled_epoch_is_one_gaussian_when_absent_units_leave_their_place_empty() -> None:
    sigma, eps = 0.8, 1.0
    worst = 0.0
    for rest in itertools.product((-1.0, 1.0), repeat=3):
        for value in (-1.0, 1.0):
            pair = ((*rest, value), (*rest, 0.0))
            worst = max(worst, shuffled_hockey_stick(*pair, sigma, eps), shuffled_hockey_stick(*pair[::-1], sigma, eps))
    bound = accounting.gaussian_delta(1 / sigma, eps)
    poisson = _poisson_epoch(sigma, eps)
    assert poisson < worst <= bound  # more than two Poisson steps at q = 1/2 would allow


def _poisson_epoch(sigma: float, eps: float) -> float:
    """delta at eps of what a shuffled epoch is often claimed to be, two Poisson steps at q = 1/2."""
    losses = accounting.discrete_losses(DpSgd(sigma, 0.5, 2), "remove")
    above = losses.losses > eps
    return float(losses.infinity_mass + losses.probabilities[above] @ -np.expm1(eps - losses.losses[above]))


@pytest.mark.parametrize("relation", RELATIONS)
def test_shuffled_epochs_have_the_closed_form(relation: Relation) -> None:
    mu = 2.0 if relation == "replace" else 1.0
    event = DpSgd(3.0, 1 / 8, 50, relation, sampling="shuffle")
    assert event.epochs == 7  # 6.25, and a partial epoch counts
    truth = accounting.gaussian_epsilon(mu * math.sqrt(7) / 3, 1e-5)
    assert truth - 1e-9 <= accounting.epsilon(event, 1e-5) <= truth + 1e-3
    spent = [accounting.epsilon_after(event, step, 1e-5) for step in range(51)]
    assert spent[0] == 0 and spent[50] == accounting.epsilon(event, 1e-5)
    assert all(a <= b for a, b in itertools.pairwise(spent))
    assert spent[1] >= accounting.gaussian_epsilon(mu / 3, 1e-5) - 1e-9  # the first step opens a whole epoch


@pytest.mark.parametrize("sampling", ["fixed", "shuffle"])
def test_sigma_for_a_scheme_keeps_the_target_and_exceeds_that_of_poisson(sampling: Scheme) -> None:
    found = accounting.noise_multiplier_for(epsilon=4, delta=1e-5, sample_rate=0.25, steps=20, sampling=sampling)
    event = DpSgd(found, 0.25, 20, sampling=sampling)
    assert 3.98 <= accounting.epsilon(event, 1e-5) <= 4
    assert found > 1.5 * accounting.noise_multiplier_for(epsilon=4, delta=1e-5, sample_rate=0.25, steps=20)


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"sampling": "cyclic"}, "sampling"),
        ({"sampling": "shuffle", "sample_rate": 0.3}, "sample-rate"),
        ({"sampling": "fixed", "noise": "laplace"}, "sampling"),
    ],
)
def test_schemes_without_a_proof_are_refused(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field}: got"):
        DpSgd(**{"noise_multiplier": 1.0, "sample_rate": 0.25, "steps": 4, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [DpSgd(0.01, 1.0, 10_000), DpSgd(1e-4, 0.5, 10), DpSgd(1e-300, 0.5, 10, "replace")])
def test_noise_too_small_for_a_grid_ends_in_the_closed_form(event: DpSgd) -> None:
    """These took gigabytes, or overflowed, before the closed form took over: without amplification, still a bound."""
    mu = (2.0 if event.relation == "replace" else 1.0) / event.noise_multiplier * math.sqrt(event.steps)
    got = accounting.epsilon(event, 1e-5)
    if math.isinf(mu * mu):
        assert got == math.inf
    else:
        assert mu * mu / 2 < got < mu * mu / 2 + 5 * mu
    assert accounting.epsilon_after(event, 3, 1e-5) <= got
