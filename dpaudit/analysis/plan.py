"""Planning: how many canaries and guesses it takes to refute a claim that is wrong by so much, before any training.

Guesses fixed by a plan cost nothing in validity: they depend on the number of canaries and the claim, never on
scores. Rows of counts are for canaries guessed as well as can be on separate directions; a weaker attack does worse.
Rows of the white-box game are its power as it is played, by the function that the game itself uses.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dpaudit.analysis.claim import (
    Alternative,
    Game,
    alternative_profile,
    claimed_event,
    critical_errors,
    describe_alternative,
    null_profile,
)
from dpaudit.bounds import mahloujifar, order_statistic, steinke
from dpaudit.bounds.profile import GaussianProfile, Profile
from dpaudit.documents import Claim, Document, Part
from dpaudit.errors import rejected
from dpaudit.evidence import calibrate
from dpaudit.verdict import POWER_NEEDED, wanted

SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_HOPELESS = 0.05  # power below which planning for an alternative is idle
SIZES = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
REFERENCE_MU = 1.0  # what a bound without a claim is planned for


class PlanRow(Part):
    """One number of canaries with one theory."""

    canaries: int
    top: int | None = Field(description="Highest scores to guess in; null: the theory counts no guesses.")
    bottom: int | None
    theory: str
    power: float
    expected_p: float | None = Field(description="p-value at the expected number of errors; null: not counted.")


class PlanDocument(Document):
    """What `dpaudit plan --json` prints."""

    kind: Literal["plan"] = "plan"
    claim: Claim
    alternative: str
    alpha: float
    rows: tuple[PlanRow, ...]
    canaries_needed: dict[str, int | None]
    guesses_to_exceed: int | None


@dataclass(frozen=True)
class Plan:
    """One row: guesses of so many canaries, the power of the claim test and its p-value at the expected errors."""

    canaries: int
    guesses: int
    separate: bool
    power: float
    expected_p: float

    @property
    def top(self) -> int:
        """Highest scores to guess "in"."""
        return math.ceil(self.guesses / 2)

    @property
    def bottom(self) -> int:
        """Lowest scores to guess "out"."""
        return self.guesses // 2


def expected_errors(profile: Profile, canaries: int, guesses: int) -> float:
    """Mean number of wrong guesses when the `guesses` most confident of `canaries` are guessed as well as can be."""
    cut = np.array([1.0 - guesses / canaries])
    return float(profile.error_above(cut)[0]) * canaries


def candidates(canaries: int) -> list[int]:
    """Numbers of guesses worth comparing: fixed shares of the canaries."""
    return sorted({max(1, round(share * canaries)) for share in SHARES if round(share * canaries) <= canaries})


def plan(claim: Claim, *, canaries: int, alpha: float, alternative: Alternative, separate: bool) -> Plan:
    """The number of guesses with the most power against the alternative (then the smallest expected p-value)."""
    truth = alternative_profile(claim, alternative)
    null = null_profile(claim)
    rows = []
    for guesses in candidates(canaries):
        critical = critical_errors(null, canaries=canaries, guesses=guesses, alpha=alpha, separate=separate)
        errors = 0.0 if truth is None else expected_errors(truth, canaries, guesses)
        power = 0.0
        if critical >= 0 and truth is not None:
            power = order_statistic.p_value(truth, canaries=canaries, guesses=guesses, errors=critical)
        game = Game(canaries, guesses, guesses - min(guesses, round(errors)))
        rows.append(Plan(canaries, guesses, separate, power, game.read_by(separate=separate).p_value(null)))
    return max(rows, key=lambda row: (round(row.power, 3), -row.expected_p))


def plan_test(
    claim: Claim, *, canaries: int, alpha: float, share: float, alternative: Alternative, separate: bool
) -> Plan:
    """The guesses of a claim test with this share of its game's evidence: for the alternative where it can be found,
    else for noise that is missing, so that a gross fault does not stay below the level for want of guesses."""
    level = calibrate.level(wanted=wanted(share, alpha))
    words: dict[str, Any] = {"canaries": canaries, "alpha": level, "separate": separate}
    row = plan(claim, alternative=alternative, **words)
    return row if row.power >= _HOPELESS else plan(claim, alternative=0.0, **words)


def table(
    claim: Claim, *, alpha: float, alternative: Alternative, separate: bool, sizes: Sequence[int] = SIZES
) -> list[Plan]:
    """A plan for each number of canaries."""
    return [plan(claim, canaries=n, alpha=alpha, alternative=alternative, separate=separate) for n in sizes]


def canaries_needed(rows: Sequence[Plan], power: float = POWER_NEEDED) -> int | None:
    """The smallest number of canaries in the table with this power; None if none has it."""
    enough = [row.canaries for row in rows if row.power >= power]
    return min(enough) if enough else None


@lru_cache(maxsize=1024)
def bound_guesses(method: str, *, canaries: int, delta: float, confidence: float) -> int:
    """Guesses for a one-run bound without a claim: the best for an ideal attack on a Gaussian with mu = 1.

    method: 'steinke', 'mahloujifar' or 'order-statistic'. Depends on the number of canaries alone.
    """
    truth = GaussianProfile(REFERENCE_MU)

    def bound(guesses: int) -> float:
        errors = min(guesses, round(expected_errors(truth, canaries, guesses)))
        at = {"canaries": canaries, "guesses": guesses, "confidence": confidence}
        if method == "steinke":
            return steinke.epsilon_lower(correct=guesses - errors, delta=delta, **at)
        if method == "mahloujifar":
            return mahloujifar.mu_lower(correct=guesses - errors, **at)
        return order_statistic.mu_lower(errors=errors, **at)

    return max(candidates(canaries), key=bound)


WHITE_BOX = "exact-likelihood"
_PLANNED_GAMES = 200  # simulated for each row: a standard error of at most 3.6 points


def white_box_rows(claim: Claim, *, alpha: float, alternative: Alternative, sizes: Sequence[int]) -> list[PlanRow]:
    """The power of the white-box game as it is played, for each number of canaries; none where it can't be played."""
    event = claimed_event(claim)
    if event is None or alternative == "no-dp":
        return []
    # Here, because every `dpaudit scores` imports this module and none needs scipy.stats for it.
    from dpaudit.evidence.channel import Channel
    from dpaudit.evidence.game import SPARE, Rule
    from dpaudit.evidence.power import white_box_power

    channel = Channel(event.noise_multiplier, event.sample_rate, event.steps, event.epoch)
    rows = []
    for size in sizes:
        rule = Rule(np.arange(size) % 2 == 1, SPARE)
        rng = np.random.default_rng([0, size])
        found = white_box_power(channel, rule, alpha=alpha, scale=float(alternative), rng=rng, games=_PLANNED_GAMES)
        empty = {"top": None, "bottom": None, "expected_p": None}
        rows.append(PlanRow(canaries=size, theory=WHITE_BOX, power=found.value, **empty))
    return rows


