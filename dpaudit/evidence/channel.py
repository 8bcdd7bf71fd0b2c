"""The known channel of a white-box game, and what the coins look like given what was seen.

Candidate i has a unit direction of its own, orthogonal to all others. At step t the auditor sees, in units of C,

    z[i, t] = a b[i, t] + sigma N(0, 1),    b[i, t] = 1 if the coin of i is heads and step t sampled it (probability q),

after what the other records contributed has been subtracted. The claim says a <= 1 and names sigma, q and T. Given the
transcript and the sampling of everybody else, the candidates' noise and coins are independent: white Gaussian noise has
independent components along orthogonal directions, whatever orthonormal basis was drawn beforehand; the gradients of
others, an optimiser with state and the adaptivity of training shift the release by amounts that are functions of
earlier releases, which are subtracted, or process it afterwards. Hence the posterior of a fair coin is expit(L) with

    L[i] = sum_t log(1 - q + q exp((2 a z[i, t] - a^2) / (2 sigma^2))),

the log-likelihood ratio of "in" against "out", independently over candidates. Nasr et al. 2023 (arXiv 2302.07956) and
Steinke et al. 2023 (arXiv 2305.08846) use the same canaries; the posterior is Bayes' rule.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit.bounds import validate

Floats = npt.NDArray[np.float64]
_CHUNK = 2_000_000  # numbers per block of the sum over steps; bounds the memory of the exponentials
_LARGEST = 700.0  # exponent that exp still holds; beyond it log(1 - q + q e^x) is log(q) + x to the last digit


@dataclass(frozen=True)
class Channel:
    """sigma: noise multiplier of the claim. rate: q. steps: T."""

    sigma: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        validate.real("sigma", self.sigma, low=0.0, high=np.inf, open_low=True, open_high=True)
        validate.real("rate", self.rate, low=0.0, high=1.0, open_low=True)
        validate.count("steps", self.steps, least=1)


def log_ratio(seen: Floats, *, sigma: float, rate: float, amplitude: float = 1.0) -> Floats:
    """(m,) log-likelihood ratios of "in" against "out". seen: (m, T) in units of C."""
    total = np.empty(seen.shape[0])
    rows = max(1, _CHUNK // max(1, seen.shape[1]))
    for first in range(0, seen.shape[0], rows):
        part = seen[first : first + rows]
        exponent = (part - amplitude / 2) * (amplitude / sigma**2)
        if rate >= 1:
            total[first : first + rows] = exponent.sum(axis=1)
        else:
            inside = np.log((1.0 - rate) + rate * np.exp(np.minimum(exponent, _LARGEST)))
            total[first : first + rows] = (inside + np.maximum(exponent - _LARGEST, 0.0)).sum(axis=1)
    return total


def simulate(
    channel: Channel, count: int, rng: np.random.Generator, *, scale: float = 1.0, amplitude: float = 1.0
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(count, T) of what an auditor sees when the true sigma is `scale` times the claimed one, and the (count,)
    coins."""
    members = rng.random(count) < 0.5
    sampled = (rng.random((count, channel.steps)) < channel.rate) & members[:, None]
    noise = rng.standard_normal((count, channel.steps))
    return amplitude * sampled + scale * channel.sigma * noise, members
