"""One step of several units of one person: a mixture of Gaussians, one for each number of them in the batch.

    remove   P = sum over j of w_j N(j m)   Q = N(0)      w_j = P(Binomial(units, q) = j), m = C / sigma
    add      the two exchanged

The loss grows with the output, as in dpaudit.accounting.steps, and has no inverse in closed form: outputs are found by
Newton's method, and what is left of the difference is allowed for as an error in the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from dpaudit.accounting.events import GroupOfUnits
from dpaudit.accounting.pairs import UNIT, Floats, Masses, Normal, between, density, nodes_for

_MOST_TERMS = 64  # of the mixture; larger numbers of units are rounded up to a multiple, which can only leak more
_RARE = 1e-40  # probability of even more units in a batch, which count as all of them
_GUESSES = 20_000  # outputs between which Newton's method starts
_ROUNDS = 12


@dataclass(frozen=True)
class _GroupMasses(Masses):
    """none: the chance that no unit is in the batch, which 1 - rate would round."""

    none: float = 0.0

    def mixed(self, rate: float) -> tuple[Floats, Floats]:
        return self.none * self.base + rate * self.up, self.base


class Group(Normal):
    """Outputs of one step in units of sigma; `rate`: the chance that any of the units is in the batch."""

    def __init__(self, step: GroupOfUnits, reach: float) -> None:
        self.each = 1.0 / step.noise_multiplier
        self.numbers, self.weights = _participants(step.units, step.sample_rate)
        self.log_none = step.units * math.log1p(-step.sample_rate)
        super().__init__(step.units * self.each, -math.expm1(self.log_none), reach)
        self.inexact = 1e-12 if step.units <= _MOST_TERMS else 1e-10  # of the weights

    def loss(self, z: Floats) -> Floats:
        """ln sum w_j e^(g_j), g_j = j m (z - j m / 2)."""
        return self._loss_and_slope(np.asarray(z, dtype=np.float64))[0]

    def _loss_and_slope(self, z: Floats) -> tuple[Floats, Floats]:
        top = np.full_like(z, self.log_none)
        for number, weight in zip(self.numbers, self.weights, strict=True):
            top = np.maximum(top, math.log(weight) + self._exponent(number, z))
        small, scaled, slope = np.zeros_like(z), np.exp(self.log_none - top), np.zeros_like(z)
        for number, weight in zip(self.numbers, self.weights, strict=True):
            exponent = self._exponent(number, z)
            small += weight * np.expm1(np.minimum(exponent, 30.0))
            part = np.exp(math.log(weight) + exponent - top)
            scaled += part
            slope += number * self.each * part
        whole = top + np.log(scaled)
        # Near 0 from the small numbers that it is made of.
        near = np.log1p(np.maximum(small, -0.9))
        return np.where(np.abs(whole) < 0.5, near, whole), slope / scaled

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
        logarithms = -self.log_none - math.log(float(self.weights.min()))
        rounding = 8.0 * UNIT * (2.0 + logarithms + self.shift * (self.reach + self.shift))
        self.residual = float(left.max(initial=0.0)) + rounding
        return np.where(edges <= losses[0], -np.inf, np.where(edges >= losses[-1], np.inf, found))

    def cells(self, edges: Floats) -> Masses:
        z = np.clip(self.outputs(edges), *self.ends())
        base = between(z)
        return self._masses(base, self._any(lambda distance: between(z - distance)))

    def _masses(self, base: Floats, up: Floats) -> Masses:
        return _GroupMasses(base, up, base, math.exp(self.log_none))

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
        return z, self._masses(base, self._any(lambda distance: density(z - distance) * width))

    def outside(self) -> tuple[float, float]:
        low, high = self.ends()
        base = np.array([float(ndtr(low) + ndtr(-high))])
        up = self._any(lambda distance: np.array([float(ndtr(low - distance) + ndtr(distance - high))]))
        under_p, under_q = self._masses(base, up).mixed(self.rate)
        return float(under_p[0]), float(under_q[0])

    def steepest(self) -> float:
        return self.shift

    def delta(self, epsilon: float) -> float:
        """The larger hockey-stick divergence of both orders at eps >= 0, rounded up.

        At z where the loss is eps, e^eps = sum w_j e^(g_j), so P(z, inf) - e^eps Q(z, inf) is a sum over j >= 1.
        """
        return max(self._delta(epsilon, 1.0), self._delta(-epsilon, -1.0) * math.exp(epsilon))

    def _delta(self, loss: float, side: float) -> float:
        z = float(self.outputs(np.array([loss]))[0])
        if math.isinf(z):
            return 0.0 if side * z > 0 else math.inf
        total = size = 0.0
        for number, weight in zip(self.numbers, self.weights, strict=True):
            distance = number * self.each
            shifted = float(ndtr(side * (distance - z)))
            alone = math.exp(min(700.0, distance * (z - 0.5 * distance) + float(log_ndtr(-side * z))))
            total, size = total + weight * side * (shifted - alone), size + weight * (shifted + alone)
        rounding = 64.0 * UNIT * (1.0 + z * z + self.shift * (abs(z) + self.shift)) + self.inexact + self.residual
        return max(0.0, total) + rounding * size


def _participants(units: int, rate: float) -> tuple[list[int], Floats]:
    """How many of the units are in a batch, from 1 on, and how likely that is: (k,) weights above 0.

    Many numbers are rounded up to multiples, and what is very rare counts as all units: more in a batch leak more,
    since every threshold on the output is passed more often with them and as often without.
    """
    last = _last(units, rate)
    stride = math.ceil(last / _MOST_TERMS)
    ends = [min(number, units) for number in range(stride, last + stride, stride)]
    if units <= _MOST_TERMS:
        absent = math.log1p(-rate)
        weights = [math.comb(units, joined) * rate**joined * math.exp((units - joined) * absent) for joined in ends]
    else:
        edges = zip([0, *ends[:-1]], ends, strict=True)
        weights = [float(binom.pmf(np.arange(low + 1, high + 1), units, rate).sum()) for low, high in edges]
    if ends[-1] < units:
        ends, weights = [*ends, units], [*weights, float(binom.sf(ends[-1], units, rate))]
    # What no float holds is rounded up.
    weights = [max(weight, 1e-300) for weight in weights]
    return ends, np.array(weights)


def _last(units: int, rate: float) -> int:
    """The least number of units that more than so many are in a batch with probability below _RARE."""
    low, high = 0, units
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if binom.sf(middle, units, rate) < _RARE else (middle, high)
    return high
