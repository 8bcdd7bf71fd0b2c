"""Bounds within "DP-SGD with this q and T": the largest sigma that one-run counts don't refute, and the eps of it.

Batches are Poisson, or randomly allocated over epochs of `epoch` steps.

q and T are public and sigma is not trusted: the family has one unknown, the noise. `assumes: dp-sgd(q,T)`. A game is
put to a profile by one of two theories: `Ordered` (order statistics, canaries that don't share their fate) or
`Interfering` (f-DP theorem, any interference).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dpaudit import validate
from dpaudit.bounds import mahloujifar, order_statistic, pld
from dpaudit.bounds.profile import DiscreteProfile, Profile, epsilon_delta
from dpaudit.bounds.roots import largest_below

MOST_LEAK = 64.0  # 1 / sigma beyond which a step is as good as noiseless


@dataclass(frozen=True)
class Ordered:
    """canaries (n), guesses (r), errors (u), read by order statistics."""

    canaries: int
    guesses: int
    errors: int

    def p_value(self, profile: Profile) -> float:
        """P[at most u errors]."""
        return order_statistic.p_value(profile, canaries=self.canaries, guesses=self.guesses, errors=self.errors)


@dataclass(frozen=True)
class Interfering:
    """canaries (m), guesses (r), errors, read by the f-DP theorem."""

    canaries: int
    guesses: int
    errors: int

    def p_value(self, profile: Profile) -> float:
        """The f-DP theorem's p-value."""
        right = self.guesses - self.errors
        return mahloujifar.p_value(profile, canaries=self.canaries, guesses=self.guesses, correct=right)


Game = Ordered | Interfering


def noiseless_profile(sample_rate: float, steps: int, epoch: int | None = None) -> DiscreteProfile:
    """No noise: a canary that was ever sampled is seen; one that never was looks like one that is out."""
    missed = (1.0 - sample_rate) ** steps if epoch is None else _never_drawn(sample_rate, steps, epoch)
    # Not seen: all of `out` and the missed part of `in`, with likelihood ratio `missed`.
    unseen = 0.5 * (1.0 + missed)
    level = -math.log(missed) if missed > 0 else math.inf
    return DiscreteProfile(np.array([level, math.inf]), np.array([unseen, 1.0 - unseen]))


def _never_drawn(sample_rate: float, steps: int, epoch: int) -> float:
    """P[none of a unit's draws lies in the first `steps` of an epoch]; 0 after a whole one."""
    draws, left = round(sample_rate * epoch), epoch - steps
    return math.comb(left, draws) / math.comb(epoch, draws) if left >= draws else 0.0


@lru_cache(maxsize=1 << 14)
def sigma_upper(sample_rate: float, steps: int, game: Game, *, confidence: float, epoch: int | None = None) -> float:
    """The largest sigma (noise std / clip norm) that `game` does not refute. Memoised.

    inf: no amount of noise is refuted; 0: not even a noiseless run with this q and T guesses so well.
    """
    level = 1.0 - validate.confidence(confidence)
    if game.p_value(noiseless_profile(sample_rate, steps, epoch)) <= level:
        return 0.0

    def tail(leak: float) -> float:
        profile = pld.dp_sgd_profile(1.0 / leak, sample_rate, steps, epoch) if leak > 0 else epsilon_delta(0.0, 0.0)
        return game.p_value(profile)

    leak = largest_below(tail, level, start=0.5, most=MOST_LEAK, tolerance=1e-5)
    return math.inf if leak == 0.0 else 1.0 / leak


def epsilon_lower(
    sample_rate: float, steps: int, game: Game, *, delta: float, confidence: float, epoch: int | None = None
) -> float:
    """Lower bound on eps at `delta` (add-remove or zero-out); inf when even a noiseless run is refuted."""
    sigma = sigma_upper(sample_rate, steps, game, confidence=confidence, epoch=epoch)
    if sigma == math.inf:
        return 0.0
    return math.inf if sigma == 0.0 else pld.dp_sgd_epsilon(sigma, sample_rate, steps, delta, epoch)
