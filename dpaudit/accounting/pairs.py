"""Pairs of distributions of one step's output: their losses, the probabilities of intervals, quadrature points.

`dpaudit.accounting.steps` says which pair a step has and what becomes of it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]

UNIT = 2.0**-53  # of double precision
_NODES = 3000  # of the quadrature: the trapezoidal rule converges geometrically for a normal density


@dataclass(frozen=True)
class Masses:
    """Probabilities of some sets of outputs under the noise alone, and shifted up and down (alone: not at all)."""

    base: Floats
    up: Floats
    down: Floats

    def mixed(self, rate: float) -> tuple[Floats, Floats]:
        """(P, Q)."""
        return (1.0 - rate) * self.base + rate * self.up, (1.0 - rate) * self.base + rate * self.down


class Pair(ABC):
    """Outputs of one step: base noise, and the noise shifted by `shift`; `rate` mixes them."""

    residual = 0.0  # by how much outputs may miss the losses that they were asked for
    inexact = 0.0  # relative error of the probabilities beyond that of their computation

    def __init__(self, shift: float, rate: float, reach: float) -> None:
        self.shift, self.rate, self.reach = shift, rate, reach

    def range(self) -> tuple[float, float]:
        """Smallest and largest loss within the reach."""
        low, high = self.loss(np.array(self.ends()))
        return float(low), float(high)

    def ends(self) -> tuple[float, float]:
        return -self.reach, self.reach + self.shift

    @abstractmethod
    def loss(self, z: Floats) -> Floats:
        """Of outputs (k,), ascending with them."""

    @abstractmethod
    def cells(self, edges: Floats) -> Masses:
        """Probabilities of the cells between edges (k + 1,) of the loss, (k,) each."""

    @abstractmethod
    def nodes(self) -> tuple[Floats, Masses]:
        """Quadrature points in the output, and their weights."""

    @abstractmethod
    def outside(self) -> tuple[float, float]:
        """Probability that the reach leaves out, under P and under Q."""

    def steepest(self) -> float:
        """A bound on d loss / d output within the reach."""
        return self.shift


class Normal(Pair):
    """(1-q) N(0) + q N(m) against N(0)."""

    def loss(self, z: Floats) -> Floats:
        return mixture_loss(self.shift * (z - 0.5 * self.shift), self.rate)

    def outputs(self, edges: Floats) -> Floats:
        return unmixed(edges, self.rate) / self.shift + 0.5 * self.shift

    def down(self) -> float:
        """Where the shifted part of Q lies."""
        return 0.0

    def cells(self, edges: Floats) -> Masses:
        z = np.clip(self.outputs(edges), *self.ends())
        base = between(z)
        return Masses(base, between(z - self.shift), between(z - self.down()) if self.down() else base)

    def nodes(self) -> tuple[Floats, Masses]:
        low, high = self.ends()
        z = np.linspace(low, high, nodes_for(high - low))
        width = float(z[1] - z[0])
        return z, Masses(*(density(z - centre) * width for centre in (0.0, self.shift, self.down())))

    def outside(self) -> tuple[float, float]:
        low, high = self.ends()
        parts = [np.array([float(ndtr(low - c) + ndtr(c - high))]) for c in (0.0, self.shift, self.down())]
        under_p, under_q = Masses(*parts).mixed(self.rate)
        return float(under_p[0]), float(under_q[0])

    def steepest(self) -> float:
        top = self.shift * (self.reach + 0.5 * self.shift)
        if top > 700 or self.rate == 1:
            return self.shift
        odds = self.rate * math.exp(top)
        return self.shift * odds / (1.0 - self.rate + odds)


class TwoSided(Normal):
    """(1-q) N(0) + q N(m) against (1-q) N(0) + q N(-m), q < 1."""

    def ends(self) -> tuple[float, float]:
        return -self.reach - self.shift, self.reach + self.shift

    def loss(self, z: Floats) -> Floats:
        half = 0.5 * self.shift
        return mixture_loss(self.shift * (z - half), self.rate) - mixture_loss(self.shift * (-z - half), self.rate)

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


class Laplace(Pair):
    """(1-q) Lap(0) + q Lap(m) against Lap(0), unit scale; the loss is constant below 0 and above m."""

    def ends(self) -> tuple[float, float]:
        return 0.0, self.shift

    def loss(self, z: Floats) -> Floats:
        return mixture_loss(2.0 * z - self.shift, self.rate)

    def cells(self, edges: Floats) -> Masses:
        z = np.clip(0.5 * (unmixed(edges, self.rate) + self.shift), 0.0, self.shift)
        step = -np.expm1(-np.diff(z))
        base, shifted = 0.5 * np.exp(-z[:-1]) * step, 0.5 * np.exp(z[1:] - self.shift) * step
        far = 0.5 * math.exp(-self.shift)
        low, high = self.range()
        # The atoms, in the cells that hold them; a cell with both ends at an atom would lose nothing either.
        for loss, masses in ((low, (0.5, far)), (high, (far, 0.5))):
            cell = min(int(np.searchsorted(edges, loss, side="right")) - 1, base.size - 1)
            base[cell] += masses[0]
            shifted[cell] += masses[1]
        return Masses(base, shifted, base)

    def nodes(self) -> tuple[Floats, Masses]:
        edges = np.linspace(0.0, self.shift, _NODES + 1)
        z = 0.5 * (edges[1:] + edges[:-1])
        step, far = -np.expm1(-np.diff(edges)), 0.5 * math.exp(-self.shift)
        base = np.r_[0.5, 0.5 * np.exp(-edges[:-1]) * step, far]
        shifted = np.r_[far, 0.5 * np.exp(edges[1:] - self.shift) * step, 0.5]
        return np.r_[0.0, z, self.shift], Masses(base, shifted, base)

    def outside(self) -> tuple[float, float]:
        return 0.0, 0.0

    def steepest(self) -> float:
        return 2.0


def mixture_loss(g: Floats, rate: float) -> Floats:
    """ln(1 - q + q e^g)."""
    if rate == 1:
        return np.asarray(g, dtype=np.float64)
    near = np.log1p(rate * np.expm1(np.clip(g, -1.0, 30.0)))
    return np.where((g > -1.0) & (g < 30.0), near, np.logaddexp(math.log1p(-rate), math.log(rate) + g))


def unmixed(losses: Floats, rate: float) -> Floats:
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


def density(z: Floats) -> Floats:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def nodes_for(width: float) -> int:
    """At most 0.02 between the points of a normal density; more only costs time."""
    return max(_NODES, min(200_000, math.ceil(width / 0.02)))
