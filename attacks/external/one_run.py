"""Tests of a game in which candidates meet in one training: guesses planned from counts, bound and claim test.

Shared by the canary game on a trainer and the audit of a model with its owner's coins.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.canaries import ALL, Plan
from attacks.canary_audit import bound_tests
from dpaudit.analysis.claim import claim_test, claimed_event
from dpaudit.analysis.plan import bound_guesses, plan
from dpaudit.documents import Claim, Test

SIGMA_REDUCTION = 0.3  # the wrong claim to look for: the true sigma is so much smaller
DECIDING = 1  # tests of the claim that one such game makes

Floats = npt.NDArray[np.float64]


def claim_key(kind: str) -> str:
    """The plan's entry for the claim test of a kind; the kind itself is the entry of the bound."""
    return f"{kind}: claim"


def guesses(kind: str, count: int, claim: Claim, *, confidence: float, alpha: float) -> dict[str, tuple[int, int]]:
    """How many of the highest and lowest scores each test will guess: from counts and the claim, before any score."""
    r = bound_guesses("steinke", canaries=count, delta=claim.delta, confidence=confidence)
    bound = (r - r // 2, r // 2)
    if claimed_event(claim) is None:
        return {kind: bound, claim_key(kind): bound}
    row = plan(claim, canaries=count, alpha=alpha, alternative=1 - SIGMA_REDUCTION, separate=False)
    return {kind: bound, claim_key(kind): (row.top, row.bottom)}


def tests(
    frame: pd.DataFrame,
    plans: Plan,
    claim: Claim,
    *,
    title: str,
    statistic: str,
    confidence: float,
    alpha: float,
) -> tuple[Test, ...]:
    """The assumption-free bound and the tests of the claim. frame: id, kind (one), member, score.

    Candidates meet in the same weights, so the f-DP test decides, and its power is not known: what an ideal attacker
    would find says nothing about these scores.
    """
    kind = str(frame["kind"].iloc[0])
    bound = plans.guesses[kind]
    one_kind = Plan({ALL: bound, kind: bound}, plans.tie_seed)
    found = bound_tests(frame, one_kind, confidence=confidence, delta=claim.delta)
    top, bottom = plans.guesses[claim_key(kind)]
    found += tuple(
        claim_test(
            frame["score"].to_numpy(),
            frame["member"].to_numpy(dtype=bool),
            claim=claim,
            top=top,
            bottom=bottom,
            rng=np.random.default_rng([plans.tie_seed, 1]),
            alpha=alpha,
            confidence=confidence,
            separate=False,
            alternative=1 - plans.sigma_reduction,
        )
    )
    return tuple(test.model_copy(update={"name": title, "statistic": statistic}) for test in found)


def finite(values: Floats) -> Floats:
    """Infinite scores become the highest or lowest, NaN the lowest: ranks are all that counts."""
    good = np.isfinite(values)
    low, high = (float(values[good].min()), float(values[good].max())) if good.any() else (0.0, 0.0)
    return np.where(good, values, np.where(values == np.inf, high + 1.0, low - 1.0))
