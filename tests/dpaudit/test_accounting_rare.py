"""Single steps in closed form, and losses that hardly ever count, against many digits and direct convolution."""

import math
from typing import Any

import numpy as np
import pytest
from mpmath import mp

from dpaudit import accounting
from dpaudit.accounting import DpSgd, epsilon
from dpaudit.accounting.moments import lattice_top, parts_of
from dpaudit.errors import UsageError

mp.dps = 60


def beyond(z: Any) -> Any:
    """P(N(0, 1) > z)."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def larger_delta(event: DpSgd, eps: float) -> Any:
    """The larger of both hockey-stick divergences of one Poisson step with Gaussian noise, in 60 digits."""
    q, shift, e = mp.mpf(event.sample_rate), 1 / mp.mpf(event.noise_multiplier), mp.exp(mp.mpf(eps))
    if event.relation == "replace":
        # y = e^(m z) solves a y^2 + (1-q)(1 - e^eps) y - a e^eps = 0 with a = q e^(-m^2/2).
        a, b = q * mp.exp(-(shift**2) / 2), (1 - q) * (1 - e)
        z = mp.log((-b + mp.sqrt(b * b + 4 * a * a * e)) / (2 * a)) / shift
        return q * beyond(z - shift) - e * q * beyond(z + shift) + (1 - e) * (1 - q) * beyond(z)
    z = mp.log((e - 1 + q) / q) / shift + shift / 2
    remove = (1 - q - e) * beyond(z) + q * beyond(z - shift)
    if 1 / e <= 1 - q:
        return remove
    z = mp.log((1 / e - 1 + q) / q) / shift + shift / 2
    return max(remove, (1 - e * (1 - q)) * beyond(-z) - e * q * beyond(shift - z))


ONE_STEP = [
    DpSgd(0.8499057315945387, 2.0780332180210724e-05, 1),
    DpSgd(0.6159613082332185, 7.903175861744191e-06, 1, "zero-out"),
    DpSgd(0.7935601802904639, 6.880011006754253e-05, 1, "replace"),
    DpSgd(0.34086679692756205, 0.0005000800395850018, 1, "replace"),
    DpSgd(3.0, 0.4, 1),
    DpSgd(40.0, 0.9, 1, "replace"),
]


@pytest.mark.parametrize("delta", [4e-4, 1e-9, 4e-14])
@pytest.mark.parametrize("event", ONE_STEP, ids=lambda event: f"{event.noise_multiplier:.2g} {event.relation}")
def test_one_step_is_exact_in_the_tail(event: DpSgd, delta: float) -> None:
    found = epsilon(event, delta)
    assert larger_delta(event, found) <= delta * (1 + 1e-15)
    if found > 0:
        assert larger_delta(event, found * (1 - 1e-8)) > delta


def test_one_step_of_other_schemes() -> None:
    """Laplace noise: delta(eps) = 1 - e^((eps - 1/b) / 2) at the rate q; fixed size: the Gaussian's at distance 2C."""
    q, b, delta = 0.01, 0.7, 1e-7
    own = 1 / b + 2 * math.log1p(-delta / q)
    found = epsilon(DpSgd(b, q, 1, noise="laplace"), delta)
    assert found == pytest.approx(math.log1p(q * math.expm1(own)), rel=1e-10)
    own = accounting.gaussian_epsilon(2 / 1.3, delta / q)
    found = epsilon(DpSgd(1.3, q, 1, sampling="fixed"), delta)
    assert found == pytest.approx(math.log1p(q * math.expm1(own)), rel=1e-10)
    assert epsilon(DpSgd(1.3, q, 1), 2 * q) == 0.0


@pytest.mark.parametrize(
    ("event", "delta", "truth"),
    [  # by convolution in extended precision, right to 5e-5, and by dp-accounting's PLD, which is an upper bound too
        (DpSgd(0.3996814646141938, 1.6504940591770943e-06, 10), 1.42e-8, 0.04931),
        (DpSgd(0.3996814646141938, 1.6504940591770943e-06, 2937), 1.42e-8, 1.0279),
        (DpSgd(0.42816128411128024, 2.88922728368516e-05, 2), 9.401326357803403e-11, 2.6697),
        (DpSgd(0.6773529084509622, 9.67218922375455e-06, 3, "replace"), 3.365739596653328e-12, 0.0380679),
        (DpSgd(0.5925943735925486, 1.2064132927515257e-06, 12, "zero-out"), 4.476594995274151e-14, 0.0574165),
    ],
)
def test_a_few_steps_at_a_tiny_rate(event: DpSgd, delta: float, truth: float) -> None:
    assert truth * (1 - 1e-4) <= epsilon(event, delta) <= 1.005 * truth


def test_a_tiny_rate_is_monotone() -> None:
    sigma, rate, delta = 0.3996814646141938, 1.6504940591770943e-06, 1.42e-8
    by_steps = [epsilon(DpSgd(sigma, rate, steps), delta) for steps in (1, 10, 1_000)]
    assert by_steps == sorted(by_steps) and by_steps[-1] < 0.7
    by_delta = [epsilon(DpSgd(sigma, rate, 2937), delta) for delta in (1e-7, 1e-9)]
    assert by_delta[0] < by_delta[1]


