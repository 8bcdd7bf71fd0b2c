"""The power of a white-box game as it is played: its rule, its level, its claim.

A pool of candidates is simulated under the wrong claim; games are drawn from the pool with replacement and judged by
the very function that judges the real game. The noise level of the spare directions has a chi-square law and is drawn
directly.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from dpaudit.evidence.channel import Channel, simulate
from dpaudit.evidence.coins import Posteriors
from dpaudit.evidence.game import Rule
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.verdict import refutes

GAMES = 400
_POOL_NUMBERS, _LEAST_POOL, _MOST_POOL = 1_000_000, 500, 5000
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Power:
    """value: share of simulated games that refute; low, high: its exact interval (Clopper-Pearson, 99 %)."""

    value: float
    low: float
    high: float


def white_box_power(
    channel: Channel, rule: Rule, *, alpha: float, scale: float, rng: np.random.Generator, games: int = GAMES
) -> Power:
    """Probability that the game refutes when the true sigma is `scale` times the claimed one."""
    size = int(np.clip(_POOL_NUMBERS // channel.steps, _LEAST_POOL, _MOST_POOL))
    seen, coins = simulate(channel, size, rng, scale=scale)
    pool = Posteriors.of(seen, channel)
    refuted = 0
    spare = rule.spare * channel.steps
    for _ in range(games):
        chosen = rng.integers(size, size=rule.loud.size)
        noise = NoiseLevel(float(scale**2 * rng.chisquare(spare)), spare) if spare else None
        refuted += refutes(rule.log_e(pool.rows(chosen), coins[chosen], noise), alpha)
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, refuted, games - refuted + 1)) if refuted else 0.0
    high = float(beta.ppf(1 - tail, refuted + 1, games - refuted)) if refuted < games else 1.0
    return Power(refuted / games, low, high)
