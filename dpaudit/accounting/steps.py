"""The privacy losses of one step: exact at quadrature points, and rounded up to a lattice.

A step is a pair of distributions (P, Q) of a scalar output, and its loss is l = ln(P/Q) under P. All pairs here have a
loss that grows with the output, so the outputs with losses between two numbers form an interval, whose probabilities
under P and Q are differences of distribution functions:

    Poisson batches, noise N(0, 1), shift m (what one unit moves over the noise):
        remove   P = (1-q) N(0) + q N(m)     Q = N(0)
        add      P = N(0)                    Q = (1-q) N(0) + q N(m)
        replace  P = (1-q) N(0) + q N(m)     Q = (1-q) N(0) + q N(-m)
    Several units of one person: a mixture of as many (dpaudit.accounting.group_step).
    Laplace noise: the same with Laplace(0, 1) and shift m, whose loss stops at two atoms.
    Subsets of fixed size: "remove" with twice the shift for losses above 0, mirrored below (schemes.py).

`lattice` replaces each interval of losses by its two ends so that both of its probabilities are kept ("connect the
dots", Doroshenko et al. 2022, arXiv 2207.04380): the result leaks at least as much as the step. Outputs beyond the
reach count as infinite losses, at either end.

Rounding. Every cell's probabilities are differences between the same two computed outputs, so an error in an output is
an error in the loss there. `Lattice.slack` bounds by how much computed losses of one step may be too small, and
`Lattice.relative` the relative error of its probabilities; `dpaudit.accounting.composition` allows for both. The
constants are multiples of the unit roundoff, several times what the operations that they cover can add up to.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from dpaudit.accounting.events import Direction, DpSgd, GroupOfUnits
from dpaudit.accounting.group_step import Group
from dpaudit.accounting.pairs import UNIT, Floats, Laplace, Masses, Normal, Pair, TwoSided
from dpaudit.accounting.schemes import moved


@dataclass(frozen=True)
class Lattice:
    """Losses (first + k) * grid with P-probabilities (k,), and P(loss = inf).

    slack: by how much losses may be too small; relative: by what share probabilities may be.
    """

    grid: float
    first: int
    probabilities: Floats
    infinite: float
    slack: float
    relative: float

    @property
    def losses(self) -> Floats:
        """(k,), ascending."""
        return np.asarray((self.first + np.arange(self.probabilities.size)) * self.grid, dtype=np.float64)


def directions(step: DpSgd) -> tuple[Direction, ...]:
    """The orders of the pair that have to be looked at; one where both are the same."""
    symmetric = step.relation == "replace" or step.sampling == "fixed" or step.sample_rate == 1
    return ("remove",) if symmetric else ("remove", "add")


def largest_loss(step: DpSgd, direction: Direction) -> float:
    """The supremum of one step's losses: the eps of a step that is purely private; rounded up."""
    if step.noise == "laplace":
        shift, rate = moved(step) / step.noise_multiplier, step.sample_rate
        inside = math.log1p(rate * math.expm1(min(shift, 700.0)))
        without = -math.log1p(rate * math.expm1(-shift)) if direction == "add" and rate < 1 else inside
        return (shift if rate == 1 or shift > 700 else without) * (1.0 + 1e-12)
    mixed = step.sampling == "poisson" and step.relation != "replace"
    if direction == "add" and step.sample_rate < 1 and mixed:
        units = step.units if isinstance(step, GroupOfUnits) else 1
        return -units * math.log1p(-step.sample_rate) * (1.0 + 1e-12)
    return math.inf


@lru_cache(maxsize=64)
def points(step: DpSgd, direction: Direction, reach: float) -> tuple[Floats, Floats]:
    """(losses, P-probabilities) of one step at quadrature points: moments of the loss without any lattice."""
    pair = _pair(step, reach)
    outputs, masses = pair.nodes()
    losses = pair.loss(outputs)
    under_p, under_q = masses.mixed(pair.rate)
    if step.sampling == "fixed":
        return _mirrored_points(losses, under_p)
    return (losses, under_p) if direction == "remove" or _both_shift(step) else (-losses, under_q)


def _both_shift(step: DpSgd) -> bool:
    return step.relation == "replace" and step.sample_rate < 1 and step.sampling != "fixed"


def _mirrored_points(losses: Floats, p: Floats) -> tuple[Floats, Floats]:
    above = losses > 0
    mirrored = p[above] * np.exp(-losses[above])
    rest = max(0.0, 1.0 - float(p[above].sum() + mirrored.sum()))
    return np.r_[losses[above], -losses[above], 0.0], np.r_[p[above], mirrored, rest]


