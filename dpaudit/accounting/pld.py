"""eps by privacy-loss distributions: the number that a claim quotes.

Never below the truth: the lattice is pessimistic, the convolution exact in the tail, and truncation and rounding are
allowed for (dpaudit.accounting.steps and .composition say how). Tight: the lattice is chosen to cost a stated share of
eps (`FINE`), which takes about sqrt(T) points. Where that would be too many the grid gets coarser. The number is the
smallest of this bound, Rényi DP's, that of pure privacy and the Gaussian's without subsampling; where nothing is
subsampled, and for a single step, it is a closed form.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import get_args

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from dpaudit.accounting.allocation import pieces
from dpaudit.accounting.composition import Composed, compose, epsilon_of
from dpaudit.accounting.events import Direction, DpSgd, GroupOfUnits, PrivacyLosses, as_steps, check_delta, trivial
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.moments import (
    LOST,
    Parts,
    chernoff,
    grid_of,
    lattice_top,
    moments,
    parts_of,
    renyi,
    saddle,
    spacing,
    spread,
    tilt,
    tilted_range,
)
from dpaudit.accounting.one_step import one_step_epsilon
from dpaudit.accounting.schemes import composed_as, moved
from dpaudit.accounting.steps import directions, largest_loss
from dpaudit.documents import EpsilonAt
from dpaudit.errors import rejected

FINE = 2e-4  # of eps that the lattice may cost
COARSE = 3e-3  # for searching and for progress bars: still an upper bound
# Points of a lattice: up to the first number a grid finer than needed costs little, beyond the second it gets coarser.
_POINTS = {FINE: (1 << 16, 1 << 21), COARSE: (1 << 11, 1 << 19)}
_WHOLE_POINTS = {FINE: (1 << 17, 1 << 18), COARSE: (1 << 16, 1 << 17)}
_PROGRESS_POINTS = 50
# Losses of one step, and of all of them, beyond which a claim says nothing: grids that wide fail in memory or overflow,
# so Rényi DP takes over, or the closed form without amplification, an upper bound for every scheme.
_WIDEST_STEP, _WIDEST = 1e5, 1e7
_WIDEST_SHIFT = 20.0  # C / sigma of allocation, whose likelihood ratios themselves are numbers of the lattice
_MANY = 20_000  # steps from which on the careful convolution is tried at once
_TAIL = 1e-16  # probability at either end of a whole distribution that is cut off, as an infinite loss above
_TYPICAL = 1e-5  # delta at whose eps a whole distribution is as tight as `FINE` says

Steps = tuple[tuple[DpSgd, int], ...]  # one step of each mechanism, and how often


def accountant_name() -> str:
    """Name and version for the claim, e.g. 'dpaudit 0.1.0 PLD'."""
    return f"dpaudit {importlib.metadata.version('dpaudit')} PLD"


def epsilon(event: DpSgd, delta: float) -> float:
    """eps of `event` at `delta`: the smallest of the bounds that are proven for it. inf when there is no noise."""
    return together([event], delta)


def together(events: Sequence[DpSgd], delta: float, tolerance: float = FINE) -> float:
    """eps of several mechanisms on the same people, under one relation."""
    check_delta(delta)
    return _together(tuple(composed_as(event) for event in events), float(delta), tolerance)


def curve(event: DpSgd, deltas: "npt.ArrayLike") -> tuple[EpsilonAt, ...]:
    """eps at several deltas, as the claim document holds them."""
    return tuple(
        EpsilonAt(delta=float(delta), epsilon=epsilon(event, delta)) for delta in np.atleast_1d(np.asarray(deltas))
    )


def epsilon_after(event: DpSgd, steps: int, delta: float) -> float:
    """eps spent after the first `steps` of `event`: an upper bound for a progress bar and the ledger.

    At `event.steps` it is exactly `epsilon(event, delta)`. Before, the step count is rounded up to one of fifty and the
    grid of the losses is coarser; both can only raise the value, which never exceeds `epsilon(event, delta)` and never
    decreases with `steps`.
    """
    check_delta(delta)
    steps = as_steps(max(steps, 0) if isinstance(steps, int) else steps)
    if steps == 0:
        return 0.0
    if steps >= event.steps:
        return epsilon(replace(event, steps=steps), delta)
    stride = stride_of(event, _PROGRESS_POINTS)
    spent = 0.0
    # The largest so far: every count of steps has a grid of its own, so a later value might be a hair smaller.
    for passed in range(stride, stride * math.ceil(steps / stride) + 1, stride):
        spent = max(spent, together([replace(event, steps=min(passed, event.steps))], delta, COARSE))
    return min(spent, epsilon(event, delta))


def stride_of(event: DpSgd, points: int) -> int:
    """Steps between two of at most `points` counts that are looked at; whole epochs of allocation."""
    stride = max(1, math.ceil(event.steps / points))
    return stride if event.sampling != "allocation" else math.ceil(stride / event.epoch_steps) * event.epoch_steps


def discrete_losses(event: DpSgd, direction: Direction, tolerance: float = FINE) -> PrivacyLosses:
    """The composed privacy-loss distribution of `event`, for the claim test.

    Pessimistic: its hockey-stick divergence is an upper bound at every eps, rounding included, so what is judged by it
    is given more room than the mechanism leaves. Under replace both directions are equal.
    """
    if direction not in get_args(Direction):
        raise rejected("direction", direction, get_args(Direction))
    event = composed_as(event)
    if event.sample_rate == 0 or event.steps == 0:
        return PrivacyLosses(np.zeros(1), np.ones(1), 0.0)
    if event.noise_multiplier == 0 or _wide(event):
        return PrivacyLosses(np.zeros(0), np.zeros(0), 1.0)
    steps = _steps_of((event,))
    if direction not in directions(steps[0][0]):
        direction = "remove"  # the same distribution
    composed = _whole(steps, direction, tolerance)
    # What rounding may have taken from all places together counts as infinite losses.
    lost = composed.infinite + composed.together
    scale = math.exp(composed.log_scale + composed.relative)
    return PrivacyLosses(composed.losses + composed.slack, composed.tilted * scale, min(1.0, lost * scale))


@lru_cache(maxsize=4096)
def _together(events: tuple[DpSgd, ...], delta: float, tolerance: float) -> float:
    known = [trivial(event) for event in events]
    if any(value == math.inf for value in known):
        return math.inf
    costly = tuple(event for event, value in zip(events, known, strict=True) if value is None)
    value = _convolved(costly, delta, tolerance)
    if all(event.noise == "gaussian" for event in costly):
        # With little noise the unit is seen in any case, and the closed form without amplification may be smaller.
        mu = math.hypot(
            *(math.sqrt(_participations(event)) * moved(event) / event.noise_multiplier for event in costly)
        )
        return min(value, gaussian_epsilon(mu, delta)) if costly else 0.0
    pure = tuple(event for event in costly if event.noise == "laplace")
    if len(pure) < len(costly):
        # What is purely private adds its own eps and no delta.
        rest = _together(tuple(event for event in costly if event not in pure), delta, tolerance)
        own = sum(event.steps * max(largest_loss(event, order) for order in directions(event)) for event in pure)
        value = min(value, rest + own)
    return value


def _convolved(costly: tuple[DpSgd, ...], delta: float, tolerance: float) -> float:
    if any(_wide(event) for event in costly):
        # Sequential composition, each at its share of delta.
        return sum(_without_lattice(event, delta / len(costly)) for event in costly)
    steps = _steps_of(costly)
    if not steps or (len(costly) == 1 and delta >= _ever_seen(costly[0])):
        return 0.0
    if len(steps) == 1 and steps[0] == (replace(steps[0][0], sample_rate=1.0, noise="gaussian"), 1):
        return gaussian_epsilon(moved(steps[0][0]) / steps[0][0].noise_multiplier, delta)
    if len(steps) == 1 and steps[0][1] == 1 and (exact := one_step_epsilon(steps[0][0], delta)) < math.inf:
        return exact
    return _by_losses(steps, delta, tolerance)


def _ever_seen(event: DpSgd) -> float:
    """The probability that a unit is in any batch at all: no more than that can both worlds differ by."""
    if event.sampling == "allocation" or event.sample_rate == 1:
        return 1.0
    units = event.units if isinstance(event, GroupOfUnits) else 1
    return -math.expm1(units * event.steps * math.log1p(-event.sample_rate)) * (1.0 + 1e-12)


def _participations(event: DpSgd) -> int:
    """How many steps a unit can be in."""
    return event.draws * event.epochs if event.sampling == "allocation" else event.steps


def _steps_of(events: tuple[DpSgd, ...]) -> Steps:
    """The steps to convolve: all Gaussians without subsampling are one Gaussian, exactly."""
    single = [pair for event in events for pair in _single(event)]
    full = [(step, times) for step, times in single if step.sample_rate == 1 and step.noise == "gaussian"]
    steps = [pair for pair in single if pair not in full]
    if full:
        mu = math.sqrt(sum(times * (moved(step) / step.noise_multiplier) ** 2 for step, times in full))
        steps.append((DpSgd(moved(full[0][0]) / mu, 1.0, 1, full[0][0].relation), 1))
    return tuple(steps)


def _single(event: DpSgd) -> Steps:
    """What is convolved, and how often: a step, or whole epochs of allocation."""
    return pieces(event) if event.sampling == "allocation" else ((replace(event, steps=1), event.steps),)


def _by_losses(steps: Steps, delta: float, tolerance: float) -> float:
    """The larger eps of both directions; the one that is clearly smaller at a coarse look is not looked at again.

    Of the coarse and the fine number the smaller counts: where losses are rare, rounding costs more on a fine grid.
    """
    orders = sorted({direction for step, _ in steps for direction in directions(step)}, reverse=True)
    rough = {direction: _one_direction(steps, direction, delta, COARSE) for direction in orders}
    if tolerance != FINE:
        return max(rough.values())
    value = 0.0
    for direction in sorted(orders, key=lambda direction: -rough[direction]):
        if rough[direction] > value:
            value = max(value, min(rough[direction], _one_direction(steps, direction, delta, FINE)))
    return value


@lru_cache(maxsize=4096)
def _one_direction(steps: Steps, direction: Direction, delta: float, tolerance: float) -> float:
    cut = 0.5 * LOST * delta
    parts = parts_of(steps, direction, cut, fine=tolerance == FINE)
    guess, best = saddle(parts, math.log(delta))
    guess = max(guess, 0.0)
    value = _on_lattice(parts, delta, tolerance, guess, best)
    for _ in range(2):
        # Rare large losses mislead the guess: once more with a grid that fits what was found.
        if value > 0.6 * guess or guess == 0:
            break
        guess = value
        value = min(value, _on_lattice(parts, delta, tolerance, guess, best))
    pure = sum(part.times * largest_loss(part.step, direction) for part in parts)
    return min(value, renyi(parts, delta), pure)


def _on_lattice(parts: Parts, delta: float, tolerance: float, guess: float, best: float) -> float:
    """eps with the tilts and transforms in turn, cheap ones first, until the allowance for rounding costs little."""
    cut = 0.5 * LOST * delta
    top, at = chernoff(parts, math.log(cut))
    theta, (low, high) = tilt(parts, best, guess)
    window = (min(low, guess), max(high, top, 1e-12))
    deviation = math.sqrt(moments(parts, 0.0).variance)
    wished = spacing(parts, best, tolerance * max(guess, 1e-3 * deviation))
    grid = grid_of(parts, theta, wished, window, _POINTS[tolerance])
    value = math.inf
    many = sum(part.times for part in parts) > _MANY
    for tilted, careful in (*(() if many else ((theta, False),)), (theta, True), (best, True)):
        if tilted != theta:
            low, high = tilted_range(parts, tilted, _TAIL)
            window = (min(low, guess), max(high, top))
            grid = max(grid, (window[1] - window[0]) / (2 * _POINTS[tolerance][1]))
        # Of the lattice, not of the steps: what it rounds beyond an end of the window comes back at the other.
        moved_by = spread(parts, tilted, grid, _TAIL)
        ends = window[0] - moved_by, max(window[1] + moved_by, lattice_top(parts, grid, tilted, at, math.log(cut)))
        composed = compose(parts, grid, tilted, ends, cut, careful=careful)
        value = min(value, epsilon_of(composed, delta, guess))
        if value - epsilon_of(replace(composed, allowance=0.0), delta, guess) <= 0.5 * tolerance * value:
            break
    return value


@lru_cache(maxsize=8)
def _whole(steps: Steps, direction: Direction, tolerance: float) -> Composed:
    """The distribution of all losses, not tilted."""
    parts = parts_of(steps, direction, _TAIL, fine=tolerance == FINE)
    low, high = tilted_range(parts, 0.0, _TAIL)
    guess, theta = saddle(parts, math.log(_TYPICAL))
    wished = spacing(parts, theta, tolerance * max(guess, 1e-3 * math.sqrt(moments(parts, 0.0).variance)))
    grid = grid_of(parts, 0.0, wished, (low, high), _WHOLE_POINTS[tolerance])
    moved_by, at = spread(parts, 0.0, grid, _TAIL), chernoff(parts, math.log(_TAIL))[1]
    ends = low - moved_by, max(high + moved_by, lattice_top(parts, grid, 0.0, at, math.log(_TAIL)))
    return compose(parts, grid, 0.0, ends, _TAIL)


def _wide(event: DpSgd) -> bool:
    """Whether the noise is too small to build a distribution of losses: a claim that says nothing."""
    mu, count = moved(event) / event.noise_multiplier, max(1.0, event.sample_rate * event.steps)
    loss = mu if event.noise == "laplace" else mu * mu / 2
    if event.sample_rate == 1 and event.noise == "gaussian":
        return not math.isfinite(loss * event.steps)  # has a closed form
    if event.sampling == "allocation" and mu > _WIDEST_SHIFT:
        return True
    return loss > _WIDEST_STEP or loss * count > _WIDEST


def _without_lattice(event: DpSgd, delta: float) -> float:
    """eps by Rényi DP, or without any amplification: mu^2 / 2 + z mu with P(N(0, 1) > z) = delta."""
    mu = moved(event) / event.noise_multiplier
    if event.noise == "laplace":
        return mu * event.steps
    times = _participations(event)
    value = mu * mu / 2 * times + mu * math.sqrt(times) * float(-ndtri(delta))
    if mu * mu / 2 > _WIDEST_STEP:
        return value
    if event.sampling == "allocation":
        return gaussian_epsilon(mu * math.sqrt(times), delta)
    steps = _steps_of((event,))
    found = [renyi(parts_of(steps, order, 0.5 * LOST * delta), delta) for order in directions(event)]
    return min(value, max(found))
