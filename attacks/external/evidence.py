"""Evidence from independent trainings as an e-process: audits repeated on other days merge by multiplying.

Each training is a fair coin and a guess. Under the claim, guesses obey P[right] <= e^eps' P[wrong] + delta(eps') for
every point (eps', delta(eps')) of the claimed privacy curve (dpaudit.bounds.sequential), so a bet against each point is
an e-process and so is their average. A guess is made from the trainings before it alone, which is what makes the
process valid at whatever run one stops.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit import accounting
from dpaudit.analysis.claim import claimed_event
from dpaudit.bounds.sequential import Betting, merge_by_averaging
from dpaudit.documents import Claim

Floats = npt.NDArray[np.float64]

LEAST_PAST = 2  # runs of each class before the first guess
POINTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Evidence:
    """e_value: evidence now. p_value: anytime-valid, 1 / the largest e-value so far. guesses made, and right ones."""

    e_value: float
    p_value: float
    guesses: int
    right: int


def privacy_curve(claim: Claim) -> list[tuple[float, float]]:
    """(eps', delta(eps')) below and at the claim: of the claimed mechanism, or of (eps, delta) alone."""
    epsilon = float(claim.epsilon)
    points = [*(point for point in POINTS if point < epsilon), epsilon]
    event = claimed_event(claim)
    if event is None:
        # Of the worst pair that is (eps, delta)-DP (Kairouz, Oh, Viswanath 2015).
        spread = math.exp(-epsilon)
        return [(p, claim.delta + (1 - claim.delta) * (1 - math.exp(p - epsilon)) / (1 + spread)) for p in points]
    losses = [accounting.discrete_losses(event, direction) for direction in ("remove", "add")]
    found = []
    for point in points:
        deltas = [
            float(np.sum(item.probabilities * np.clip(-np.expm1(point - item.losses), 0.0, None))) + item.infinity_mass
            for item in losses
        ]
        found.append((point, min(max(*deltas, 1e-12), 1 - 1e-12)))
    return found


def guess_in_order(scores: Floats, members: npt.NDArray[np.bool_]) -> list[int]:
    """1 (in), -1 (out) or 0 (too early to say) for each run, from the scores and coins of the runs before it.

    The threshold is the middle between the mean scores of the two classes so far.
    """
    out: list[int] = []
    for index in range(len(scores)):
        inside, outside = scores[:index][members[:index]], scores[:index][~members[:index]]
        if min(len(inside), len(outside)) < LEAST_PAST:
            out.append(0)
            continue
        high, low = float(inside.mean()), float(outside.mean())
        # Members that score lower than non-members turn the guess round: the adversary learns that from the past.
        out.append(1 if (scores[index] > (high + low) / 2) == (high >= low) else -1)
    return out


def gather(scores: Floats, members: npt.NDArray[np.bool_], claim: Claim) -> Evidence:
    """The e-process over the runs in their order. scores, members: (n,)."""
    guessed = guess_in_order(scores, members)
    truth = np.where(members, 1, -1)
    states = [Betting(epsilon, delta) for epsilon, delta in privacy_curve(claim)]
    best = value = 1.0
    for guess, side in zip(guessed, truth, strict=True):
        states = [state.after(0 if guess == 0 else 1 if guess == side else -1) for state in states]
        value = merge_by_averaging([state.e_value for state in states])
        best = max(best, value)
    made = [guess == side for guess, side in zip(guessed, truth, strict=True) if guess]
    return Evidence(value, min(1.0, 1 / best), len(made), sum(made))