@pytest.mark.parametrize("rate", [1e-12, 1e-10])
def test_never_above_the_closed_form_without_sampling(rate: float) -> None:
    found = epsilon(DpSgd(0.5, rate, 1_000), 1e-14)
    assert found <= accounting.gaussian_epsilon(math.sqrt(1_000) / 0.5, 1e-14)


@pytest.mark.parametrize("points", [40, 400])
@pytest.mark.parametrize("event", [DpSgd(1.2, 0.2, 6), DpSgd(0.8, 0.001, 16)])
def test_the_top_of_the_lattice_is_that_of_its_own_probabilities(event: DpSgd, points: int) -> None:
    """A coarse lattice has a heavier tail than its steps, which a bound on the steps would miss."""
    parts = parts_of(((DpSgd(event.noise_multiplier, event.sample_rate, 1), event.steps),), "remove", 1e-14)
    grid = 20.0 / points
    top = lattice_top(parts, grid, 0.0, 3.0, math.log(1e-6))
    single = parts[0].lattice(grid, 0.0)
    whole = single.probabilities
    for _ in range(event.steps - 1):
        whole = np.convolve(whole, single.probabilities)
    losses = (event.steps * single.first + np.arange(whole.size)) * grid
    assert float(whole[losses > top].sum()) <= 1e-6


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_those_of_python(kind: type[np.floating[Any]]) -> None:
    """A float16 equals the float that it holds, so a result in its precision would be remembered for both."""
    sigma, rate = kind(1.0009765625), kind(1e-3)
    found = epsilon(DpSgd(sigma, rate, np.int32(1_000_000)), 1e-6)  # type: ignore[arg-type]
    assert type(found) is float
    accounting.pld._together.cache_clear()
    assert found == epsilon(DpSgd(float(sigma), float(rate), 1_000_000), 1e-6) > 1
    needed = accounting.noise_multiplier_for(epsilon=1.0, delta=1e-5, sample_rate=rate, steps=999)  # type: ignore[arg-type]
    assert needed == accounting.noise_multiplier_for(epsilon=1.0, delta=1e-5, sample_rate=float(rate), steps=999)


def test_what_is_purely_private_adds_its_own_eps_and_no_delta() -> None:
    rare = DpSgd(0.9265767178729599, 4.5142620216637796e-06, 16, sampling="fixed")
    pure = DpSgd(24.690905996527594, 0.033188426556440234, 2, noise="laplace")
    own = 2 * math.log1p(pure.sample_rate * math.expm1(1 / pure.noise_multiplier))
    together = accounting.joint_epsilon([rare, pure], 5.4e-12)
    assert epsilon(rare, 5.4e-12) <= together <= (epsilon(rare, 5.4e-12) + own) * (1 + 1e-9)


def test_a_unit_that_is_hardly_ever_seen_costs_nothing_beyond_that() -> None:
    seen = -math.expm1(100 * math.log1p(-1e-7))
    assert epsilon(DpSgd(0.4, 1e-7, 100), 1.01 * seen) == 0.0 < epsilon(DpSgd(0.4, 1e-7, 100), 0.1 * seen)


EVENT = DpSgd(1.0, 0.1, 10)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (lambda: DpSgd("1", 0.1, 1), "noise-multiplier"),  # type: ignore[arg-type]
        (lambda: DpSgd(10**400, 0.1, 1), "noise-multiplier"),
        (lambda: DpSgd(np.array(1.0), 0.1, 1), "noise-multiplier"),  # type: ignore[arg-type]
        (lambda: DpSgd(1.0, None, 1), "sample-rate"),  # type: ignore[arg-type]
        (lambda: DpSgd(1.0, 0.1, math.nan), "steps"),  # type: ignore[arg-type]
        (lambda: DpSgd(1.0, 0.1, math.inf), "steps"),  # type: ignore[arg-type]
        (lambda: DpSgd(1.0, 0.1, 10**14), "steps"),  # its eps would drown in rounding
        (lambda: DpSgd(1.0, 0.1, 10, sampling="allocation", epoch=True), "epoch"),
        (lambda: epsilon(EVENT, "1e-5"), "delta"),  # type: ignore[arg-type]
        (lambda: accounting.curve(EVENT, "1e-5"), "delta"),
        (lambda: accounting.epsilon_after(EVENT, 2.5, 1e-5), "steps"),  # type: ignore[arg-type]
        (lambda: accounting.epsilon_after(EVENT, math.nan, 1e-5), "steps"),  # type: ignore[arg-type]
        (lambda: accounting.group_loss(EVENT, 0, 1e-5), "units"),
        (lambda: accounting.group_loss(EVENT, math.nan, 1e-5), "units"),  # type: ignore[arg-type]
        (lambda: accounting.group_loss(EVENT, 2, 0.0), "delta"),
        (
            lambda: accounting.noise_multiplier_for(epsilon="1", delta=1e-5, sample_rate=0.1, steps=9),  # type: ignore[arg-type]
            "epsilon",
        ),
    ],
)
def test_what_is_no_number_of_the_kind_is_named(asked: Any, field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field}: got ") as failure:
        asked()
    assert "\n" not in str(failure.value)
