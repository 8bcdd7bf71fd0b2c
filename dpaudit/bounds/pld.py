"""Error profiles of DP-SGD: from the accountant's own privacy-loss distribution, and a fast one for searches.

A canary that trains in T Poisson-subsampled Gaussian steps is the pair P = ((1-q) N(0, s^2) + q N(1, s^2))^T (in)
against Q = N(0, s^2)^T (out), s = sigma / C. The accountant's two directions are this pair read from both ends. Of each
direction only the losses >= 0 are used: the other end of a loss distribution is e^-loss times a probability that the
FFT knows to 1e-17 absolutely, which is noise for a loss of -40.

Both ways of building it are pessimistic (they leak at least as much as the mechanism), so a p-value from them is too
large rather than too small.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr

from dpaudit.bounds import validate
from dpaudit.bounds.gdp import epsilon_from_mu
from dpaudit.bounds.profile import DiscreteProfile, GaussianProfile, Profile, split_cells

if TYPE_CHECKING:
    from dpaudit.accounting import DpSgd

Floats = npt.NDArray[np.float64]

POINTS = 1 << 16  # of the composed distribution in searches
TAIL = 1e-15  # probability that a truncation may move to infinite loss
REACH = 12.0  # standard deviations of the noise that one step looks at


def join_directions(remove: tuple[Floats, Floats, float], add: tuple[Floats, Floats, float]) -> DiscreteProfile:
    """One profile from both directions, each (losses, probabilities, probability of infinite loss).

    Losses above 0 of "remove" carry P-probability p and Q-probability p e^-loss; of "add" the reverse. What is left
    over has loss 0 (a forced guess is a coin toss there).
    """
    losses, mass = [np.array([np.inf, np.inf])], [0.5 * np.array([remove[2], add[2]])]
    for values, probabilities, _ in (remove, add):
        keep = (values > 0) & (probabilities > 0)
        losses.append(values[keep])
        mass.append(0.5 * probabilities[keep] * (1.0 + np.exp(-values[keep])))
    rest = 1.0 - sum(float(part.sum()) for part in mass)
    return DiscreteProfile(np.r_[0.0, *losses], np.r_[max(rest, 0.0), *mass])


@lru_cache(maxsize=4)
def claimed_profile(event: "DpSgd") -> DiscreteProfile:
    """Of the claimed mechanism, from the accountant's own loss distribution (dpaudit.accounting.discrete_losses)."""
    from dpaudit.accounting import discrete_losses

    ends = [discrete_losses(event, direction) for direction in ("remove", "add")]
    remove, add = ((end.losses, end.probabilities, end.infinity_mass) for end in ends)
    return join_directions(remove, add)


@lru_cache(maxsize=64)
def dp_sgd_profile(sigma: float, sample_rate: float, steps: int) -> Profile:
    """Of T Poisson-subsampled Gaussian steps on a grid of 2^16 losses: milliseconds to a second, for searches.

    sigma: noise std / clip norm, > 0. At sample rate 1 the closed form with mu = sqrt(T) / sigma.
    """
    s, q, times = check_dp_sgd(sigma, sample_rate, steps)
    if q == 1.0:
        return GaussianProfile(math.sqrt(times) / s)
    remove, add = _composed(s, q, times)
    return join_directions(remove, add)


def dp_sgd_epsilon(sigma: float, sample_rate: float, steps: int, delta: float) -> float:
    """eps of DP-SGD at `delta` (the larger of both directions), from the same grid."""
    s, q, times = check_dp_sgd(sigma, sample_rate, steps)
    d = validate.delta(delta)
    if q == 1.0:
        return epsilon_from_mu(math.sqrt(times) / s, d)
    return max(_epsilon_of(losses, p, infinite, d) for losses, p, infinite in _composed(s, q, times))


def check_dp_sgd(sigma: float, sample_rate: float, steps: int) -> tuple[float, float, int]:
    """(sigma, q, T) in their domain; raises UsageError that names the field."""
    return (
        validate.real("sigma", sigma, low=0.0, high=1e9, open_low=True, open_high=True),
        validate.real("sample-rate", sample_rate, low=0.0, high=1.0, open_low=True),
        validate.count("steps", steps, least=1),
    )


def _epsilon_of(losses: Floats, p: Floats, infinite: float, delta: float) -> float:
    """The smallest eps >= 0 with infinite + sum_{loss > eps} p (1 - e^(eps - loss)) <= delta, exactly."""
    if infinite > delta:
        return math.inf
    keep = losses >= 0
    values, mass = losses[keep], p[keep]
    tail_p = np.cumsum(mass[::-1])[::-1] + infinite
    tail_q = np.cumsum((mass * np.exp(-values))[::-1])[::-1]
    # delta just below each loss, with that loss still counted.
    at = tail_p - np.exp(values) * tail_q
    inside = np.nonzero(at > delta)[0]
    start = int(inside[-1]) + 1 if inside.size else 0
    if start >= values.size:
        return float(values[-1])
    return max(0.0, math.log((tail_p[start] - delta) / tail_q[start])) if tail_p[start] > delta else 0.0


