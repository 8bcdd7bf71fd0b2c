"""A black-box canary game against variations of the compact trainer: whole trainings, one canary, final weights only.

For every coin a fresh trainer with a seed and noise of its own is trained for STEPS steps on its records, with the
canary (heads) or without it (tails). The score is how much training lowered the canary's loss. Trainings are
independent, so the order-statistic tail (Xiang et al. 2025, arXiv 2509.08704) is exact for the claimed mechanism:
Poisson-subsampled Gaussian steps. What it sees is what the final weights tell; a leak that they bury is out of its
sight, which is why a canary audit alone catches few bugs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attacks.bugs.game import ALPHA
from dpaudit.accounting import DpSgd
from dpaudit.analysis.claim import play
from dpaudit.bounds import order_statistic, pld
from trainers.adapters.compact import FEATURES, Compact, Record, own_records, split

RUNS, GUESSES, STEPS = 200, 80, 20
LOWEST = -1e300  # the score of a training that ended in NaN or with an error: it can only come with the canary


@dataclass(frozen=True)
class CanaryResult:
    """p-value of the claimed mechanism, and the counts behind it; `played` False where it does not apply."""

    played: bool
    p_value: float = 1.0
    guesses: int = 0
    errors: int = 0

    @property
    def caught(self) -> bool:
        """At the game's own level."""
        return self.played and self.p_value <= ALPHA


def canary() -> Record:
    """A unit whose gradient is clipped in every step: one question with an answer far from everybody's."""
    return Record(torch.full((1, FEATURES), 1.5), torch.tensor([-1000.0]))


def loss(weights: dict[str, torch.Tensor], record: Record) -> float:
    """Mean of (out - y)^2 / 2 over the unit's questions, in double precision."""
    blocks = {name: value.double() for name, value in weights.items()}
    hidden = torch.tanh(record.x.double() @ blocks["w1"].T + blocks["b1"])
    return float((0.5 * (hidden @ blocks["w2"] + blocks["b2"] - record.y.double()).square()).mean())


def applies(trainer: Compact) -> bool:
    """Whether the claim is one that independent trainings can be held against."""
    claim = trainer.claim
    usual = (claim.mechanism, claim.sampling, claim.relation) == ("gaussian", "poisson", "add-remove")
    return usual and claim.noise_multiplier > 0 and isinstance(trainer, Compact)


def canary_game(
    factory: Callable[..., Any], *, seed: int = 0, runs: int = RUNS, guesses: int = GUESSES
) -> CanaryResult:
    """Train `runs` times; half of `guesses`, fixed beforehand, go to the highest and half to the lowest scores."""
    first = factory(seed=seed, noise_seed=seed)
    if not isinstance(first, Compact) or not applies(first):
        return CanaryResult(False)
    rng = np.random.default_rng([seed, 23])
    coins = rng.random(runs) < 0.5
    seeds = rng.integers(2**31, size=(runs, 2))
    target, records = canary(), own_records()
    scores = np.array(
        [
            _score(factory, [*records, target] if coin else records, target, int(mine), int(noise))
            for coin, (mine, noise) in zip(coins, seeds, strict=True)
        ]
    )
    game = play(scores, coins, top=guesses // 2, bottom=guesses // 2, rng=rng)
    claim = first.claim
    null = pld.claimed_profile(DpSgd(claim.noise_multiplier, float(claim.sample_rate or 0), STEPS, claim.relation))
    errors = game.guesses - game.correct
    p = order_statistic.p_value(null, canaries=runs, guesses=guesses, errors=errors)
    return CanaryResult(True, p, guesses, errors)


def _score(factory: Callable[..., Any], records: list[Record], target: Record, seed: int, noise: int) -> float:
    trainer = factory(records, seed=seed, noise_seed=noise)
    before = loss(dict(split(trainer.weights)), target)
    try:
        for _ in range(STEPS):
            trainer.step(trainer.sample())
    except (RuntimeError, ValueError):  # a bug that crashes: the run says nothing
        return LOWEST
    gained = before - loss(dict(split(trainer.weights)), target)
    return gained if math.isfinite(gained) else LOWEST
