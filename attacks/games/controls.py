"""Controls of the white-box game: what shows that it could have seen something.

Liveness: under frozen noise an injected gradient moves the release by exactly its clipped size along its own direction,
and nothing along the others. One that moves it by more, and nothing else, is a counterexample to the sensitivity C that
the claim's proof assumes ("broken"): no chance is involved. Arrival: over the whole game, in the steps that took a
canary, what its direction shows is 1 in units of C on average (a channel that dies later, or lets through a part, shows
less). Noise level: the directions without canaries show the claimed noise; more means that something blurs the channel,
so that the power does not hold. Records: the known records, which do not enter by `inject`, arrive once, clipped to C
(dpaudit.evidence.records). Independent steps: no two steps show the same along those directions. Law of the noise:
coordinates are as a normal law spreads them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit.documents import Check, Control
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.evidence.places import ERRORS, KURTOSIS, PlacedNoise
from dpaudit.evidence.records import ERROR, Records
from dpaudit.evidence.records import WIDEST as RECORDS_WIDEST
from dpaudit.evidence.steps import LEVEL, dependence

Floats = npt.NDArray[np.float64]

LIVE_STEPS = 3  # steps of a training in which liveness is checked; each costs the noise of one more step
TOLERANCE = 0.02  # of C: the most that rounding of a large model may move the release along other directions
EXACT = 0.002  # of C: how far an arrival may lie below 1 where rounding shows nowhere else
DEAD = 0.5  # a canary that moves the release by less of C did not arrive
Z = 4.5  # two-sided 7e-6: how far the mean arrival of a correct channel may lie from 1
WIDEST = 0.25  # half-width of the arrival's interval that still says something


@dataclass(frozen=True)
class Liveness:
    """One comparison under frozen noise: the least and the most that a taken canary moved the release along its
    direction, the most that anything moved along another one (all in units of C), and where."""

    least: float
    most: float
    elsewhere: float
    where: str

    @classmethod
    def of(cls, moved: Floats, taken: npt.NDArray[np.intp], where: str) -> "Liveness":
        """moved: (m + K,) along all directions; taken: the canaries that should have moved it."""
        own = moved[taken]
        rest = np.delete(moved, taken)
        if not np.isfinite(moved).all():
            return cls(0.0, math.inf, math.inf, where)
        return cls(float(own.min()), float(own.max()), float(np.abs(rest).max()) if rest.size else 0.0, where)


@dataclass
class Arrived:
    """Running mean of what the directions of taken canaries show."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Floats) -> None:
        """Of one step."""
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    def interval(self, sigma: float) -> tuple[float, float]:
        """Of the mean arrival, by the larger of the claimed and the measured spread."""
        if self.count < 2:
            return -math.inf, math.inf
        mean = self.total / self.count
        spread = math.sqrt(max(sigma**2, self.squares / self.count - mean**2) / self.count)
        return mean - Z * spread, mean + Z * spread


def judge_liveness(seen: Sequence[Liveness], arrived: Arrived, sigma: float) -> list[Control]:
    """The controls "liveness" and "amplitude"."""
    found = []
    if seen:
        worst = min(seen, key=lambda item: item.least)
        most = max(item.most for item in seen)
        elsewhere = max(item.elsewhere for item in seen)
        outcome = "earned"
        text = "An injected gradient moves the release by exactly its clipped size."
        loud = most > 1 + TOLERANCE or elsewhere > TOLERANCE
        # What moves elsewhere is the error of one direction: `elsewhere` is the largest of hundreds of its kind.
        if elsewhere <= TOLERANCE and 1 + TOLERANCE + elsewhere < most < math.inf:
            outcome = "broken"
            text = (
                "An injected gradient moves the release by more than C: clipping does not hold, or inject bypasses it."
            )
            if worst.least > most - TOLERANCE:  # those of norm C as well, which nothing has to clip
                text = (
                    "Every injected gradient moves the release by more than C: clipping does not hold, or released() "
                    "is not the noisy sum over expected_batch_size."
                )
        elif loud and math.isfinite(most):  # what arrives too loudly somewhere is no dead channel
            outcome, text = (
                "not earned",
                "An injected gradient moves the release by more than C, or along other directions: clipping does not "
                "hold, or equal steps differ by more than the gradient.",
            )
        elif most < -DEAD:
            outcome, text = (
                "failed",
                "inject: the injected gradient arrives with its sign turned: released() is the sum of the clipped "
                "gradients, not its negative.",
            )
        elif worst.least < DEAD:
            outcome, text = (
                "failed",
                "inject: the injected gradient does not arrive in the release, so this game sees nothing.",
            )
        elif worst.least < 1 - max(EXACT, elsewhere):
            outcome, text = "not earned", "An injected gradient arrives in part only."
        measured = f"moved by {worst.least:.4f} to {most:.4f} C along its direction, {elsewhere:.4f} C along others"
        found.append(
            control("liveness", outcome, f"{measured} ({', '.join(item.where for item in seen)})", "1 C, 0 C", text)
        )
    if arrived.count:
        low, high = arrived.interval(sigma)
        outcome, text = "earned", "Over the whole game canaries arrive in full."
        if high < DEAD:
            outcome = "failed"
            text = "inject: canaries do not arrive in the release over the game as a whole, so it sees nothing."
        elif not low <= 1 <= high or high - low > 2 * WIDEST:
            outcome, text = (
                "not earned",
                "Canaries do not arrive as the claimed mechanism allows, or too few arrived to tell.",
            )
        measured = f"{low:.3f} to {high:.3f} C in {arrived.count} arrivals"
        if low <= 1 <= high and high - low > 2 * WIDEST:
            enough = math.ceil(arrived.count * ((high - low) / (2 * WIDEST)) ** 2)
            measured += f"; about {enough:,} would tell: more canaries (a wider model) or steps"
        found.append(control("amplitude", outcome, measured, f"1 C, known to {WIDEST:g}", text))
    if not found:
        text = "No canary was taken by any step: nothing shows that one would have been seen."
        found.append(control("liveness", "not earned", "no canary was taken", "1 C", text))
    return found


