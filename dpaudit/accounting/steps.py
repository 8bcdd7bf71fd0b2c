"""The privacy losses of one step: exact at quadrature points, and rounded up to a lattice.

A step is a pair of distributions (P, Q) of a scalar output, and its loss is l = ln(P/Q) under P. All pairs here have a
loss that grows with the output, so the outputs with losses between two numbers form an interval, whose probabilities
under P and Q are differences of distribution functions:

    Poisson batches, noise N(0, 1), shift m (what one unit moves over the noise):
        remove   P = (1-q) N(0) + q N(m)     Q = N(0)
        add      P = N(0)                    Q = (1-q) N(0) + q N(m)
        replace  P = (1-q) N(0) + q N(m)     Q = (1-q) N(0) + q N(-m)
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
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from dpaudit.accounting.events import Direction, DpSgd
from dpaudit.accounting.schemes import moved

Floats = npt.NDArray[np.float64]

UNIT = 2.0**-53  # of double precision
_NODES = 3000  # of the quadrature: the trapezoidal rule converges geometrically for a normal density


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
        return -math.log1p(-step.sample_rate) * (1.0 + 1e-12)
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
    relative = UNIT * (reach * reach + 40.0)
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


def _slack(pair: "_Pair", edges: Floats, cells: "_Masses") -> float:
    """By how much a computed loss may be too small: wrong outputs, wrong cell differences, rounded edges."""
    least = np.minimum(*cells.mixed(pair.rate))
    size = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mixed = np.where(least > 1e-290, pair.rate * (cells.up + cells.down) / least, 0.0)
    weight = np.where(size < 0.5, np.minimum(mixed, 4.0) + 2.0 * size, 4.0)
    return UNIT * (
        16.0 * float(np.max(weight)) + 8.0 * pair.steepest() * (pair.reach + 2.0) + 4.0 * float(np.max(size))
    )


@dataclass(frozen=True)
class _Masses:
    """Probabilities of some sets of outputs under the noise alone, and shifted up and down (alone: not at all)."""

    base: Floats
    up: Floats
    down: Floats

    def mixed(self, rate: float) -> tuple[Floats, Floats]:
        """(P, Q)."""
        return (1.0 - rate) * self.base + rate * self.up, (1.0 - rate) * self.base + rate * self.down


class _Pair:
    """Outputs of one step: base noise, and the noise shifted by `shift`; `rate` mixes them."""

    def __init__(self, shift: float, rate: float, reach: float) -> None:
        self.shift, self.rate, self.reach = shift, rate, reach

    def range(self) -> tuple[float, float]:
        """Smallest and largest loss within the reach."""
        low, high = self.loss(np.array(self.ends()))
        return float(low), float(high)

    def ends(self) -> tuple[float, float]:
        return -self.reach, self.reach + self.shift

    def loss(self, z: Floats) -> Floats:
        raise NotImplementedError

    def cells(self, edges: Floats) -> _Masses:
        """Probabilities of the cells between edges (k + 1,) of the loss, (k,) each."""
        raise NotImplementedError

    def nodes(self) -> tuple[Floats, _Masses]:
        """Quadrature points in the output, and their weights."""
        raise NotImplementedError

    def outside(self) -> tuple[float, float]:
        """Probability that the reach leaves out, under P and under Q."""
        raise NotImplementedError

    def steepest(self) -> float:
        """A bound on d loss / d output within the reach."""
        return self.shift


class _Normal(_Pair):
    """(1-q) N(0) + q N(m) against N(0)."""

    def loss(self, z: Floats) -> Floats:
        return _mixture_loss(self.shift * (z - 0.5 * self.shift), self.rate)

    def outputs(self, edges: Floats) -> Floats:
        return _unmixed(edges, self.rate) / self.shift + 0.5 * self.shift

    def down(self) -> float:
        """Where the shifted part of Q lies."""
        return 0.0

    def cells(self, edges: Floats) -> _Masses:
        z = np.clip(self.outputs(edges), *self.ends())
        base = between(z)
        return _Masses(base, between(z - self.shift), between(z - self.down()) if self.down() else base)

    def nodes(self) -> tuple[Floats, _Masses]:
        low, high = self.ends()
        z = np.linspace(low, high, _nodes(high - low))
        width = float(z[1] - z[0])
        return z, _Masses(*(_density(z - centre) * width for centre in (0.0, self.shift, self.down())))

    def outside(self) -> tuple[float, float]:
        low, high = self.ends()
        parts = [np.array([float(ndtr(low - c) + ndtr(c - high))]) for c in (0.0, self.shift, self.down())]
        under_p, under_q = _Masses(*parts).mixed(self.rate)
        return float(under_p[0]), float(under_q[0])

    def steepest(self) -> float:
        top = self.shift * (self.reach + 0.5 * self.shift)
        if top > 700 or self.rate == 1:
            return self.shift
        odds = self.rate * math.exp(top)
        return self.shift * odds / (1.0 - self.rate + odds)


class _TwoSided(_Normal):
    """(1-q) N(0) + q N(m) against (1-q) N(0) + q N(-m), q < 1."""

    def ends(self) -> tuple[float, float]:
        return -self.reach - self.shift, self.reach + self.shift

    def loss(self, z: Floats) -> Floats:
        half = 0.5 * self.shift
        return _mixture_loss(self.shift * (z - half), self.rate) - _mixture_loss(self.shift * (-z - half), self.rate)

    def outputs(self, edges: Floats) -> Floats:
        # y = e^(m z) solves a y^2 + (1-q)(1 - e^l) y - a e^l = 0 with a = q e^(-m^2/2).
        size = np.abs(edges)
        with np.errstate(divide="ignore"):
            log_sinh = np.log(-np.expm1(-size)) + 0.5 * size - math.log(2.0)
        ratio = log_sinh + math.log1p(-self.rate) - math.log(self.rate) + 0.5 * self.shift**2
        turned = np.where(ratio > 20, ratio + math.log(2.0), np.arcsinh(np.exp(np.minimum(ratio, 20.0))))
        return np.sign(edges) * (0.5 * size + turned) / self.shift

    def down(self) -> float:
        return -self.shift

    def steepest(self) -> float:
        return 2.0 * super().steepest()


class _Laplace(_Pair):
    """(1-q) Lap(0) + q Lap(m) against Lap(0), unit scale; the loss is constant below 0 and above m."""

    def ends(self) -> tuple[float, float]:
        return 0.0, self.shift

    def loss(self, z: Floats) -> Floats:
        return _mixture_loss(2.0 * z - self.shift, self.rate)

    def cells(self, edges: Floats) -> _Masses:
        z = np.clip(0.5 * (_unmixed(edges, self.rate) + self.shift), 0.0, self.shift)
        step = -np.expm1(-np.diff(z))
        base, shifted = 0.5 * np.exp(-z[:-1]) * step, 0.5 * np.exp(z[1:] - self.shift) * step
        far = 0.5 * math.exp(-self.shift)
        low, high = self.range()
        # The atoms, in the cells that hold them; a cell with both ends at an atom would lose nothing either.
        for loss, masses in ((low, (0.5, far)), (high, (far, 0.5))):
            cell = min(int(np.searchsorted(edges, loss, side="right")) - 1, base.size - 1)
            base[cell] += masses[0]
            shifted[cell] += masses[1]
        return _Masses(base, shifted, base)

    def nodes(self) -> tuple[Floats, _Masses]:
        edges = np.linspace(0.0, self.shift, _NODES + 1)
        z = 0.5 * (edges[1:] + edges[:-1])
        step, far = -np.expm1(-np.diff(edges)), 0.5 * math.exp(-self.shift)
        base = np.r_[0.5, 0.5 * np.exp(-edges[:-1]) * step, far]
        shifted = np.r_[far, 0.5 * np.exp(edges[1:] - self.shift) * step, 0.5]
        return np.r_[0.0, z, self.shift], _Masses(base, shifted, base)

    def outside(self) -> tuple[float, float]:
        return 0.0, 0.0

    def steepest(self) -> float:
        return 2.0


def _pair(step: DpSgd, reach: float) -> _Pair:
    shift = moved(step) / step.noise_multiplier
    if step.noise == "laplace":
        return _Laplace(shift, step.sample_rate, reach)
    if _both_shift(step):
        return _TwoSided(0.5 * shift, step.sample_rate, reach)  # C to either side
    return _Normal(shift, step.sample_rate, reach)


def _mixture_loss(g: Floats, rate: float) -> Floats:
    """ln(1 - q + q e^g)."""
    if rate == 1:
        return np.asarray(g, dtype=np.float64)
    near = np.log1p(rate * np.expm1(np.clip(g, -1.0, 30.0)))
    return np.where((g > -1.0) & (g < 30.0), near, np.logaddexp(math.log1p(-rate), math.log(rate) + g))


def _unmixed(losses: Floats, rate: float) -> Floats:
    """g with ln(1 - q + q e^g) = loss; -inf where there is none."""
    if rate == 1:
        return losses
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        middle = np.log1p(np.expm1(np.clip(losses, -1.0, 2.0)) / rate)
        low = np.log((np.exp(np.minimum(losses, 0.0)) - (1.0 - rate)) / rate)
        high = losses - math.log(rate) + np.log1p(-(1.0 - rate) * np.exp(-np.maximum(losses, 0.0)))
    found = np.where(losses > 1.0, high, np.where(losses < -0.5, low, middle))
    return np.where(np.isnan(found), -np.inf, found)


def between(z: Floats) -> Floats:
    """Normal probability between consecutive points, from the tail where it keeps its digits."""
    upper, lower = ndtr(-z), ndtr(z)
    return np.maximum(np.where(z[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1]), 0.0)


def _density(z: Floats) -> Floats:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _nodes(width: float) -> int:
    """At most 0.02 between the points of a normal density; more only costs time."""
    return max(_NODES, min(200_000, math.ceil(width / 0.02)))
