"""Moments of the sum of privacy losses, from the steps themselves, and what follows from them without any lattice.

Bounds on its tails and on eps (Markov's inequality for e^(theta L): Chernoff, Rényi DP), and the choices that the
convolution needs: how to tilt, which window of losses to look at, and how fine a grid. Only the bounds have to hold;
the choices decide how tight the result is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from dpaudit.accounting.allocation import epoch_lattice, epoch_points, epoch_rounding
from dpaudit.accounting.events import Direction, DpSgd
from dpaudit.accounting.pairs import UNIT
from dpaudit.accounting.steps import Lattice, lattice, points, reach_for

Floats = npt.NDArray[np.float64]

LOST = 1e-5  # of delta that truncation may cost
_WRAPPED = 1e-8  # tilted probability that may lie outside the window
_ROUNDED = 1e-14  # of the tilted sum that very negative losses may add when they are rounded up
# How much smaller than the largest the tilted probabilities at eps may be, in e-folds: so much that the allowance for
# rounding, about 3e-12 T of the largest, stays below a thousandth of them.
_OFF_CENTRE, _ROUNDING = 10.0, 3e-9


@dataclass(frozen=True)
class Part:
    """`times` equal steps (or whole epochs of allocation) in one direction.

    reach: standard deviations of the noise to look at. fine: for the number, not for a search (allocation).
    """

    step: DpSgd
    times: int
    direction: Direction
    reach: float
    fine: bool = True

    def points(self) -> tuple[Floats, Floats]:
        if self.step.sampling == "allocation":
            return epoch_points(self.step, self.direction, self.reach, self.fine)
        return points(self.step, self.direction, self.reach)

    def floor(self, theta: float) -> float:
        """A loss below which one step's losses change nothing: T P(l < floor) e^(theta floor) is negligible."""
        losses, p = self.points()
        order = np.argsort(losses)
        with np.errstate(under="ignore"):
            weight = self.times * np.cumsum(p[order]) * np.exp(np.minimum(theta * losses[order], 0.0))
        beyond = np.nonzero((weight > _ROUNDED) | (losses[order] >= 0))[0]
        return float(losses[order][beyond[0] - 1]) if beyond.size and beyond[0] > 0 else -math.inf

    def width(self, theta: float) -> float:
        """The range of one step's losses, from the floor on."""
        losses, _ = self.points()
        return float(losses.max()) - max(float(losses.min()), self.floor(theta))

    def rounding(self, theta: float) -> float:
        """How much ln E e^(theta L) may be too small because probabilities and losses of the points are rounded."""
        if self.step.sampling != "allocation":
            return 0.0  # the caller's: UNIT for each point
        relative, slack = epoch_rounding(self.step, self.reach, self.fine)
        return self.times * (relative + theta * slack)

    def lattice(self, grid: float, theta: float) -> Lattice:
        if self.step.sampling == "allocation":
            return epoch_lattice(self.step, self.direction, grid, self.reach, self.floor(theta), self.fine)
        return lattice(self.step, self.direction, grid, self.reach, self.floor(theta))


Parts = tuple[Part, ...]


def parts_of(steps: tuple[tuple[DpSgd, int], ...], direction: Direction, lost: float, *, fine: bool = True) -> Parts:
    """Steps and how often, in one direction; what lies beyond the reach has at most probability `lost` in all."""
    total = sum(times for _, times in steps)
    return tuple(Part(step, times, direction, reach_for(lost / total), fine) for step, times in steps)


@dataclass(frozen=True)
class Moments:
    """Of the tilted sum of losses: ln E e^(theta L), mean, variance, and what a lattice does to it.

    `bulk`: sum of T E|l|, `steps`: T; rounding l to multiples of h adds min(T h^2 / 6, h bulk) to the variance.
    """

    log_moment: float
    mean: float
    variance: float
    bulk: float
    steps: int


@lru_cache(maxsize=4096)
def moments(parts: Parts, theta: float) -> Moments:
    """Of the steps themselves, not of a lattice, by quadrature."""
    log_moment = mean = variance = bulk = 0.0
    for part in parts:
        losses, p = part.points()
        exponents = theta * losses
        top = max(0.0, float(exponents.max()) - 600.0)
        if top:  # what is likely may be far below what is large, and the other way round: in logarithms
            with np.errstate(divide="ignore"):
                logs = np.log(p) + exponents
            top = float(logs.max())
            weights = np.exp(logs - top)
        else:
            weights = p * np.exp(exponents)
        total = float(weights.sum())
        # Near 1, through the difference from 1: T multiplies the rounding of what is left.
        growth = float(p @ np.expm1(exponents)) + float(p.sum() - 1.0) if top == 0 and abs(total - 1) < 0.5 else None
        log_moment += part.times * (math.log1p(growth) if growth is not None else math.log(total) + top)
        weights /= total
        centre = float(weights @ losses)
        mean += part.times * centre
        variance += part.times * float(weights @ (losses - centre) ** 2)
        bulk += part.times * float(weights @ np.abs(losses))
    return Moments(log_moment, mean, variance, bulk, sum(part.times for part in parts))


def chernoff(parts: Parts, log_probability: float) -> tuple[float, float]:
    """(l, theta): P(sum of losses >= l) <= e^log_probability by Markov's inequality for e^(theta L), least l found."""

    def reached(theta: float) -> float:
        return (moments(parts, theta).log_moment - log_probability) / theta

    theta = _least(parts, reached)
    return reached(theta), theta


