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
from scipy.special import ndtr, ndtri

from dpaudit.accounting.events import Direction, DpSgd
from dpaudit.accounting.pairs import UNIT, between
from dpaudit.accounting.schemes import moved
from dpaudit.accounting.steps import Lattice

Floats = npt.NDArray[np.float64]

_POINTS = {True: 2500, False: 700}  # places of the lattice for the ratio of one step: fine, and for searches


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
    """A sum of `terms` ratios: values terms * e^((first + j) h) with Q-probabilities (n,).

    zero: Q(sum = 0); infinite: the mean that was moved to infinity, both of the sum.
    """

    first: int
    weights: Floats
    zero: float
    infinite: float
    terms: int

    def means(self, grid: float) -> Floats:
        """(n,) what each place adds to the mean."""
        return np.asarray(self.terms * self.weights * np.exp((self.first + np.arange(self.weights.size)) * grid))

    def refined(self) -> "_Sum":
        """The same on a lattice of half the grid."""
        finer = np.zeros(2 * self.weights.size - 1)
        finer[::2] = self.weights
        return replace(self, first=2 * self.first, weights=finer)


@lru_cache(maxsize=32)
def epoch_ratio(shift: float, steps: int, reach: float, points: int) -> Ratio:
    """The law of U for one draw of `steps` steps, by repeated doubling.

    shift: C / sigma. reach: standard deviations of the noise to look at. points: about as many places of the lattice.
    The mean of many ratios lies closer to 1 than one of them, so the lattice gets finer as they are added.
    """
    budget = float(ndtr(-reach)) / 4.0
    single = -float(ndtri(budget / steps))  # what lies beyond is cut off once for each step
    grid = shift * (shift + 2.0 * single) / points
    power, total = _single(shift, grid, single), None
    stages, largest = 2 * steps.bit_length(), power.weights.size
    while steps:
        steps, odd = divmod(steps, 2)
        if odd:
            total = power if total is None else _trimmed(_added(total, power, grid), grid, budget, stages)
        if steps:
            power = _trimmed(_added(power, power, grid), grid, budget * 0.5 ** (steps.bit_length() - 1), stages)
        largest = max(largest, power.weights.size, total.weights.size if total else 0)
        while max(power.weights.size, total.weights.size if total else 0) < points / 2:
            power, total, grid = power.refined(), total.refined() if total else None, grid / 2
    assert total is not None
    losses = np.asarray((total.first + np.arange(total.weights.size)) * grid, dtype=np.float64)
    # Probabilities of cells are differences of distribution functions; sums of n positive numbers at every stage.
    cells = single * single + 40.0 + 4.0 * points / single
    relative = UNIT * (total.terms * cells + stages * (2.0 * largest + 40.0))
    slack = UNIT * (cells + (single + shift) ** 2 + 16.0 * stages + 4.0 * float(np.abs(losses).max()))
    return Ratio(losses, total.weights, total.zero, total.infinite / total.terms, slack, relative)


def _single(shift: float, grid: float, reach: float) -> _Sum:
    """e^Y, Y normal with mean -shift^2/2 and deviation shift, on the lattice."""
    centre = 0.5 * shift * shift
    low, high = math.floor((-centre - shift * reach) / grid), math.ceil((centre + shift * reach) / grid)
    edges = np.asarray(np.arange(low, high + 1) * grid, dtype=np.float64)
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
    """The sum of two independent sums. Where one of them is 0 it is 0, and the other's mean goes to infinity."""
    terms = one.terms + two.terms
    first = min(one.first, two.first) - 1
    last = max(one.first + one.weights.size, two.first + two.weights.size) + 1
    out = np.zeros(last - first)
    same = one is two
    gaps = np.arange(0 if same else 1 - one.weights.size, two.weights.size)  # of the places in the two arrays
    log_share, log_rest = math.log(two.terms / terms), math.log(one.terms / terms)
    # a e^(ih) + b e^(jh) = (a + b) e^(ih) e^(risen h), which depends on j - i alone.
    risen = np.logaddexp(log_rest, log_share + (gaps + two.first - one.first) * grid) / grid
    below = np.floor(risen)
    upper = np.clip(np.expm1((risen - below) * grid) / math.expm1(grid), 0.0, 1.0)
    for gap, start, share in zip(gaps.tolist(), (below + one.first - first).astype(int).tolist(), upper, strict=True):
        low, high = max(0, -gap), min(one.weights.size, two.weights.size - gap)
        mass = one.weights[low:high] * two.weights[low + gap : high + gap]
        if same and gap:
            mass *= 2.0
        out[start + low : start + high] += (1.0 - share) * mass
        out[start + low + 1 : start + high + 1] += share * mass
    lost = one.zero * float(two.means(grid).sum()) + two.zero * float(one.means(grid).sum())
    zero = one.zero + two.zero - one.zero * two.zero
    return _Sum(first, out, zero, one.infinite + two.infinite + lost, terms)


def _trimmed(item: _Sum, grid: float, cut: float, stages: int) -> _Sum:
    """Without both ends, of probability and share of the mean at most cut / stages: to 0, their mean to infinity."""
    mean = item.means(grid)
    both, least = item.weights + mean / item.terms, 0.5 * cut / stages
    low = int(np.searchsorted(np.cumsum(both), least))
    high = both.size - int(np.searchsorted(np.cumsum(both[::-1]), least))
    ends = np.r_[0:low, high : both.size]
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
    return epoch_ratio(moved(step) / step.noise_multiplier, step.steps, reach, _POINTS[fine])
