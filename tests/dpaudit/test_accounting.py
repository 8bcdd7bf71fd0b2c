"""eps against closed forms, published and measured values, numerical integration and dp-accounting called directly."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Relation
from dpaudit.errors import UsageError

RELATIONS: tuple[Relation, ...] = ("add-remove", "zero-out", "replace")
SENSITIVITY = {"add-remove": 1.0, "zero-out": 1.0, "replace": 2.0}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("sigma, steps", [(0.7, 1), (20.0, 400)])
@pytest.mark.parametrize("delta", [1e-3, 1e-7])
def test_every_accountant_against_the_gaussian_closed_form(
    relation: Relation, sigma: float, steps: int, delta: float
) -> None:
    truth = accounting.gaussian_epsilon(SENSITIVITY[relation] * math.sqrt(steps) / sigma, delta)
    event = DpSgd(sigma, 1.0, steps, relation)
    got = accounting.epsilon(event, delta)
    assert truth - 1e-9 <= got <= truth + 2e-4 * max(1.0, truth)
    renyi = accounting.rdp_epsilon(event, delta)
    assert renyi is not None
    # An upper bound, and not one of another sensitivity: a factor of 2 in mu would more than double it.
    assert truth - 1e-9 <= renyi <= 1.25 * truth + 0.15


def test_the_published_trap_of_the_two_conventions() -> None:
    """Values of dp-accounting 0.6.0 for GaussianDpEvent(1) at 1e-5: 4.377 with sensitivity C, 9.997 with 2C."""
    assert accounting.epsilon(DpSgd(1.0, 1.0, 1, "add-remove"), 1e-5) == pytest.approx(4.377, abs=1e-3)
    assert accounting.epsilon(DpSgd(1.0, 1.0, 1, "zero-out"), 1e-5) == pytest.approx(4.377, abs=1e-3)
    assert accounting.epsilon(DpSgd(1.0, 1.0, 1, "replace"), 1e-5) == pytest.approx(9.997, abs=1e-3)
    assert accounting.rdp_epsilon(DpSgd(1.0, 1.0, 1, "add-remove"), 1e-5) == pytest.approx(4.7285, abs=1e-3)
    assert accounting.rdp_epsilon(DpSgd(1.0, 1.0, 1, "replace"), 1e-5) == pytest.approx(10.73, abs=1e-2)


def test_subsampled_figures() -> None:
    """sigma = 1, q = 0.01, T = 1000, delta = 1e-5; prv-accountant says 1.82824, Opacus' RDP 2.101365."""
    assert accounting.epsilon(DpSgd(1.0, 0.01, 1000), 1e-5) == pytest.approx(1.828244, abs=1e-5)
    assert accounting.epsilon(DpSgd(1.0, 0.01, 1000, "zero-out"), 1e-5) == pytest.approx(1.828244, abs=1e-5)
    assert accounting.epsilon(DpSgd(1.0, 0.01, 1000, "replace"), 1e-5) == pytest.approx(2.843446, abs=1e-5)
    assert accounting.rdp_epsilon(DpSgd(1.0, 0.01, 1000), 1e-5) == pytest.approx(2.101367, abs=1e-4)
    assert accounting.rdp_epsilon(DpSgd(1.0, 0.01, 1000, "replace"), 1e-5) is None


def _hockey_stick(sigma: float, q: float, eps: float, direction: str) -> float:
    """sup over outputs of P - e^eps Q for one subsampled step, by numerical integration."""

    def plain(x: float) -> float:
        return math.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))

    def mixture(x: float) -> float:
        return (1 - q) * plain(x) + q * plain(x - 1)

    first, second = (mixture, plain) if direction == "remove" else (plain, mixture)
    value, _ = integrate.quad(
        lambda x: max(0.0, first(x) - math.exp(eps) * second(x)), -12 * sigma, 1 + 12 * sigma, limit=2000, epsabs=1e-13
    )
    return float(value)