def noise_control(noise: NoiseLevel, spare: int) -> Control:
    """The control "noise level"."""
    low, high = noise.interval()
    outcome, text = "earned", "Directions without canaries show the claimed noise and nothing else."
    if low > 1:
        outcome = "not earned"
        text = "Directions without canaries show more than the claimed noise: other records blur what the game sees."
    elif high < 1:
        outcome, text = "not earned", "Directions without canaries show less noise than the claim."
    measured = f"{noise.ratio:.4f} times the claim ({low:.4f} to {high:.4f}), {spare} directions"
    return control("noise level", outcome, measured, "an interval that holds 1", text)


def records_control(records: Records, sigma: float, noise: NoiseLevel | None) -> list[Control]:
    """The control "records"; none where the interval holds 1 and is too wide to say anything.

    noise: of the spare directions, by whose upper limit the interval is widened where it lies above the claim.
    """
    seen = records.arrival(sigma, 1.0 if noise is None else noise.upper(ERROR))
    if seen is None or not (seen.deviates or seen.known):
        return []
    outcome, text = "earned", "Records arrive once, clipped as the claim says."
    if seen.deviates:
        outcome = "not earned"
        text = (
            f"Records arrive as {seen.estimate:.3g} times what gradient() clipped to C says: clipping or counting of "
            "records is not as claimed, or gradient() is not what is trained."
        )
    measured = f"{seen.low:.3f} to {seen.high:.3f} times the predicted sum, {seen.steps} batches"
    return [control("records", outcome, measured, f"1, known to {RECORDS_WIDEST:g}", text)]


def steps_control(empty: Floats) -> list[Control]:
    """The control "independent steps"; none for a single step. empty: (T, K), what the spare directions show."""
    seen = dependence(empty)
    if seen is None:
        return []
    outcome, text = "earned", "No two steps share their noise."
    if seen.found:
        outcome = "not earned"
        text = "Steps share something along directions without canaries: noise that is not new, or records that blur."
    measured = f"{seen.seen} (p = {seen.p_value:.2g})"
    return [control("independent steps", outcome, measured, f"p of at least {LEVEL:g}", text)]


def law_control(places: PlacedNoise) -> list[Control]:
    """The control "law of the noise"; none where too few values were seen."""
    seen = places.law()
    if seen is None:
        return []
    outcome, text = "earned", "Coordinates of the noise spread as a normal law does."
    if seen.p_value == 0.0:
        outcome = "not earned"
        text = "The noise is not normal, as the claim says it is: what its size means for privacy is not known."
    return [control("law of the noise", outcome, seen.seen, f"within {KURTOSIS:g} or {ERRORS:g} standard errors", text)]


def finite_check(found: str) -> Check:
    """The failed check of a game with a release that can't be read."""
    return Check(
        name="finite releases",
        status="fail",
        measured=found,
        allowed="finite numbers in every release",
        explanation=f"A release can't be read: {found}. No noise, and nothing else, can be measured in it.",
    )


def as_check(control: Control) -> Check:
    """A control as a check of the game's validity: a dead channel makes the game invalid. One that is broken speaks of
    the training (dpaudit.verdict), not of the game."""
    found = {"earned": "pass", "not earned": "not applicable", "failed": "fail", "broken": "not applicable"}
    status = found[control.outcome]
    return Check(
        name=control.name,
        status=status,  # type: ignore[arg-type]
        measured=control.measured,
        allowed=control.allowed,
        explanation=control.explanation,
    )


def control(name: str, outcome: str, measured: str, allowed: str, explanation: str) -> Control:
    return Control(name=name, outcome=outcome, measured=measured, allowed=allowed, explanation=explanation)  # type: ignore[arg-type]
