"""One step of several units of one person: a mixture of Gaussians, one for each number of them in the batch.

    remove   P = sum over j of w_j N(j m)   Q = N(0)      w_j = P(Binomial(units, q) = j), m = C / sigma
    add      the two exchanged

The loss grows with the output, as in dpaudit.accounting.steps, and has no inverse in closed form: outputs are found by
Newton's method, and what is left of the difference is allowed for as an error in the loss.
"""

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy.special import ndtr
from scipy.stats import binom

from dpaudit.accounting.events import GroupOfUnits
from dpaudit.accounting.pairs import UNIT, Floats, Masses, Normal, between, density, nodes_for

_MOST_TERMS = 64  # of the mixture; larger numbers of units are rounded up to a multiple, which can only leak more
_RARE = 1e-40  # probability of even more units in a batch, which count as all of them
_GUESSES = 20_000  # outputs between which Newton's method starts
_ROUNDS = 12


class Group(Normal):
    """Outputs of one step in units of sigma; `rate`: the chance that any of the units is in the batch."""

    def __init__(self, step: GroupOfUnits, reach: float) -> None:
        self.each = 1.0 / step.noise_multiplier
        self.numbers, self.weights = _participants(step.units, step.sample_rate)
        super().__init__(step.units * self.each, -math.expm1(step.units * math.log1p(-step.sample_rate)), reach)
        self.inexact = 1e-12  # of the weights

    def loss(self, z: Floats) -> Floats:
        """ln sum w_j e^(g_j), g_j = j m (z - j m / 2)."""
        return self._loss_and_slope(np.asarray(z, dtype=np.float64))[0]

    def _loss_and_slope(self, z: Floats) -> tuple[Floats, Floats]:
        top = np.zeros_like(z)
        for number in self.numbers:
            top = np.maximum(top, self._exponent(number, z))
        near = top < 30.0
        small, scaled, slope = np.zeros_like(z), (1.0 - self.rate) * np.exp(-top), np.zeros_like(z)
        for number, weight in zip(self.numbers, self.weights, strict=True):
            exponent = self._exponent(number, z)
            small += weight * np.expm1(np.minimum(exponent, 30.0))
            part = weight * np.exp(exponent - top)
            scaled += part
            slope += number * self.each * part
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(near, np.log1p(np.maximum(small, -1.0)), top + np.log(scaled))
            return found, slope / scaled

    def _exponent(self, number: int, z: Floats) -> Floats:
        distance = number * self.each
        return np.asarray(distance * (z - 0.5 * distance), dtype=np.float64)

    @cached_property
    def _table(self) -> tuple[Floats, Floats]:
        """(outputs, losses), both ascending."""
        z = np.linspace(*self.ends(), _GUESSES)
        return z, np.maximum.accumulate(self.loss(z))

    def outputs(self, edges: Floats) -> Floats:
        z, losses = self._table
        place = np.clip(np.searchsorted(losses, edges) - 1, 0, z.size - 2)
        low, high = z[place].copy(), z[place + 1].copy()
        found = np.interp(edges, losses, z)
        inside = (edges > losses[0]) & (edges < losses[-1])
        for _ in range(_ROUNDS):
            value, slope = self._loss_and_slope(found)
            high, low = np.where(value > edges, found, high), np.where(value <= edges, found, low)
            with np.errstate(divide="ignore", invalid="ignore"):
                newton = found - (value - edges) / slope
            # Where the slope is no help the bracket is halved.
            trial = np.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
            if np.array_equal(trial, found):
                break
            found = trial
        left = np.abs(self.loss(found) - edges)[inside]
        # The loss itself is computed from exponents, and from weights, that are right to some units of roundoff.
        rounding = 8.0 * UNIT * (2.0 + self.shift * (self.reach + self.shift))
        self.residual = float(left.max(initial=0.0)) + rounding
        return np.where(edges <= losses[0], -np.inf, np.where(edges >= losses[-1], np.inf, found))

    def cells(self, edges: Floats) -> Masses:
        z = np.clip(self.outputs(edges), *self.ends())
        base = between(z)
        return Masses(base, self._any(lambda distance: between(z - distance)), base)

    def _any(self, of: Callable[[float], Floats]) -> Floats:
        """Of an output given that at least one unit is in the batch."""
        pairs = zip(self.numbers, self.weights, strict=True)
        total = sum(weight * of(number * self.each) for number, weight in pairs)
        return np.asarray(total / self.rate, dtype=np.float64)

    def nodes(self) -> tuple[Floats, Masses]:
        low, high = self.ends()
        z = np.linspace(low, high, nodes_for(high - low))
        width = float(z[1] - z[0])
        base = density(z) * width
        return z, Masses(base, self._any(lambda distance: density(z - distance) * width), base)

    def outside(self) -> tuple[float, float]:
        low, high = self.ends()
        base = np.array([float(ndtr(low) + ndtr(-high))])
        up = self._any(lambda distance: np.array([float(ndtr(low - distance) + ndtr(distance - high))]))
        under_p, under_q = Masses(base, up, base).mixed(self.rate)
        return float(under_p[0]), float(under_q[0])

    def steepest(self) -> float:
        return self.shift


def _participants(units: int, rate: float) -> tuple[list[int], Floats]:
    """How many of the units are in a batch, from 1 on, and how likely that is: (k,) weights.

    Many numbers are rounded up to multiples, and what is very rare counts as all units: more in a batch leak more,
    since every threshold on the output is passed more often with them and as often without.
    """
    last = min(units, int(binom.isf(_RARE, units, rate)) + 1)
    stride = math.ceil(last / _MOST_TERMS)
    ends = [min(number, units) for number in range(stride, last + stride, stride)]
    if stride == 1:
        weights = [
            math.comb(units, number) * rate**number * math.exp((units - number) * math.log1p(-rate)) for number in ends
        ]
    else:
        edges = zip([0, *ends[:-1]], ends, strict=True)
        weights = [float(binom.cdf(high, units, rate) - binom.cdf(low, units, rate)) for low, high in edges]
    if ends[-1] < units:
        ends, weights = [*ends, units], [*weights, float(binom.sf(ends[-1], units, rate))]
    return ends, np.array(weights)
