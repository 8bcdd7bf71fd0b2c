"""eps by privacy-loss distributions: the number that a claim quotes.

dp-accounting's PLD with pessimistic discretisation ("connect the dots", Doroshenko et al. 2022): an upper bound on the
true eps, tight to about 1e-4.
"""

import importlib.metadata
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtri

from dpaudit.accounting.events import (
    Direction,
    DpSgd,
    Noise,
    PrivacyLosses,
    Scheme,
    check_delta,
    neighbouring,
    sensitivity,
)
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.schemes import composed_as, fixed_size_deltas, moved
from dpaudit.documents import EpsilonAt, Relation
from dpaudit.errors import rejected

FINE = 1e-4  # discretisation of the loss; 1e-5 changes the sixth digit and takes ten times as long
COARSE = 1e-3  # for searching and for progress bars: still an upper bound
_POINTS = {FINE: 500_000, COARSE: 20_000}  # at most about this many loss values; beyond, the grid gets coarser
_PROGRESS_POINTS = 50
# Losses of one step, and of all of them, beyond which a claim says nothing: grids that wide fail in memory or overflow,
# so the closed form without amplification takes over, an upper bound for every scheme.
_WIDEST_STEP, _WIDEST = 1e5, 1e7


def accountant_name() -> str:
    """Name and version for the claim, e.g. 'dp-accounting 0.6.0 PLD'."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')} PLD"


def epsilon(event: DpSgd, delta: float) -> float:
    """eps of `event` at `delta`: dp-accounting's PLD, pessimistic. inf when there is no noise."""
    check_delta(delta)
    return _epsilon(composed_as(event), float(delta), FINE)


def curve(event: DpSgd, deltas: "npt.ArrayLike") -> tuple[EpsilonAt, ...]:
    """eps at several deltas, as the claim document holds them."""
    return tuple(
        EpsilonAt(delta=float(delta), epsilon=epsilon(event, float(delta)))
        for delta in np.atleast_1d(np.asarray(deltas, dtype=np.float64))
    )


