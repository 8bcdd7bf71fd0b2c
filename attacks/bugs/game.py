"""A white-box game against any trainer: fair coins, single steps, and the claimed noise as the null hypothesis.

For every coin a fresh trainer with fresh noise takes one step on a batch with the unit (heads) or without it (tails).
The score is the release's component along the direction in which the unit moves the sum, found beforehand under frozen
noise. Trials are independent, so the order-statistic tail (Xiang et al. 2025, arXiv 2509.08704) is exact for the
claimed mechanism: N(0, 1) against N(1 / sigma, 1). It sees what leaks in one step and nothing else: sampling,
accounting, resuming and noise shared between steps are out of its sight.
"""

from dataclasses import dataclass

import numpy as np

from attacks.contract.guard import MethodFailure
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe, Records, Vector
from dpaudit.analysis.claim import play
from dpaudit.bounds import order_statistic
from dpaudit.bounds.profile import GaussianProfile, Profile, laplace

TRIALS, GUESSES, ALPHA = 600, 300, 1e-3


@dataclass(frozen=True)
class GameResult:
    """p-value of the claimed noise, and the counts behind it; `played` False where the game does not apply."""

    played: bool
    p_value: float
    trials: int
    guesses: int
    errors: int
    why: str = ""

    @property
    def caught(self) -> bool:
        """At the game's own level."""
        return self.played and self.p_value <= ALPHA


def release_game(probe: Probe, bench: Bench, *, seed: int = 0) -> GameResult:
    """Play one game with TRIALS coins; guesses are the GUESSES / 2 highest and lowest scores, fixed beforehand."""
    sigma = probe.claim.noise_multiplier
    if probe.mechanism == "correlated" or sigma == 0 or not probe.deterministic:
        return GameResult(False, 1.0, 0, 0, 0, "needs a claimed noise, and seeds that repeat")
    records, batch, rest, direction = _adversary(probe, bench)
    if not direction.any():
        return GameResult(False, 1.0, 0, 0, 0, "no unit moved the release")
    rng = np.random.default_rng([seed, 17])
    coins = rng.random(TRIALS) < 0.5
    scores = np.array([_score(probe, batch if coin else rest, records, direction) for coin in coins])
    game = play(scores, coins, top=GUESSES // 2, bottom=GUESSES // 2, rng=rng)
    errors = game.guesses - game.correct
    null: Profile = laplace(1 / sigma) if probe.mechanism == "laplace" else GaussianProfile(1 / sigma)
    p = order_statistic.p_value(null, canaries=TRIALS, guesses=GUESSES, errors=errors)
    return GameResult(True, p, TRIALS, GUESSES, errors)


def _adversary(probe: Probe, bench: Bench) -> tuple[Records, list[int], list[int], Vector]:
    """The unit that moves the sum most, under frozen noise: (records, batch with it, batch without, direction)."""
    picks = bench.picks
    candidates: list[tuple[Records, int]] = [(probe.own, unit) for unit in picks.group]
    candidates += [(item.records, picks.place) for item in bench.usable]
    best, chosen = -1.0, (probe.own, picks.group[0])
    for records, unit in candidates:
        size = probe.size(bench.contribution(unit, [picks.anchor], records))
        if best < size < np.inf:
            best, chosen = size, (records, unit)
    records, unit = chosen
    direction = bench.contribution(unit, [picks.anchor], records)
    if probe.mechanism == "laplace":  # for a Laplace mechanism one coordinate carries the likelihood ratio's scale
        direction = np.where(np.arange(direction.size) == np.abs(direction).argmax(), direction, 0.0)
    return records, [picks.anchor, unit], [picks.anchor], direction


def _score(probe: Probe, batch: list[int], records: Records, direction: Vector) -> float:
    try:
        value = float(probe.observe(batch, records=records, noise=None).vector @ direction)
    except MethodFailure:
        value = np.inf
    # A release that is not finite can only come with the unit.
    return value if np.isfinite(value) else 1e300