def renyi(parts: Parts, delta: float) -> float:
    """eps by Rényi DP: delta <= E e^(theta (L - eps)) theta^theta / (1 + theta)^(1 + theta).

    The factor is the largest value of e^(-theta x) (1 - e^-x) (Canonne, Kamath and Steinke 2020, proposition 12).
    """
    total = sum(part.times for part in parts)

    def reached(theta: float) -> float:
        found = moments(parts, theta)
        rounding = total * UNIT * (32.0 + 8.0 * theta * found.bulk / total) + 8.0 * UNIT * abs(found.log_moment)
        rounding += sum(part.rounding(theta) for part in parts)
        factor = theta * math.log(theta) - (1.0 + theta) * math.log1p(theta)
        return (found.log_moment + rounding - math.log(delta * (1.0 - LOST)) + factor) / theta

    return max(0.0, reached(_least(parts, reached)))


def saddle(parts: Parts, log_delta: float) -> tuple[float, float]:
    """(eps, theta) about where delta(eps) = e^log_delta: the tilt that centres the integrand there.

    delta = 1/(2 pi) int exp(K(s) - s eps) / (s (s + 1)) over a vertical line; its saddle on the real axis is at
    eps = K'(theta) - 1/theta - 1/(theta + 1) (Alghamdi et al. 2023). An estimate, used to choose a tilt and a grid.
    """

    def at(log_theta: float) -> tuple[float, float]:
        theta = math.exp(log_theta)
        found = moments(parts, theta)
        eps = found.mean - 1.0 / theta - 1.0 / (1.0 + theta)
        spread = found.variance + theta**-2 + (1.0 + theta) ** -2
        log_value = found.log_moment - theta * eps - math.log(theta) - math.log1p(theta) - 0.5 * math.log(2 * math.pi)
        return eps, log_value - 0.5 * math.log(spread)

    scale = -0.5 * math.log(max(moments(parts, 0.0).variance, 1e-24))
    low, high = scale - 9.0, scale + 9.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle)[1] > log_delta else (low, middle)
    return at(high)[0], math.exp(high)


def tilted_range(parts: Parts, theta: float, probability: float) -> tuple[float, float]:
    """(low, high) outside which the sum tilted by `theta` lies with about at most `probability` at either end."""
    base = moments(parts, theta).log_moment + math.log(probability)

    def reached(change: float) -> float:
        return (moments(parts, theta + change).log_moment - base) / abs(change)

    return -reached(-_least(parts, lambda x: reached(-x))), reached(_least(parts, reached))


def tilt(parts: Parts, best: float, epsilon: float) -> tuple[float, tuple[float, float]]:
    """(theta, window) for the FFT: at most `best`, where the tilted sum centres about `epsilon`, and a narrow window.

    Heavy tails make the tilted distribution wide; less of a tilt makes it narrower and the rounding at eps larger,
    which is allowed for.
    """
    least = moments(parts, best).log_moment - best * epsilon
    steps = sum(part.times for part in parts)
    most = min(_OFF_CENTRE, -math.log(_ROUNDING * steps)) if _ROUNDING * steps < 1 else 0.0
    found: tuple[float, tuple[float, float]] | None = None
    for share in (1.0, 0.85, 0.7, 0.5, 0.3):
        theta = share * best
        if found is not None and moments(parts, theta).log_moment - theta * epsilon - least > most:
            break
        window = tilted_range(parts, theta, _WRAPPED)
        if found is None or window[1] - window[0] < found[1][1] - found[1][0]:
            found = theta, window
    assert found is not None
    return found


def _least(parts: Parts, value: Callable[[float], float]) -> float:
    """theta > 0 with about the least value, looked for around the inverse of the sum's standard deviation."""
    scale = 1.0 / max(math.sqrt(moments(parts, 0.0).variance), 1e-12)
    found = minimize_scalar(
        lambda x: value(scale * math.exp(x)), bounds=(-9.0, 9.0), method="bounded", options={"xatol": 1e-3}
    )
    return float(scale * math.exp(found.x))


def spread(parts: Parts, theta: float, grid: float, probability: float) -> float:
    """By how much rounding to the lattice may move the sum tilted by `theta`, but with about at most `probability`.

    Bernstein's inequality: each step's loss moves within one place of the grid and keeps its mean, so that the variance
    is at most T h^2 / 4, and at most h times the sum of absolute losses.
    """
    found, log_p = moments(parts, theta), -math.log(probability)
    variance = min(found.steps * grid * grid / 4.0, grid * found.bulk)
    return 2.0 / 3.0 * grid * log_p + math.sqrt(2.0 * variance * log_p)


def lattice_top(parts: Parts, grid: float, theta: float, at: float, log_probability: float) -> float:
    """A loss that the sum on the lattice of `theta` exceeds with probability at most e^log_probability: Markov's
    inequality for e^(at L), of the lattice's own probabilities."""
    total = 0.0
    for part in parts:
        single = part.lattice(grid, theta)
        exponents = np.where(single.probabilities > 0, at * single.losses, -np.inf)
        top = float(exponents.max())
        total += part.times * (top + math.log(float(single.probabilities @ np.exp(exponents - top))) + single.relative)
    return (total + 1e-9 - log_probability) / at


def grid_of(parts: Parts, theta: float, wished: float, window: tuple[float, float], counts: tuple[int, int]) -> float:
    """The grid: as wished, but finer where that takes few points and coarser where it takes many (counts of points)."""
    width = max(window[1] - window[0], *(0.5 * part.width(theta) for part in parts))
    return max(min(wished, width / counts[0]), width / counts[1])


def spacing(parts: Parts, theta: float, tolerance: float) -> float:
    """A grid that raises eps by about `tolerance`: it adds v to the variance, which costs (1 + theta) v / 2."""
    found = moments(parts, theta)
    added = 2.0 * tolerance / (1.0 + theta)
    return max(math.sqrt(6.0 * added / found.steps), added / max(found.bulk, 1e-300))