def reach_for(lost: float) -> float:
    """How many standard deviations of the noise to look at so that what lies beyond has at most probability `lost`."""
    return float(-ndtri(max(lost, 1e-300))) + 0.1


@lru_cache(maxsize=16)
def lattice(step: DpSgd, direction: Direction, grid: float, reach: float, floor: float = -math.inf) -> Lattice:
    """One step on multiples of `grid`; leaks at least as much as the step but for `slack` and `relative`.

    Losses below `floor` (which is negative) are rounded up to about that: they cost places and hardly matter.
    """
    pair = _pair(step, reach)
    turned = direction == "add" and not _both_shift(step) and step.sampling != "fixed"
    low, high = pair.range()
    low, high = (low, min(high, -floor)) if turned else (max(low, floor), high)
    edges = np.arange(math.floor(low / grid) - 1, math.ceil(high / grid) + 2, dtype=np.float64) * grid
    first = round(float(edges[0]) / grid)
    cells = pair.cells(edges)
    relative = UNIT * (reach * reach + 40.0) + pair.inexact
    slack = _slack(pair, edges, cells)
    outside = pair.outside()
    under_p, under_q = cells.mixed(pair.rate)
    excess = pair.rate * (cells.up - cells.down)
    if step.sampling == "fixed":
        return _mirrored(grid, first, edges, _split(edges, under_q, excess), outside[0], slack, relative)
    if turned:
        first, lost = -(first + edges.size - 1), outside[1]
        p = _split(-edges[::-1], under_p[::-1], -excess[::-1])
    else:
        lost = outside[0]
        p = _split(edges, under_q, excess)
    if floor > -math.inf:
        p[0] += max(0.0, 1.0 - lost - float(p.sum())) + 8.0 * UNIT
    return Lattice(grid, first, p, lost, slack, relative)


def _split(edges: Floats, under_q: Floats, excess: Floats) -> Floats:
    """P-probabilities at the edges, (k + 1,), from cells (k,): Q-probabilities, and P's minus Q's.

    A cell with p and q at ends a < b becomes alpha at a and beta at b: alpha + beta = p, alpha e^-a + beta e^-b = q.
    """
    under_p = under_q + excess
    low, width = edges[:-1], edges[1] - edges[0]
    with np.errstate(over="ignore", invalid="ignore"):
        # p - q e^a, near a = 0 from the small numbers that it is made of.
        near, far = excess - under_q * np.expm1(low), under_p - under_q * np.exp(low)
        beta = np.where(np.abs(low) < 0.5, near, far) / -math.expm1(-width)
    beta = np.where(low > 700.0, under_p, np.nan_to_num(beta, nan=0.0, posinf=np.inf))
    beta = np.clip(beta, 0.0, under_p)
    p = np.zeros(edges.size)
    p[:-1] += under_p - beta
    p[1:] += beta
    return p


def _mirrored(
    grid: float, first: int, edges: Floats, split: Floats, lost: float, slack: float, relative: float
) -> Lattice:
    """Losses above 0 of a pair, their mirror image below with e^-l times the probability, and the rest at 0."""
    positive = edges > 0.5 * grid
    above, losses = split[positive], edges[positive]
    below = (above * np.exp(-losses))[::-1]
    rest = max(0.0, 1.0 - lost - float(above.sum() + below.sum()))
    # From edge 1 on, edge 0 being the loss 0.
    return Lattice(grid, -above.size, np.r_[below, rest, above], lost, slack, relative)


def _slack(pair: Pair, edges: Floats, cells: Masses) -> float:
    """By how much a computed loss may be too small: wrong outputs, wrong cell differences, rounded edges."""
    least = np.minimum(*cells.mixed(pair.rate))
    size = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mixed = np.where(least > 1e-290, pair.rate * (cells.up + cells.down) / least, 0.0)
    weight = np.where(size < 0.5, np.minimum(mixed, 4.0) + 2.0 * size, 4.0)
    return pair.residual + UNIT * (
        16.0 * float(np.max(weight)) + 8.0 * pair.steepest() * (pair.reach + 2.0) + 4.0 * float(np.max(size))
    )


def _pair(step: DpSgd, reach: float) -> Pair:
    if isinstance(step, GroupOfUnits):
        return Group(step, reach)
    shift = moved(step) / step.noise_multiplier
    if step.noise == "laplace":
        return Laplace(shift, step.sample_rate, reach)
    if _both_shift(step):
        return TwoSided(0.5 * shift, step.sample_rate, reach)  # C to either side
    return Normal(shift, step.sample_rate, reach)