def _one_step(sigma: float, q: float, grid: float) -> tuple[Floats, Floats, Floats, float, float]:
    """One step on multiples of `grid`: losses, P- and Q-probabilities, and both probabilities beyond the reach."""
    ends = np.array([-REACH, REACH + 1.0 / sigma])  # noise in units of sigma; the canary sits at 1 / sigma
    shift = np.logaddexp(math.log1p(-q), math.log(q) + (ends - 0.5 / sigma) / sigma)
    edges = np.arange(math.floor(shift[0] / grid), math.ceil(shift[1] / grid) + 1) * grid
    # The noise at which the loss equals an edge; below ln(1 - q) there is none.
    gain = np.expm1(edges) + q
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(gain > 0, sigma * (np.log(np.maximum(gain, 1e-300)) - math.log(q)) + 0.5 / sigma, -np.inf)
    # Large losses overflow e^loss: there ln(e^l - 1 + q) is l.
    x = np.where(edges > 700, sigma * (edges - math.log(q)) + 0.5 / sigma, x)
    cell_q = _between(x)
    cell_p = (1.0 - q) * cell_q + q * _between(x - 1.0 / sigma)
    losses, p = split_cells(edges, cell_p, cell_q)
    return losses, p, p * np.exp(-losses), max(0.0, 1.0 - float(p.sum())), float(ndtr(-x[-1]))


def _between(x: Floats) -> Floats:
    """Normal probability between consecutive points, from the tail where it keeps its digits."""
    upper, lower = ndtr(-x), ndtr(x)
    return np.where(x[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])


def _range(losses: Floats, p: Floats, times: int) -> tuple[float, float]:
    """(low, high) between which the sum of `times` losses lies but for TAIL (Chernoff over a grid of orders)."""
    budget = -math.log(TAIL)
    bounds = []
    for sign in (1.0, -1.0):
        values = sign * losses
        spread = max(math.sqrt(float(p @ (losses - p @ losses) ** 2) * times), 1e-12)
        orders = np.geomspace(0.01, 30.0, 40) / spread
        exponents = orders[:, None] * values[None, :]
        top = exponents.max(axis=1)
        log_moment = top + np.log(np.exp(exponents - top[:, None]) @ p)
        bounds.append(float(np.min((times * log_moment + budget) / orders)))
    low, high = -bounds[1], bounds[0]
    return max(low, times * float(losses[0])), min(high, times * float(losses[-1]))


@lru_cache(maxsize=64)
def _composed(sigma: float, q: float, times: int) -> tuple[tuple[Floats, Floats, float], tuple[Floats, Floats, float]]:
    """Both directions after T steps: (losses, probabilities, infinite) of ln(P/Q) under P and ln(Q/P) under Q."""
    losses, p, under_q, _, _ = _one_step(sigma, q, _first_grid(sigma, q))
    ranges = [_range(losses, p / p.sum(), times), _range(losses, under_q / under_q.sum(), times)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    grid = max((high - low) / POINTS, (losses[-1] - losses[0]) / POINTS, 1e-9)
    losses, p, under_q, lost_p, lost_q = _one_step(sigma, q, grid)
    size = next_fast_len(math.ceil((high - low) / grid) + losses.size + 2, real=True)
    first = math.floor(low / grid)
    out = []
    for mass, lost, sign in ((p, lost_p, 1.0), (under_q, lost_q, -1.0)):
        composed = irfft(rfft(mass, size) ** times, size)
        # Index k holds the sum of losses (times * losses[0] + k * grid), modulo size: turn it so that `first` leads.
        offset = round(times * losses[0] / grid)
        composed = np.clip(np.roll(composed, offset - first), 0.0, None)
        infinite = min(1.0, -math.expm1(times * math.log1p(-min(lost, 0.5))) + TAIL)
        composed *= (1.0 - infinite) / composed.sum()
        values = (first + np.arange(size)) * grid
        out.append((sign * values, composed, infinite))
    return out[0], out[1]


def _first_grid(sigma: float, q: float) -> float:
    """A grid coarse enough to look at the range of one step with: a thousandth of it."""
    high = np.logaddexp(math.log1p(-q), math.log(q) + (REACH + 0.5 / sigma) / sigma)
    low = np.logaddexp(math.log1p(-q), math.log(q) + (-REACH - 0.5 / sigma) / sigma)
    return float(high - low) / 1000.0
