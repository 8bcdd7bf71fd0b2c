"""What a claim allows and what the evidence shows, as the numbers of an attacker who asks "was this unit in training?".

Every number is an upper bound of the claimed mechanism where the claim states one, and never more than its eps and
delta alone allow. Kulynych et al. 2024 (arXiv 2407.02191) argue for reading a mechanism by these rates.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.analysis.claim import claimed_event
from dpaudit.documents import Claim, Test
from dpaudit.errors import UsageError

FPRS = (0.01, 0.001)  # at which rates are stated
# A unit that is a person with everything that they gave; any other unit protects a person with several of them less.
PEOPLE = frozenset(
    ("person", "patient", "user", "subject", "participant", "individual", "writer", "author", "speaker", "customer")
)

SHOWN = (0.01, 100.0)  # bounds on eps of which a curve says something: not guessing, and not everything

Floats = npt.NDArray[np.float64]


def event_of(claim: Claim) -> DpSgd | None:
    """The mechanism that the whole claim rests on; None where it is not stated, or covers published tokens as well."""
    return claimed_event(claim) if claim.token_multiplier is None else None


def unit_of(claim: Claim) -> str:
    """The unit in a word or two: 'image' of 'image (with all its questions)'."""
    return claim.unit.partition("(")[0].strip() or claim.unit


def is_person(claim: Claim) -> bool:
    """Whether the unit is named as a person: 'patient', 'patient_id', 'hospital patient', not 'image of a patient'."""
    named = re.split(r"\b(?:of|from|with|in|by)\b", unit_of(claim).lower())[0]
    words = [word for word in re.split(r"[\W_]+", named) if word not in ("", "id", "ids")]
    return bool(words) and (words[-1] in PEOPLE or words[-1].removesuffix("s") in PEOPLE)


def best_guess(claim: Claim) -> float:
    """The largest share of right guesses about one unit's membership (fair coin)."""
    event, stated = event_of(claim), stated_guess(claim.epsilon, claim.delta)
    return stated if event is None else min(stated, accounting.best_guess(event))


def stated_guess(epsilon: float, delta: float) -> float:
    """The same from (eps, delta) alone.

    The rates of any test obey FNR + e^eps FPR >= 1 - delta and FPR + e^eps FNR >= 1 - delta (Kairouz, Oh, Viswanath
    2015, theorem 2.1); their sum gives FPR + FNR >= 2 (1 - delta) / (1 + e^eps), and accuracy = 1 - (FPR + FNR) / 2.
    """
    if math.isinf(epsilon) or epsilon > 700:
        return 1.0
    return min(1.0, (math.exp(epsilon) + delta) / (math.exp(epsilon) + 1))


def largest_tpr(claim: Claim, fpr: Sequence[float] | Floats) -> Floats:
    """The largest true positive rate at each false positive rate: shapes (k,) -> (k,)."""
    event, stated = event_of(claim), accounting.stated_largest_tpr(claim.epsilon, claim.delta, fpr)
    return stated if event is None else np.minimum(stated, accounting.largest_tpr(event, fpr))


def group_losses(claim: Claim, sizes: Sequence[int]) -> dict[int, accounting.GroupLoss]:
    """eps of several units of one person, by their number."""
    event = event_of(claim)
    return {
        k: accounting.stated_group_loss(claim.epsilon, claim.delta, k)
        if event is None
        else accounting.group_loss(event, k, claim.delta)
        for k in sizes
    }


def replacement_loss(claim: Claim) -> accounting.GroupLoss:
    """eps of replacing one unit by another, for a claim about adding, removing or blanking one."""
    event = event_of(claim)
    if event is not None:
        try:
            mechanism = accounting.joint_epsilon([replace(event, relation="replace")], claim.delta)
            return accounting.GroupLoss(mechanism, claim.delta, "mechanism")
        except UsageError:
            pass  # no accountant for it under this relation
    return accounting.stated_group_loss(claim.epsilon, claim.delta, 2)


@dataclass(frozen=True)
class Rates:
    """advantage: largest TPR - FPR; tpr: by false positive rate."""

    advantage: float
    tpr: dict[float, float]


def claimed_rates(claim: Claim) -> Rates:
    """The most that any attack reaches while the claim holds."""
    tpr = largest_tpr(claim, FPRS)
    return Rates(2 * best_guess(claim) - 1, dict(zip(FPRS, (float(rate) for rate in tpr), strict=True)))


def shown_event(claim: Claim | None, within: Test | None) -> DpSgd | None:
    """The least leaky DP-SGD of the claimed q and T that the evidence leaves: its noise is the largest not refuted.

    within: the bound on eps within that family; None where it shows nothing.
    """
    event = event_of(claim) if claim is not None else None
    if event is None or within is None or not SHOWN[0] <= (within.epsilon_lower or 0.0) <= SHOWN[1]:
        return None
    return _with_epsilon(event, float(within.epsilon_lower or 0.0), within.delta)


@lru_cache(maxsize=64)
def _with_epsilon(event: DpSgd, epsilon: float, delta: float) -> DpSgd:
    sigma = accounting.noise_multiplier_for(
        epsilon=epsilon,
        delta=delta,
        sample_rate=event.sample_rate,
        steps=event.steps,
        relation=event.relation,
        sampling=event.sampling,
        epoch=event.epoch,
    )
    return replace(event, noise_multiplier=sigma)


def event_rates(event: DpSgd) -> Rates:
    """Of the best attack on a mechanism."""
    tpr = accounting.largest_tpr(event, FPRS)
    advantage = 2 * accounting.best_guess(event) - 1
    return Rates(advantage, dict(zip(FPRS, (float(rate) for rate in tpr), strict=True)))
