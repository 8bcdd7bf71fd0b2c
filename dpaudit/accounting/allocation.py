"""Random allocation: each unit is in exactly k of the t steps of an epoch, which it draws for itself alone.

Known as random allocation (Feldman and Shenfeld 2025, arXiv 2502.08202), for k = 1 also as balls and bins (Chua et al.
2024, Choquette-Choo et al. 2024). Shuffling is something else: there units of one batch make room for each other.

**The pair.** Let S be the steps that hold the unit. Without the unit, T Gaussian steps show noise; with it, step i
shows noise + v_i for i in S, |v_i| <= C, where v_i may depend on all that was shown before. Given what was shown
before, v_i is known, so the step can be made from one number x_i = 1[i in S] + N(0, sigma^2 / C^2): along v_i it is
|v_i| x_i and more noise, across it is noise. Hence all that is shown is a post-processing, the same with and without
the unit, of the T numbers x_i, whatever the law of S: adaptive steps leak no more than the pair of vectors
"1[S] + noise" and "noise".
Given the other units' draws nothing changes, since they are independent of S.

**One of t steps.** With s = C / sigma that pair has the likelihood ratio U = (1/t) sum_i e^(Y_i), where under Q
(without the unit) the Y_i are independent N(-s^2/2, s^2), and

    delta_remove(eps) = E_Q (U - e^eps)_+        delta_add(eps) = E_Q (1 - e^eps U)_+ .

Both are expectations of convex functions of U. So if U is spread out without changing its mean (a larger variable in
the convex order), both directions leak at least as much, and the result is an upper bound. Every rounding here is such
a spread:

- the ratio of one step, in a cell [e^(jh), e^((j+1)h)], moves to the two ends so that its mean there is kept;
- the sum of two ratios of the lattice e^(jh) is split between its two neighbours on the lattice, mean kept; since
  x + y = x (1 + e^(dh)) for y = x e^(dh), where it falls depends on the distance d alone;
- what lies in a tail moves to 0, and its mean to infinity: an infinite loss in either direction.

Sums of independent variables keep the order. The error is of second order in h; rounding losses up, as the reference
implementation does (PLD_accounting 2.0, Feldman and Shenfeld 2026, arXiv 2602.17284), costs h at every stage. That
implementation is the second opinion (cross_checks). All sums are of positive numbers, so rounding errors are relative
and allowed for.

**k of t steps.** Cut the steps at random into k blocks of floor(t/k) or ceil(t/k) steps and draw one of each: that is a
uniform subset of k. Given the cut, the pair is k independent pairs of one draw; the divergence is jointly convex, so
the mixture over cuts leaks no more than they do. An upper bound, exact for k = 1 and k = t.

**Epochs** are independent and compose. One that is cut short is accounted as a whole one: what it shows is part of what
the whole would show.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dpaudit.accounting.events import Direction, DpSgd
from dpaudit.accounting.schemes import moved
from dpaudit.accounting.steps import UNIT, Lattice, between

Floats = npt.NDArray[np.float64]

_STAGE_SHARE = 0.25  # of the reach's tail that all stages of the sum may cut off together
_POINTS = {True: 4000, False: 1000}  # places of the lattice for the ratio of one step: fine, and for searches


def blocks(event: DpSgd) -> tuple[tuple[int, int], ...]:
    """(steps, how many) of the epochs of one draw that stand for the epochs of k draws of t steps."""
    draws, steps, epochs = event.draws, event.epoch_steps, event.epochs
    short, longer = divmod(steps, draws)
    found = ((short, (draws - longer) * epochs), (short + 1, longer * epochs))
    return tuple((size, count) for size, count in found if count)


def pieces(event: DpSgd) -> tuple[tuple[DpSgd, int], ...]:
    """What is composed for an event with sampling "allocation": one epoch of one draw each, and how often."""
    found = []
    for size, count in blocks(event):
        if size == 1:  # in every step
            found.append((replace(event, sampling="poisson", sample_rate=1.0, steps=1, epoch=None), count))
        else:
            found.append((replace(event, sample_rate=1.0 / size, steps=size, epoch=size), count))
    return tuple(found)


@dataclass(frozen=True)
class Ratio:
    """U of one epoch on a lattice, under Q: ln U = losses (k,), ascending, with probabilities (k,).

    zero: Q(U = 0). infinite: the mean that was moved to infinity, P(loss = inf). slack: by how much losses may be
    wrong. relative: by what share probabilities may be.
    """

    losses: Floats
    probabilities: Floats
    zero: float
    infinite: float
    slack: float
    relative: float

    def direction(self, order: Direction) -> tuple[Floats, Floats, float]:
        """(losses, probabilities, P(inf)) of the loss ln(P/Q) under P, or of ln(Q/P) under Q for "add"."""
        if order == "remove":
            with np.errstate(divide="ignore"):
                return self.losses, np.exp(np.log(self.probabilities) + self.losses), self.infinite
        return -self.losses[::-1], self.probabilities[::-1], self.zero


@dataclass(frozen=True)
class _Sum:
    """A sum of ratios: values e^((first + j) h) with Q-probabilities (n,); the rest as in `Ratio`, for the sum."""

    first: int
    weights: Floats
    zero: float
    infinite: float
    terms: int


@lru_cache(maxsize=32)
def epoch_ratio(shift: float, steps: int, reach: float, points: int) -> Ratio:
    """The law of U for one draw of `steps` steps.

    shift: C / sigma. reach: standard deviations of the noise to look at. points: about as many places of the lattice
    for one step.
    """
    width = shift * (shift + 2.0 * reach)
    grid = width / points
    single = _single(shift, grid, reach)
    cut = _STAGE_SHARE * float(ndtr(-reach)) / (2 * steps.bit_length())
    total: _Sum | None = None
    power = single
    for place in range(steps.bit_length()):
        if steps >> place & 1:
            total = power if total is None else _trimmed(_added(total, power, grid), grid, cut)
        if steps >> place + 1:
            power = _trimmed(_added(power, power, grid), grid, cut)
    assert total is not None and total.terms == steps
    losses = (total.first + np.arange(total.weights.size)) * grid - math.log(steps)
    stages = 2 * steps.bit_length()
    # Probabilities of cells are differences of distribution functions; sums of n positive numbers at every stage.
    relative = UNIT * (
        steps * (reach * reach + 40.0 + 4.0 * points / reach) + stages * (2.0 * total.weights.size + 40.0)
    )
    slack = UNIT * (
        (reach + shift) ** 2 + 40.0 + 4.0 * points / reach + 16.0 * stages + 4.0 * float(np.abs(losses).max())
    )
    return Ratio(losses, total.weights, total.zero, total.infinite / steps, slack, relative)


def _single(shift: float, grid: float, reach: float) -> _Sum:
    """e^Y, Y normal with mean -shift^2/2 and deviation shift, on the lattice."""
    centre = 0.5 * shift * shift
    low, high = math.floor((-centre - shift * reach) / grid), math.ceil((centre + shift * reach) / grid)
    edges = np.arange(low, high + 1) * grid
    under_q, under_p = (edges + centre) / shift, (edges - centre) / shift
    q, p = between(under_q), between(under_p)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.expm1(np.log(p) - np.log(q) - edges[:-1]) / math.expm1(grid)
    share = np.clip(np.where(q > 0, share, 0.0), 0.0, 1.0)
    weights = np.zeros(edges.size)
    weights[:-1] += q * (1.0 - share)
    weights[1:] += q * share
    lost = float(ndtr(under_p[0]) + ndtr(-under_p[-1]) + p[q == 0].sum())
    return _Sum(low, weights, float(ndtr(under_q[0]) + ndtr(-under_q[-1])), lost, 1)


def _added(one: _Sum, two: _Sum, grid: float) -> _Sum:
    """The sum of two independent sums."""
    first = min(one.first, two.first)
    size = max(one.first + one.weights.size, two.first + two.weights.size) - first
    a, b = (_padded(item, first, size) for item in (one, two))
    far = np.arange(size)
    excess = np.log1p(np.exp(-far * grid))  # ln(1 + e^(dh)) - dh
    above = np.floor(excess / grid).astype(np.int64)
    upper = np.clip(np.expm1(excess - above * grid) / math.expm1(grid), 0.0, 1.0)
    place = (far + above).tolist()
    out = np.zeros(size + int(above[0]) + 2)
    same = one is two
    for d in range(size):
        count = size - d
        mass = a[:count] * b[d:]
        if d:
            mass = 2.0 * mass if same else mass + a[d:] * b[:count]
        start = place[d]
        out[start : start + count] += (1.0 - upper[d]) * mass
        out[start + 1 : start + 1 + count] += upper[d] * mass
    out[:size] += one.zero * b + two.zero * a
    return _Sum(first, out, one.zero * two.zero, one.infinite + two.infinite, one.terms + two.terms)


def _padded(item: _Sum, first: int, size: int) -> Floats:
    out = np.zeros(size)
    out[item.first - first : item.first - first + item.weights.size] = item.weights
    return out


def _trimmed(item: _Sum, grid: float, cut: float) -> _Sum:
    """Without both ends, of probability and of share of the mean at most `cut` each: to 0, their mean to infinity."""
    values = np.exp((item.first + np.arange(item.weights.size)) * grid)
    mean = item.weights * values
    low = int(np.searchsorted(np.cumsum(item.weights + mean / item.terms), 0.5 * cut))
    tail = np.cumsum((item.weights + mean / item.terms)[::-1])
    high = item.weights.size - int(np.searchsorted(tail, 0.5 * cut))
    ends = np.r_[0:low, high : item.weights.size]
    return _Sum(
        item.first + low,
        item.weights[low:high],
        item.zero + float(item.weights[ends].sum()),
        item.infinite + float(mean[ends].sum()),
        item.terms,
    )


def epoch_points(step: DpSgd, direction: Direction, reach: float, fine: bool) -> tuple[Floats, Floats]:
    """(losses, P-probabilities) of one epoch of one draw, for moments of the loss."""
    losses, p, _ = _ratio(step, reach, fine).direction(direction)
    return losses, p


def epoch_rounding(step: DpSgd, reach: float, fine: bool) -> tuple[float, float]:
    """(relative error of the probabilities, absolute error of the losses) of `epoch_points`, at most."""
    ratio = _ratio(step, reach, fine)
    return ratio.relative, ratio.slack


def epoch_lattice(step: DpSgd, direction: Direction, grid: float, reach: float, floor: float, fine: bool) -> Lattice:
    """One epoch of one draw on multiples of `grid`, as dpaudit.accounting.steps.lattice makes it of a step.

    A loss between two multiples moves to both so that its probabilities under P and Q are kept. Losses below `floor`
    (which is negative) are rounded up to about that.
    """
    ratio = _ratio(step, reach, fine)
    losses, p, infinite = ratio.direction(direction)
    raised = np.maximum(losses, floor)
    first = math.floor(float(raised[0]) / grid)
    place = np.floor(raised / grid).astype(np.int64)
    above = np.clip(np.expm1(place * grid - raised) / math.expm1(-grid), 0.0, 1.0)
    out = np.zeros(int(place[-1]) - first + 2)
    np.add.at(out, place - first, p * (1.0 - above))
    np.add.at(out, place - first + 1, p * above)
    slack = ratio.slack + 8.0 * UNIT * float(np.abs(raised).max())
    return Lattice(grid, first, out, infinite, slack, ratio.relative + 8.0 * UNIT)


def _ratio(step: DpSgd, reach: float, fine: bool) -> Ratio:
    # A little further, since every stage of the sum cuts off a share of its own.
    return epoch_ratio(moved(step) / step.noise_multiplier, step.steps, reach + 0.2, _POINTS[fine])
