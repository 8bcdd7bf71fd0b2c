"""The trade-off curve of a claim: the least type II error (FNR) of any test with type I error alpha (FPR).

A mechanism is f-DP if no test between neighbouring data sets has errors (alpha, beta) with beta < f(alpha), in either
direction (Dong, Roth, Su 2022). f is convex, decreasing and symmetric; 1 - f(FPR) is the highest TPR at that FPR, and
the largest TPR - FPR is delta at eps = 0. Three kinds:

- Gaussian, without subsampling: f(alpha) = Phi(Phi^-1(1 - alpha) - mu).
- (eps, delta) alone: f(alpha) = max(0, 1 - delta - e^eps alpha, e^-eps (1 - delta - alpha)).
- from the accountant's losses: tests that reject above a loss l >= 0 are the corners of the part with slope below -1;
  the rest is its mirror image. The losses are pessimistic, so f is never above the mechanism's own curve.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from dpaudit.accounting import FINE, DpSgd, discrete_losses, sensitivity
from dpaudit.analysis.claim import claimed_event
from dpaudit.documents import Claim
from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]


class Curve(Protocol):
    """A trade-off function."""

    def beta(self, alpha: Floats) -> Floats:
        """The least type II error at type I errors in [0, 1]; shapes are kept."""

    def advantage(self) -> float:
        """max(TPR - FPR) = 1 - min(alpha + beta)."""


@dataclass(frozen=True)
class GaussianCurve:
    """Of N(0, 1) against N(mu, 1)."""

    mu: float

    def beta(self, alpha: Floats) -> Floats:
        return np.asarray(ndtr(-ndtri(alpha) - self.mu), dtype=np.float64)

    def advantage(self) -> float:
        return float(ndtr(self.mu / 2) - ndtr(-self.mu / 2))


@dataclass(frozen=True)
class EpsilonDeltaCurve:
    """Of everything that (eps, delta)-DP allows."""

    epsilon: float
    delta: float

    def beta(self, alpha: Floats) -> Floats:
        left, right = 1 - self.delta - np.exp(self.epsilon) * alpha, np.exp(-self.epsilon) * (1 - self.delta - alpha)
        return np.asarray(np.maximum(0.0, np.maximum(left, right)), dtype=np.float64)

    def advantage(self) -> float:
        return float(np.tanh(self.epsilon / 2) * (1 - self.delta) + self.delta)


@dataclass(frozen=True)
class CornerCurve:
    """Piecewise linear between corners (alpha, beta), alpha ascending from 0 to 1; shapes (k,)."""

    alphas: Floats
    betas: Floats

    def beta(self, alpha: Floats) -> Floats:
        return np.asarray(np.interp(alpha, self.alphas, self.betas), dtype=np.float64)

    def advantage(self) -> float:
        return float(1.0 - np.min(self.alphas + self.betas))


def curve_of(claim: Claim) -> Curve:
    """The curve of the claimed mechanism, or of (eps, delta) where the claim names none that has one."""
    event = claimed_event(claim)
    if event is None:
        if not 0 <= claim.epsilon < np.inf:
            raise rejected("claim.epsilon", claim.epsilon, "a finite eps >= 0 (an infinite one allows every test)")
        return EpsilonDeltaCurve(float(claim.epsilon), claim.delta)
    if event.sample_rate == 1 and event.noise == "gaussian" and event.noise_multiplier > 0:
        return GaussianCurve(sensitivity(event.relation) * float(np.sqrt(event.steps)) / event.noise_multiplier)
    return of_losses(event)


def of_losses(event: DpSgd, tolerance: float = FINE) -> CornerCurve:
    """From both directions of the accountant's loss distribution, whichever leaks more at each threshold."""
    ends = [_tails(event, direction, tolerance) for direction in ("remove", "add")]
    grid = np.unique(np.r_[0.0, *(losses for losses, _, _ in ends)])
    power, error = [], []
    for losses, above, below in ends:
        at = np.searchsorted(losses, grid, side="right")  # tests reject strictly above the threshold
        power.append(above[at])
        error.append(below[at])
    with np.errstate(over="ignore", invalid="ignore"):
        deltas = np.nan_to_num(np.stack(power) - np.exp(grid) * np.stack(error))
    leaks = np.argmax(deltas, axis=0)
    place = np.arange(grid.size)
    alphas = np.minimum.accumulate(np.stack(error)[leaks, place])[::-1]  # ascending
    betas = (1.0 - np.minimum(1.0, np.minimum.accumulate(np.stack(power)[leaks, place])))[::-1]
    first = np.concatenate([[0.0], alphas, betas[::-1], [1.0]])
    second = np.concatenate([[betas[0]], betas, alphas[::-1], [0.0]])
    return CornerCurve(np.maximum.accumulate(first), np.minimum.accumulate(second))


def _tails(event: DpSgd, direction: str, tolerance: float) -> tuple[Floats, Floats, Floats]:
    """Losses >= 0 (k,), ascending, and (k + 1,) probabilities of the losses from each place on: under P, with infinite
    losses, and under Q."""
    found = discrete_losses(event, direction, tolerance)  # type: ignore[arg-type]
    keep = (found.losses >= 0) & (found.probabilities > 0)
    losses, mass = found.losses[keep], found.probabilities[keep]
    above = np.r_[np.cumsum(mass[::-1])[::-1], 0.0] + found.infinity_mass
    below = np.r_[np.cumsum((mass * np.exp(-losses))[::-1])[::-1], 0.0]
    return losses, above, below
