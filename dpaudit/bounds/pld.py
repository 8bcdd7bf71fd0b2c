"""Error profiles of DP-SGD from the accountant's own loss distributions.

A canary that trains in T Poisson-subsampled Gaussian steps is the pair P = ((1-q) N(0, s^2) + q N(1, s^2))^T (in)
against Q = N(0, s^2)^T (out), s = sigma / C. The accountant's two directions are this pair read from both ends. Of each
direction only the losses >= 0 are used: the other end of a loss distribution is e^-loss times a probability that the
FFT knows to 1e-17 absolutely, which is noise for a loss of -40.

Pessimistic for an accountant is also the valid side for a null hypothesis: the profile leaks at least as much as the
mechanism, rounding and truncation included, so a p-value from it is too large rather than too small, and a sigma
that is not refuted is too large rather than too small.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dpaudit import validate
from dpaudit.bounds.profile import DiscreteProfile, GaussianProfile, Profile

if TYPE_CHECKING:
    from dpaudit.accounting import DpSgd

Floats = npt.NDArray[np.float64]


def join_directions(remove: tuple[Floats, Floats, float], add: tuple[Floats, Floats, float]) -> DiscreteProfile:
    """One profile from both directions, each (losses, probabilities, probability of infinite loss).

    Losses above 0 of "remove" carry P-probability p and Q-probability p e^-loss; of "add" the reverse. What is left
    over has loss 0 (a forced guess is a coin toss there). Rounding may make the sum exceed 1: it is scaled to it.
    """
    losses, mass = [np.array([np.inf, np.inf])], [0.5 * np.array([remove[2], add[2]])]
    for values, probabilities, _ in (remove, add):
        keep = (values > 0) & (probabilities > 0)
        losses.append(values[keep])
        mass.append(0.5 * probabilities[keep] * (1.0 + np.exp(-values[keep])))
    rest = 1.0 - sum(float(part.sum()) for part in mass)
    return DiscreteProfile(np.r_[0.0, *losses], np.r_[max(rest, 0.0), *mass])


@lru_cache(maxsize=4)
def claimed_profile(event: "DpSgd") -> Profile:
    """Of the claimed mechanism; without sampling in closed form."""
    from dpaudit.accounting import FINE, sensitivity

    if event.sample_rate == 1 and event.noise == "gaussian" and event.noise_multiplier > 0 and event.steps > 0:
        return GaussianProfile(sensitivity(event.relation) * math.sqrt(event.steps) / event.noise_multiplier)
    return _profile(event, FINE)


@lru_cache(maxsize=64)
def dp_sgd_profile(sigma: float, sample_rate: float, steps: int, epoch: int | None = None) -> Profile:
    """Of T Poisson-subsampled (epoch: or randomly allocated) Gaussian steps on a coarser grid of losses, for searches.

    sigma: noise std / clip norm, > 0. At sample rate 1 the closed form with mu = sqrt(T) / sigma.
    """
    from dpaudit.accounting import COARSE

    s, q, times = check_dp_sgd(sigma, sample_rate, steps)
    if q == 1.0:
        return GaussianProfile(math.sqrt(times) / s)
    return _profile(_event(s, q, times, epoch), COARSE)


def _event(sigma: float, sample_rate: float, steps: int, epoch: int | None) -> "DpSgd":
    """epoch: steps of an epoch of random allocation; None: Poisson batches."""
    from dpaudit.accounting import DpSgd

    return DpSgd(sigma, sample_rate, steps, sampling="poisson" if epoch is None else "allocation", epoch=epoch)


def _profile(event: "DpSgd", tolerance: float) -> DiscreteProfile:
    from dpaudit.accounting import discrete_losses

    ends = []
    for direction in ("remove", "add"):
        found = discrete_losses(event, direction, tolerance)
        # Rounding raises all losses by a hair, that at 0 too, which belongs to neither direction.
        near = 0.5 * float(found.losses[1] - found.losses[0]) if found.losses.size > 1 else 0.0
        losses = np.where(np.abs(found.losses) < near, 0.0, found.losses)
        ends.append((losses, found.probabilities, found.infinity_mass))
    return join_directions(*ends)


def dp_sgd_epsilon(sigma: float, sample_rate: float, steps: int, delta: float, epoch: int | None = None) -> float:
    """eps of DP-SGD at `delta` (the larger of both directions), by the accountant: above the truth by 2e-4 at most.

    Where it turns the largest sigma that is not refuted into a lower bound on eps, that sigma comes from a profile that
    leaks more than the mechanism by more than this. Raises UsageError for a delta that the accountant can't resolve.
    """
    from dpaudit.accounting import epsilon

    s, q, times = check_dp_sgd(sigma, sample_rate, steps)
    return epsilon(_event(s, q, times, epoch), validate.delta(delta))


def check_dp_sgd(sigma: float, sample_rate: float, steps: int) -> tuple[float, float, int]:
    """(sigma, q, T) in their domain; raises UsageError that names the field."""
    return (
        validate.real("sigma", sigma, low=0.0, high=1e9, open_low=True, open_high=True),
        validate.real("sample-rate", sample_rate, low=0.0, high=1.0, open_low=True),
        validate.count("steps", steps, least=1),
    )