def epsilon_after(event: DpSgd, steps: int, delta: float) -> float:
    """eps spent after the first `steps` of `event`: an upper bound for a progress bar and the ledger.

    At `event.steps` it is exactly `epsilon(event, delta)`. Before, the step count is rounded up to one of fifty
    and the grid of the PLD is coarser; both can only raise the value, which never exceeds `epsilon(event, delta)`
    and never decreases with `steps`.
    """
    check_delta(delta)
    if steps <= 0:
        return 0.0
    if steps >= event.steps:
        return epsilon(replace(event, steps=steps), delta)
    stride = max(1, math.ceil(event.steps / _PROGRESS_POINTS))
    rounded = min(event.steps, math.ceil(steps / stride) * stride)
    total = epsilon(event, delta)
    if trivial(event) is not None or _hopeless(composed_as(event), delta) is not None:
        return total
    spent = composed_as(replace(event, steps=rounded))
    return min(_epsilon_on(spent, float(delta), grid_of(composed_as(event), COARSE)), total)


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    relation: Relation = "add-remove",
    noise: Noise = "gaussian",
    sampling: Scheme = "poisson",
) -> float:
    """The smallest sigma (to 1e-3, relative) whose PLD eps at `delta` is at most `epsilon`.

    Searched on a coarse grid, decided on the final one: the eps of the returned sigma never exceeds the target.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise rejected("epsilon", epsilon, "a finite number > 0")
    check_delta(delta)
    if steps < 1 or not 0 < sample_rate <= 1:
        field, value = ("steps", steps) if steps < 1 else ("sample-rate", sample_rate)
        raise rejected(field, value, "more than 0 (and a sample rate of at most 1)")

    def eps(sigma: float, grid: float) -> float:
        return _epsilon(composed_as(DpSgd(sigma, sample_rate, steps, relation, noise, sampling)), float(delta), grid)

    def log_excess(log_sigma: float) -> float:
        return math.log(max(eps(math.exp(log_sigma), COARSE), 1e-300) / epsilon)

    enough = _enough(epsilon, delta, composed_as(DpSgd(1.0, sample_rate, steps, relation, noise, sampling)))
    low, high = _bracket(enough, lambda sigma: eps(sigma, COARSE) > epsilon)
    # Right up to the coarse discretisation. The final grid decides: out until it holds, in while it still does.
    high = math.exp(brentq(log_excess, math.log(low), math.log(high), xtol=1e-4, rtol=1e-8)) * 1.0002
    for _ in range(200):
        if eps(high, FINE) <= epsilon:
            break
        high *= 1.0005
    else:
        raise rejected("epsilon", epsilon, f"a target that {accountant_name()} can resolve at delta={delta}")
    while eps(high / 1.001, FINE) <= epsilon:
        high /= 1.001
    return high


def discrete_losses(event: DpSgd, direction: Direction) -> PrivacyLosses:
    """The composed privacy-loss distribution of `event`, for the claim test.

    Pessimistic: its hockey-stick divergence is an upper bound at every eps. Under replace both directions are equal.
    """
    if direction not in get_args(Direction):
        raise rejected("direction", direction, get_args(Direction))
    event = composed_as(event)
    if event.sample_rate == 0 or event.steps == 0:
        return PrivacyLosses(np.zeros(1), np.ones(1), 0.0)
    if event.noise_multiplier == 0 or _hopeless(event, 0.5) is not None:
        return PrivacyLosses(np.zeros(0), np.zeros(0), 1.0)
    composed = composition(event, grid_of(event, FINE))
    pmf = (composed._pmf_remove if direction == "remove" else composed._pmf_add).to_dense_pmf()
    losses = (pmf._lower_loss + np.arange(pmf.size)) * pmf._discretization
    # The FFT leaves values of about -1e-17 where the probability is zero.
    probabilities = np.clip(np.asarray(pmf._probs, dtype=np.float64), 0.0, None)
    return PrivacyLosses(losses, probabilities, float(pmf._infinity_mass))


def trivial(event: DpSgd) -> float | None:
    """eps where nothing has to be computed: 0 when nothing is released, inf without noise."""
    if event.sample_rate == 0 or event.steps == 0:
        return 0.0
    return math.inf if event.noise_multiplier == 0 else None


def _epsilon(event: DpSgd, delta: float, wished: float) -> float:
    known = trivial(event)
    if known is None:
        known = _hopeless(event, delta)
    return known if known is not None else _epsilon_on(event, delta, grid_of(event, wished))


def _hopeless(event: DpSgd, delta: float) -> float | None:
    """mu^2 / 2 + z mu with P(N(0,1) > z) = delta, where the noise is too small to build a distribution of losses."""
    mu, count = moved(event) / event.noise_multiplier, event.sample_rate * event.steps
    if event.noise == "laplace":
        return mu * event.steps if mu > _WIDEST_STEP or mu * max(1.0, count) > _WIDEST else None
    loss = mu * mu / 2
    if loss * max(1.0, count) <= _WIDEST and (loss <= _WIDEST_STEP or event.sample_rate == 1):
        return None
    return loss * event.steps + mu * math.sqrt(event.steps) * float(-ndtri(delta))


@lru_cache(maxsize=4096)
def _epsilon_on(event: DpSgd, delta: float, grid: float) -> float:
    return float(composition(event, grid).get_epsilon_for_delta(delta))


@lru_cache(maxsize=8)
def _mechanism(step: DpSgd, grid: float) -> Any:
    """The losses of a single step."""
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    if step.sampling == "fixed":
        top, deltas = fixed_size_deltas(step.noise_multiplier, step.sample_rate, grid)
        return privacy_loss_distribution.PrivacyLossDistribution(
            pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, -top, top, deltas)
        )
    if step.noise == "laplace":  # takes no relation: the sensitivity is stated here (and DpSgd refuses what is unknown)
        return privacy_loss_distribution.from_laplace_mechanism(
            step.noise_multiplier,
            sensitivity=sensitivity(step.relation),
            sampling_prob=step.sample_rate,
            value_discretization_interval=grid,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        step.noise_multiplier,
        sampling_prob=step.sample_rate,
        value_discretization_interval=grid,
        neighboring_relation=neighbouring(step.relation),
    )


@lru_cache(maxsize=2)
def composition(event: DpSgd, grid: float) -> Any:
    if event.sample_rate == 1 and event.noise == "gaussian":
        # Without subsampling T Gaussians are one Gaussian with sigma / sqrt(T), exactly.
        return _mechanism(
            replace(event, noise_multiplier=event.noise_multiplier / math.sqrt(event.steps), steps=1), grid
        )
    single = _mechanism(replace(event, steps=1), grid)
    return single if event.steps == 1 else single.self_compose(event.steps)


@lru_cache(maxsize=256)
def _width(event: DpSgd) -> float:
    """How wide the composed distribution is, from a rough one."""
    mu = moved(event) / event.noise_multiplier
    if event.sample_rate == 1 and event.noise == "gaussian":
        mu *= math.sqrt(event.steps)  # a single mechanism then, whose grid has to be as coarse as it is wide
    # One step without subsampling: from the mean mu^2/2 ten standard deviations mu either way.
    # A Laplace loss lies within mu of 0.
    widest = 2 * mu if event.noise == "laplace" else mu * mu / 2 + 20 * mu
    rough = max(min(1e-2, widest / 100), widest / 20_000)
    composed = composition(event, rough)
    return float(rough * max(composed._pmf_remove.to_dense_pmf().size, composed._pmf_add.to_dense_pmf().size))


def grid_of(event: DpSgd, wished: float) -> float:
    """The discretisation: as wished, finer for tiny losses, coarser where it would take too many points."""
    width = _width(event)
    return min(max(wished, width / _POINTS[wished]), max(width / 20_000, 1e-9))


def _enough(epsilon: float, delta: float, event: DpSgd) -> float:
    """A sigma that is always enough, by the closed form without amplification (Laplace: T pure guarantees add up)."""
    if event.noise == "laplace":
        return moved(event) * event.steps / epsilon
    mu = brentq(lambda m: gaussian_epsilon(m, delta) - epsilon, 1e-9, 10 * (math.sqrt(2 * epsilon) + epsilon + 10))
    return float(moved(event) * math.sqrt(event.steps) / mu)


def _bracket(high: float, exceeds: Any) -> tuple[float, float]:
    """(low, high) with eps(low) > target >= eps(high) on the search grid."""
    for _ in range(40):
        if not exceeds(high):
            break
        high *= 1.01
    low = high / 1.5
    while not exceeds(low):
        low, high = low / 1.5, low
    return low, high
