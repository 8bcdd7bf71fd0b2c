"""The known channel of a white-box game, and what the coins look like given what was seen.

Candidate i has a unit direction of its own, orthogonal to all others. At step t the auditor sees, in units of C,

    z[i, t] = a b[i, t] + sigma N(0, 1),    b[i, t] = 1 if the coin of i is heads and step t holds it,

after what the other records contributed has been subtracted. The claim says a <= 1 and names sigma, T and how steps are
drawn: each with probability q (Poisson), or exactly k of the t steps of every epoch (random allocation, q = k / t).
Given the transcript and the sampling of everybody else, the candidates' noise and coins are independent: white Gaussian
noise has independent components along orthogonal directions, whatever orthonormal basis was drawn beforehand; the
gradients of others, an optimiser with state and the adaptivity of training shift the release by amounts that are
functions of earlier releases, which are subtracted, or process it afterwards. Hence the posterior of a fair coin is
expit(L), L the log-likelihood ratio of "in" against "out", independently over candidates. With the ratio of one step

    x[i, t] = (2 a z[i, t] - a^2) / (2 sigma^2)

it is, under Poisson sampling, L[i] = sum_t log(1 - q + q exp x[i, t]).

**Allocation.** A candidate's steps are *not* independent within an epoch. Given that it is in, its subset S of an epoch
is uniform over all k-subsets and independent of noise, of other epochs and of everybody else's draws (this fails for a
shuffled list, whose units make room for each other); given S the ratio of the epoch is the product over S of exp x. So

    L[i] = sum over epochs of log( e_k(exp x[i, 1], ..., exp x[i, t]) / binom(t, k) ),

e_k the elementary symmetric polynomial: the mean over all subsets; for k = 1 the mean of exp x over the steps. Steps of
an epoch that were not played show nothing of S: their ratio is 1, so they enter as x = 0. e_k is summed in logarithms
by its recurrence e_j(first n) = e_j(first n - 1) + exp(x_n) e_(j-1)(first n - 1), of positive terms only.

Nasr et al. 2023 (arXiv 2302.07956) and Steinke et al. 2023 (arXiv 2305.08846) use the same canaries; the posterior is
Bayes' rule.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit import validate
from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_CHUNK = 2_000_000  # numbers per block of the sum over steps; bounds the memory of the exponentials
_LARGEST = 700.0  # exponent that exp still holds; beyond it log(1 - q + q e^x) is log(q) + x to the last digit


@dataclass(frozen=True)
class Channel:
    """sigma: noise multiplier of the claim. rate: q. steps: T. epoch: t of random allocation; None: Poisson."""

    sigma: float
    rate: float
    steps: int
    epoch: int | None = None

    def __post_init__(self) -> None:
        validate.real("sigma", self.sigma, low=0.0, high=np.inf, open_low=True, open_high=True)
        validate.real("rate", self.rate, low=0.0, high=1.0, open_low=True)
        validate.count("steps", self.steps, least=1)
        if self.epoch is not None:
            validate.count("epoch", self.epoch, least=1)
            if self.draws < 1 or not math.isclose(self.rate * self.epoch, self.draws, rel_tol=1e-9):
                raise rejected("rate", self.rate, f"a multiple of 1/{self.epoch}, with epochs of so many steps")

    @property
    def draws(self) -> int:
        """k of allocation."""
        return round(self.rate * (self.epoch or 0))

    def log_ratio(self, seen: Floats, *, scale: float = 1.0, amplitude: float = 1.0) -> Floats:
        """(m,) log-likelihood ratios of "in" against "out" if sigma were `scale` times the claimed one.

        seen: (m, T) in units of C, of the first T steps.
        """
        total = np.empty(seen.shape[0])
        rows = max(1, _CHUNK // max(1, seen.shape[1]))
        for first in range(0, seen.shape[0], rows):
            part = seen[first : first + rows]
            exponent = (part - amplitude / 2) * (amplitude / (scale * self.sigma) ** 2)
            total[first : first + rows] = self._of_steps(exponent)
        return total

    def _of_steps(self, exponent: Floats) -> Floats:
        """(m, T) log ratios of single steps that hold the candidate -> (m,) of all of them."""
        if self.rate >= 1:
            return np.asarray(exponent.sum(axis=1))
        if self.epoch is None:
            inside = np.log((1.0 - self.rate) + self.rate * np.exp(np.minimum(exponent, _LARGEST)))
            return np.asarray((inside + np.maximum(exponent - _LARGEST, 0.0)).sum(axis=1))
        missing = -exponent.shape[1] % self.epoch
        whole = np.pad(exponent, ((0, 0), (0, missing))).reshape(len(exponent), -1, self.epoch)
        return np.asarray((log_symmetric(whole, self.draws) - _log_binomial(self.epoch, self.draws)).sum(axis=1))

    def sampled(self, count: int, rng: np.random.Generator) -> Bools:
        """(count, T) which steps hold each of `count` candidates that are in."""
        if self.epoch is None:
            return np.asarray(rng.random((count, self.steps)) < self.rate)
        epochs = -(-self.steps // self.epoch)
        order = rng.random((count, epochs, self.epoch)).argsort(axis=2).argsort(axis=2)
        return np.asarray((order < self.draws).reshape(count, -1)[:, : self.steps])


def log_symmetric(x: Floats, draws: int) -> Floats:
    """ln e_k(exp x) over the last axis, k = draws: (..., t) -> (...)."""
    steps = x.shape[-1]
    if draws == 1:
        return np.asarray(np.logaddexp.reduce(x, axis=-1))
    if 2 * draws > steps:  # the steps that are left out, of which there are fewer
        return np.asarray(x.sum(axis=-1) + (log_symmetric(-x, steps - draws) if draws < steps else 0.0))
    found = np.full((draws + 1, *x.shape[:-1]), -np.inf)
    found[0] = 0.0
    for step in range(steps):
        found[1:] = np.logaddexp(found[1:], found[:-1] + x[..., step])
    return np.asarray(found[draws])


def _log_binomial(steps: int, draws: int) -> float:
    return math.log(math.comb(steps, draws))


def simulate(
    channel: Channel, count: int, rng: np.random.Generator, *, scale: float = 1.0, amplitude: float = 1.0
) -> tuple[Floats, Bools]:
    """(count, T) of what an auditor sees when the true sigma is `scale` times the claimed one, and the (count,)
    coins."""
    members = rng.random(count) < 0.5
    sampled = channel.sampled(count, rng) & members[:, None]
    noise = rng.standard_normal((count, channel.steps))
    return amplitude * sampled + scale * channel.sigma * noise, members