@pytest.mark.parametrize("sigma, q", [(1.0, 0.1), (0.7, 0.5)])
def test_one_subsampled_step_against_integration(sigma: float, q: float) -> None:
    delta = 1e-5
    eps = accounting.epsilon(DpSgd(sigma, q, 1), delta)
    truth = max(_hockey_stick(sigma, q, eps, direction) for direction in ("remove", "add"))
    below = max(_hockey_stick(sigma, q, eps - 2e-4, direction) for direction in ("remove", "add"))
    assert truth <= delta * (1 + 1e-6) and below > delta * (1 - 1e-3)


def _direct(event: DpSgd, delta: float) -> float:
    relation = {
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "replace": NeighboringRelation.REPLACE_ONE,
    }[event.relation]
    accountant = PLDAccountant(relation)
    step = dp_accounting.PoissonSampledDpEvent(event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("sigma, q, steps", [(1.7, 0.2, 150)])
def test_equal_to_dp_accounting_called_directly(relation: Relation, sigma: float, q: float, steps: int) -> None:
    event = DpSgd(sigma, q, steps, relation)
    assert accounting.epsilon(event, 1e-5) == pytest.approx(_direct(event, 1e-5), rel=2e-5)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_losses_reproduce_eps_and_are_a_distribution(relation: Relation, direction: accounting.Direction) -> None:
    event = DpSgd(1.5, 0.2, 20, relation)
    losses = accounting.discrete_losses(event, direction)
    assert losses.losses.shape == losses.probabilities.shape and np.all(np.diff(losses.losses) > 0)
    assert np.all(losses.probabilities >= 0)
    assert -1e-9 <= losses.probabilities.sum() + losses.infinity_mass - 1 <= 1e-8
    # Under Q a loss l has probability p exp(-l); exp(-l) magnifies that rounding.
    assert losses.probabilities @ np.exp(-losses.losses) <= 1 + 2e-5
    eps, delta = accounting.epsilon(event, 1e-5), 1e-5
    above = losses.losses > eps
    stick = losses.infinity_mass + losses.probabilities[above] @ -np.expm1(eps - losses.losses[above])
    assert stick <= delta * (1 + 1e-6)


def test_one_of_the_directions_attains_eps() -> None:
    event = DpSgd(1.5, 0.2, 20)
    eps = accounting.epsilon(event, 1e-5)
    sticks = []
    for direction in ("remove", "add"):
        found = accounting.discrete_losses(event, direction)
        above = found.losses > eps
        sticks.append(found.infinity_mass + found.probabilities[above] @ -np.expm1(eps - found.losses[above]))
    assert max(sticks) == pytest.approx(1e-5, rel=1e-3)


def test_the_two_directions_are_each_other_turned() -> None:
    """Q of one direction is P of the other: exact for the mechanism, up to the grid (1e-4 a step at most) here."""
    event = DpSgd(1.7, 0.2, 150)
    remove, add = (accounting.discrete_losses(event, direction) for direction in ("remove", "add"))
    under_q = remove.probabilities * np.exp(-remove.losses)
    for threshold in (-3.0, -1.0, 0.0, 1.0, 3.0, 5.0):
        turned = add.probabilities[-add.losses > threshold].sum()
        assert under_q[remove.losses > threshold].sum() == pytest.approx(turned, rel=2e-3, abs=5e-6)


def test_directions_name_the_right_distributions() -> None:
    """'remove': P has the unit. Its loss in one step is unbounded above; without the unit it is at most -log(1-q)."""
    event = DpSgd(1.0, 0.3, 1)
    add, remove = (accounting.discrete_losses(event, direction) for direction in ("add", "remove"))
    assert add.losses[add.probabilities > 1e-12].max() == pytest.approx(-math.log(1 - 0.3), abs=1e-3)
    assert remove.losses[remove.probabilities > 1e-12].max() > 2
    assert remove.losses[remove.probabilities > 1e-12].min() == pytest.approx(math.log(1 - 0.3), abs=1e-3)


def test_losses_of_a_gaussian_have_its_moments() -> None:
    mu = math.sqrt(9) / 4.0
    found = accounting.discrete_losses(DpSgd(4.0, 1.0, 9), "remove")
    mean = found.probabilities @ found.losses
    variance = found.probabilities @ (found.losses - mean) ** 2
    assert mean == pytest.approx(mu**2 / 2, abs=1e-4) and variance == pytest.approx(mu**2, abs=1e-4)


@pytest.mark.parametrize(
    "target, q, steps, relation",
    [
        (8.0, 0.2, 150, "add-remove"),
        (8.0, 0.2, 150, "replace"),
        (3.0, 1.0, 50, "zero-out"),
        (1.0, 0.01, 2000, "add-remove"),
        (0.01, 0.5, 3, "replace"),
    ],
)
def test_sigma_is_the_smallest_that_keeps_the_target(target: float, q: float, steps: int, relation: Relation) -> None:
    sigma = accounting.noise_multiplier_for(epsilon=target, delta=1e-5, sample_rate=q, steps=steps, relation=relation)
    assert accounting.epsilon(DpSgd(sigma, q, steps, relation), 1e-5) <= target
    assert accounting.epsilon(DpSgd(sigma / 1.002, q, steps, relation), 1e-5) > target
    if q == 1:
        assert accounting.gaussian_epsilon(SENSITIVITY[relation] * math.sqrt(steps) / sigma, 1e-5) <= target


@settings(max_examples=3, deadline=None)
@given(st.floats(0.2, 10), st.floats(0.01, 1.0), st.integers(1, 60), st.sampled_from(RELATIONS), st.floats(-7, -2))
def test_sigma_never_exceeds_the_target(
    target: float, q: float, steps: int, relation: Relation, exponent: float
) -> None:
    delta = 10**exponent
    sigma = accounting.noise_multiplier_for(epsilon=target, delta=delta, sample_rate=q, steps=steps, relation=relation)
    assert accounting.epsilon(DpSgd(sigma, q, steps, relation), delta) <= target


def test_progress_is_an_upper_bound_that_ends_at_the_number() -> None:
    event = DpSgd(3.8, 0.2, 120)
    shown = [accounting.epsilon_after(event, steps, 1e-5) for steps in range(121)]
    assert shown[0] == 0 and shown[-1] == accounting.epsilon(event, 1e-5)
    assert all(a <= b for a, b in itertools.pairwise(shown))
    for steps in (1, 2, 50, 77, 119):
        exact = accounting.epsilon(DpSgd(3.8, 0.2, steps), 1e-5)
        assert exact - 1e-9 <= shown[steps] <= accounting.epsilon(DpSgd(3.8, 0.2, steps + 3), 1e-5) + 0.01
    assert accounting.epsilon_after(event, 130, 1e-5) > shown[-1]


def test_monotone_in_everything() -> None:
    base = accounting.epsilon(DpSgd(3.2, 0.1, 50), 1e-5)
    assert accounting.epsilon(DpSgd(3.3, 0.1, 50), 1e-5) < base
    assert accounting.epsilon(DpSgd(3.2, 0.11, 50), 1e-5) > base
    assert accounting.epsilon(DpSgd(3.2, 0.1, 51), 1e-5) > base
    assert accounting.epsilon(DpSgd(3.2, 0.1, 50), 1e-4) < base
    assert accounting.epsilon(DpSgd(3.2, 0.1, 50, "replace"), 1e-5) > base


def test_trivial_events() -> None:
    assert accounting.epsilon(DpSgd(0.0, 0.1, 5), 1e-5) == math.inf
    assert accounting.rdp_epsilon(DpSgd(0.0, 0.1, 5), 1e-5) == math.inf
    assert accounting.discrete_losses(DpSgd(0.0, 0.1, 5), "add").infinity_mass == 1
    for event in (DpSgd(1.0, 0.0, 5), DpSgd(1.0, 0.5, 0), DpSgd(0.0, 0.5, 0)):
        assert accounting.epsilon(event, 1e-5) == 0 and accounting.rdp_epsilon(event, 1e-5) == 0
        assert accounting.epsilon_after(event, 1, 1e-5) in (0.0, accounting.epsilon(DpSgd(1.0, 0.5, 1), 1e-5), math.inf)


def test_gaussian_closed_form() -> None:
    """Dong, Roth and Su (2022), corollary 2.13, by numerical integration of the hockey stick."""
    for mu, eps in [(1.0, 0.5), (0.3, 0.0), (3.0, 6.0), (0.05, 0.1)]:
        crossing = mu / 2 + eps / mu  # N(mu, 1) is more than e^eps N(0, 1) beyond it
        truth, _ = integrate.quad(
            lambda x, mu=mu, eps=eps: stats.norm.pdf(x, mu) - math.exp(eps) * stats.norm.pdf(x),
            crossing,
            crossing + 40,
            epsabs=1e-14,
        )
        assert accounting.gaussian_delta(mu, eps) == pytest.approx(truth, abs=1e-11)
    assert accounting.gaussian_delta(0.0, 1.0) == 0
    assert accounting.gaussian_epsilon(math.inf, 1e-5) == math.inf


@given(st.floats(1e-3, 60), st.floats(1e-10, 0.9))
def test_gaussian_epsilon_inverts_delta(mu: float, delta: float) -> None:
    eps = accounting.gaussian_epsilon(mu, delta)
    assert eps >= 0
    if eps > 0:
        assert accounting.gaussian_delta(mu, eps) == pytest.approx(delta, rel=1e-4)
    else:
        assert accounting.gaussian_delta(mu, 0.0) <= delta


def test_curve_and_name() -> None:
    points = accounting.curve(DpSgd(1.0, 0.1, 10), [1e-6, 1e-5, 1e-4])
    assert [point.delta for point in points] == [1e-6, 1e-5, 1e-4]
    assert points[0].epsilon > points[1].epsilon > points[2].epsilon
    assert accounting.accountant_name() == "dpaudit 0.1.0 PLD"


@pytest.mark.parametrize(
    "arguments, field",
    [
        ((-1.0, 0.1, 1), "noise-multiplier"),
        ((math.nan, 0.1, 1), "noise-multiplier"),
        ((1.0, 1.1, 1), "sample-rate"),
        ((1.0, math.nan, 1), "sample-rate"),
        ((1.0, 0.1, -1), "steps"),
        ((1.0, 0.1, 1.5), "steps"),
        ((1.0, 0.1, 1, "swap"), "relation"),
    ],
)
def test_bad_events_name_the_field(arguments: tuple[object, ...], field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field}: got"):
        DpSgd(*arguments)  # type: ignore[arg-type]


def test_bad_targets_name_the_field() -> None:
    for delta in (0.0, 1.0, -1.0, 1e-31, math.nan):
        with pytest.raises(UsageError, match=r"^delta: got"):
            accounting.epsilon(DpSgd(1.0, 0.1, 1), delta)
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match=r"^epsilon: got"):
            accounting.noise_multiplier_for(epsilon=target, delta=1e-5, sample_rate=0.1, steps=5)
    with pytest.raises(UsageError, match=r"^steps: got"):
        accounting.noise_multiplier_for(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=0)
    with pytest.raises(UsageError, match=r"^sample-rate: got"):
        accounting.noise_multiplier_for(epsilon=1.0, delta=1e-5, sample_rate=0.0, steps=1)


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-30])
def test_composition_stays_above_the_closed_form_down_to_the_smallest_delta(delta: float) -> None:
    """q just below 1 goes through the FFT, whose rounding must not push eps below the Gaussian's closed form."""
    truth = accounting.gaussian_epsilon(math.sqrt(50) / 3, delta)
    assert truth <= accounting.epsilon(DpSgd(3.0, 1 - 1e-9, 50), delta) <= truth + 1e-3