def parse_alternative(text: str) -> Alternative:
    """'20%' (sigma 20 % smaller), '0.8' (0.8 of it), 'noise-missing' or 'no-dp'; raises UsageError otherwise."""
    if text == "no-dp":
        return "no-dp"
    if text == "noise-missing":
        return 0.0
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    number = re.fullmatch(r"0?\.\d+", text)
    scale = 1.0 - float(percent[1]) / 100 if percent else float(text) if number else -1.0
    if not 0.0 < scale < 1.0:
        raise rejected("--alternative", text, "20% (sigma smaller by so much), 0.8 (of it), noise-missing or no-dp")
    return scale


def guesses_to_exceed(epsilon: float, *, delta: float, confidence: float, most: int = 10**7) -> int | None:
    """Guesses, all right, with which the assumption-free bound would exceed `epsilon`; None beyond `most`."""

    def shows(guesses: int) -> bool:
        return steinke.ceiling(canaries=guesses, guesses=guesses, delta=delta, confidence=confidence) > epsilon

    # The delta term makes the ceiling fall again for very many canaries, so look upwards by doubling.
    high = 1
    while not shows(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def document(
    claim: Claim, *, alpha: float, alternative: Alternative, sizes: Sequence[int], confidence: float
) -> PlanDocument:
    """The whole plan: both theories, all sizes."""
    theories = {
        name: table(claim, alpha=alpha, alternative=alternative, separate=separate, sizes=sizes)
        for name, separate in (("order-statistic", True), ("f-dp", False))
    }
    rows = [
        PlanRow(
            canaries=row.canaries,
            top=row.top,
            bottom=row.bottom,
            theory=name,
            power=row.power,
            expected_p=row.expected_p,
        )
        for name, plans in theories.items()
        for row in plans
    ]
    white = white_box_rows(claim, alpha=alpha, alternative=alternative, sizes=sizes)
    needed = {name: canaries_needed(plans) for name, plans in theories.items()}
    needed[WHITE_BOX] = min((row.canaries for row in white if row.power >= POWER_NEEDED), default=None)
    return PlanDocument(
        claim=claim,
        alternative=describe_alternative(alternative),
        alpha=alpha,
        rows=(*white, *rows),
        canaries_needed=needed,
        guesses_to_exceed=guesses_to_exceed(claim.epsilon, delta=claim.delta, confidence=confidence),
    )
