"""What one canary's coin looks like through a mechanism: the error profile of its best guess.

A canary in or out of training is a pair of output distributions (Q out, P in). With a fair coin the output has density
M = (P + Q) / 2, the log-likelihood ratio L = ln(P/Q) says which guess is best, and the best guess is wrong with
probability gamma = 1 / (1 + e^|L|). Sorting outputs by confidence |L| gives a profile in quantile coordinates of M:

    G(w) = integral of gamma over quantiles above w,     G(0) = error of a forced guess,  G(1) = 0.

G holds all that both one-run theories need. Order statistics read the mean error G(w) / (1 - w) above a cut; the f-DP
theorem reads the trade-off curve: "right with probability x costs wrong with probability at least y" is the curve
(1 - w - G(w), G(w)). A trade-off function need not be symmetric: the coin averages both directions of the pair.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtr, ndtri

from dpaudit import validate
from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]


class Profile(Protocol):
    """An error profile; both methods take and return vectors of one shape."""

    def error_above(self, w: Floats) -> Floats:
        """G(w) for quantiles w in [0, 1]."""

    def wrong_for(self, right: Floats) -> Floats:
        """The least probability of a wrong guess that comes with probability `right` of a right one."""


@dataclass(frozen=True)
class DiscreteProfile:
    """Of a discrete pair: outputs with |L| = `confidence` (inf allowed) and probability `mass` under M, shapes (k,)."""

    confidence: Floats
    mass: Floats

    def __post_init__(self) -> None:
        if self.confidence.shape != self.mass.shape or self.mass.ndim != 1 or self.mass.size == 0:
            raise rejected(
                "profile", f"shapes {self.confidence.shape}, {self.mass.shape}", "two vectors of equal length"
            )
        if not (np.all(self.confidence >= 0) and np.all(self.mass >= 0) and abs(float(self.mass.sum()) - 1) < 1e-3):
            raise rejected("profile", float(self.mass.sum()), "|L| >= 0 and masses >= 0 that sum to 1")

    @cached_property
    def _corners(self) -> tuple[Floats, Floats]:
        """(w, G) where the piecewise linear G bends, w ascending from 0 to 1. Cached: sorting is the costly part."""
        order = np.argsort(self.confidence, kind="stable")
        mass = self.mass[order] / self.mass.sum()
        # Sums run from the confident end, where the small numbers are.
        above = np.cumsum(mass[::-1])[::-1]
        errors = np.cumsum((mass * expit(-self.confidence[order]))[::-1])[::-1]
        return np.r_[1.0 - above / above[0], 1.0], np.r_[errors, 0.0]

    @cached_property
    def _curve(self) -> tuple[Floats, Floats]:
        """(right, wrong), both ascending from 0."""
        w, errors = self._corners
        return ((1.0 - w) - errors)[::-1].copy(), errors[::-1].copy()

    def error_above(self, w: Floats) -> Floats:
        corners, errors = self._corners
        return np.interp(w, corners, errors)

    def wrong_for(self, right: Floats) -> Floats:
        x, y = self._curve
        # More right answers than any guesser gets: a slope of one says so (right + wrong passes 1).
        return np.asarray(np.interp(right, x, y) + np.maximum(right - x[-1], 0.0), dtype=np.float64)


@dataclass(frozen=True)
class GaussianProfile:
    """Of N(0, 1) against N(mu, 1), in closed form.

    With t = |x - mu/2|, L = mu t: the mass above t is Phi(mu/2 - t) + Phi(-mu/2 - t) and its wrong part is the second
    term.
    """

    mu: float

    def error_above(self, w: Floats) -> Floats:
        half = 0.5 * self.mu
        nodes = np.linspace(0.0, half + 9.0, 4001)
        # Tabulated inverse, then Newton on the closed form to full precision.
        t = np.interp(-(1.0 - w), -(ndtr(half - nodes) + ndtr(-half - nodes)), nodes)
        for _ in range(3):
            above = ndtr(half - t) + ndtr(-half - t)
            slope = (np.exp(-0.5 * (t - half) ** 2) + np.exp(-0.5 * (t + half) ** 2)) / np.sqrt(2 * np.pi)
            t = np.clip(t + (above - (1.0 - w)) / np.maximum(slope, 1e-300), 0.0, half + 9.0)
        return np.asarray(ndtr(-half - t), dtype=np.float64)

    def wrong_for(self, right: Floats) -> Floats:
        return np.asarray(ndtr(ndtri(np.minimum(right, 1.0)) - self.mu), dtype=np.float64)


def from_pair(losses: npt.ArrayLike, inside: npt.ArrayLike, outside: npt.ArrayLike) -> DiscreteProfile:
    """From outputs with loss ln(P/Q) (inf and -inf allowed) and probabilities under P (in) and Q (out), shapes (k,)."""
    confidence = np.abs(np.asarray(losses, dtype=np.float64))
    mass = 0.5 * (np.asarray(inside, dtype=np.float64) + np.asarray(outside, dtype=np.float64))
    return DiscreteProfile(confidence, mass)


def epsilon_delta(epsilon: float, delta: float) -> DiscreteProfile:
    """The worst pair that is (epsilon, delta)-DP (Kairouz, Oh, Viswanath 2015): with probability delta the coin is
    told, otherwise randomised response."""
    eps, d = validate.epsilon(epsilon), validate.delta(delta)
    return DiscreteProfile(np.array([eps, np.inf]), np.array([1.0 - d, d]))


def laplace(epsilon: float) -> DiscreteProfile:
    """Laplace(0, 1/epsilon) against Laplace(1, 1/epsilon).

    Beyond both centres |L| = epsilon: an atom. Between them L is linear in the output; 4,000 cells, each replaced by
    its two ends so that both probabilities are kept (which can only leak more).
    """
    eps = validate.real("epsilon", epsilon, low=0.0, high=700.0)
    edges = np.linspace(-eps, eps, 4001)
    # Between the centres: density (eps/2) e^{-eps x} under Q for x in (0, 1), L = eps (2x - 1).
    under_q = 0.5 * np.exp(-0.5 * (eps + edges))
    cell_q = under_q[:-1] - under_q[1:]
    cell_p = cell_q[::-1]
    losses, p = split_cells(edges, cell_p, cell_q)
    q = p * np.exp(-losses)
    tail, far = 0.5, 0.5 * np.exp(-eps)
    return from_pair(np.r_[losses, eps, -eps], np.r_[p, tail, far], np.r_[q, far, tail])


def split_cells(edges: Floats, cell_p: Floats, cell_q: Floats) -> tuple[Floats, Floats]:
    """Replace each cell of losses (edges[k], edges[k+1]) by two atoms at its ends, keeping both its probabilities.

    "Connect the dots" (Doroshenko et al. 2022): a spreading of L under both measures, so the result leaks at least as
    much. Returns losses (k,) and P-probabilities (k,) at the edges; Q is p * e^-loss.
    """
    low, high = edges[:-1], edges[1:]
    # alpha + beta = p and alpha e^-low + beta e^-high = q, scaled by e^low against overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = cell_q * np.exp(low)
        beta = (cell_p - scaled) / -np.expm1(low - high)
    beta = np.clip(np.nan_to_num(beta), 0.0, cell_p)
    p = np.zeros(edges.size)
    p[:-1] += cell_p - beta
    p[1:] += beta
    return edges, p
