"""From scores and coins to tests: one way for every game whose channel is not known exactly.

Candidates may meet in the same weights, so the f-DP theorem decides about the claim, and no power is stated: what an
ideal attacker would find says nothing about these scores. How many guesses each test makes was written down with the
coins.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.canaries import ALL, Plan
from attacks.games.played import Played, sound, unsound
from attacks.scores import STATISTIC, prioritise
from dpaudit.analysis.claim import claim_test, claimed_event
from dpaudit.analysis.plan import bound_guesses, plan_test
from dpaudit.analysis.scores import sign_check
from dpaudit.bounds import steinke
from dpaudit.bounds.guesses import count_correct, rank_guesses
from dpaudit.bounds.roc import summarise
from dpaudit.documents import Check, Claim, Test

GAME = "canaries"
LEAST_CEILING = 0.5  # eps; a game that can't show even this says nothing, whatever comes out
# Of the evidence of one file of coins: the canaries' losses, membership inference on the same records, and a tenth that
# is not staked. Fixed whether or not both games are played.
SHARE = 0.45
SHARE_ALONE = 0.9  # of a game that has coins of its own
SIGMA_REDUCTION = 0.3  # the wrong claim to plan for: the true sigma is so much smaller

Floats = npt.NDArray[np.float64]


def confidences(confidence: float, kinds: list[str]) -> dict[str, float]:
    """Confidence of each bound, so that all hold together with `confidence`. One kind needs no bound of its own.

    Half of the error belongs to all candidates together, the rest in equal parts to the kinds (Bonferroni).
    """
    if len(kinds) < 2:
        return {ALL: confidence}
    error = 1.0 - confidence
    return {ALL: 1.0 - error / 2} | {kind: 1.0 - error / 2 / len(kinds) for kind in kinds}


def title_of(title: str, kinds: list[str]) -> str:
    """The name of the test on all candidates: 'canaries: all kinds', 'membership: record'."""
    return f"{title}: {kinds[0]}" if title != GAME and len(kinds) == 1 else f"{title}: all kinds"


def bound_tests(
    frame: pd.DataFrame,
    guesses: Plan,
    *,
    confidence: float,
    delta: float,
    title: str = GAME,
    statistic: str = STATISTIC,
) -> tuple[Test, ...]:
    """One-run bounds (Steinke et al. 2023) for all candidates and for each kind, guesses as planned.

    frame: id, kind, member, score. title, statistic: of the game, in words. Valid because coins are fair and
    independent, each guess count was fixed before the scores existed, and the guesses are a function of scores and
    kinds, never of coins.
    """
    scores = prioritise(frame, guesses.guesses, np.random.default_rng([guesses.tie_seed]))
    members = frame["member"].to_numpy(dtype=bool)
    kinds = list(dict.fromkeys(frame["kind"]))
    tests = []
    for place, (name, level) in enumerate(confidences(confidence, kinds).items()):
        mine = np.ones(len(frame), dtype=bool) if name == ALL else (frame["kind"] == name).to_numpy()
        bound = one_run_bound(
            scores[mine],
            members[mine],
            guesses.guesses[name],
            delta=delta,
            confidence=level,
            rng=np.random.default_rng([guesses.tie_seed, place]),
        )
        named = {
            "name": title_of(title, kinds) if name == ALL else f"{title}: {name}",
            "statistic": statistic + (", ranked within each kind" if name == ALL and len(kinds) > 1 else ""),
        }
        tests.append(bound.model_copy(update=named))
    return tuple(tests)


def one_run_bound(
    scores: Floats,
    members: npt.NDArray[np.bool_],
    guesses: tuple[int, int],
    *,
    delta: float,
    confidence: float,
    rng: np.random.Generator,
) -> Test:
    """The assumption-free bound of one set of candidates; (top, bottom) guesses fixed beforehand, ties broken by
    `rng`."""
    top, bottom = guesses
    correct = count_correct(rank_guesses(scores, top, bottom, rng=rng), members)
    m, r = len(scores), top + bottom
    at: dict[str, Any] = {"canaries": m, "guesses": r, "delta": delta, "confidence": confidence}
    return Test(
        name=GAME,
        statistic=STATISTIC,
        bound="steinke",
        assumes="none",
        selection=f"fixed before training: the {top} highest scores guessed in, the {bottom} lowest out",
        confidence=confidence,
        delta=delta,
        n=m,
        guesses=r,
        correct=correct,
        epsilon_lower=steinke.epsilon_lower(correct=correct, **at),
        ceiling=steinke.ceiling(**at),
    )


def claim_tests(
    frame: pd.DataFrame,
    guesses: Plan,
    *,
    claim: Claim,
    confidence: float,
    alpha: float,
    share: float = SHARE,
    key: str = ALL,
    title: str = GAME,
    statistic: str = STATISTIC,
) -> tuple[Test, ...]:
    """The guesses `guesses.guesses[key]` on all candidates, put to the claimed mechanism itself
    (dpaudit.analysis.claim)."""
    top, bottom = guesses.guesses[key]
    return tuple(
        claim_test(
            prioritise(frame, guesses.guesses, np.random.default_rng([guesses.tie_seed]))
            if key == ALL
            else frame["score"].to_numpy(dtype=np.float64),
            frame["member"].to_numpy(dtype=bool),
            claim=claim,
            top=top,
            bottom=bottom,
            rng=np.random.default_rng([guesses.tie_seed, 0]),
            name=title_of(title, list(dict.fromkeys(frame["kind"]))) if title == GAME or key == ALL else title,
            statistic=statistic,
            alpha=alpha,
            share=share,
            confidence=confidence,
        )
    )


def claim_key(kind: str) -> str:
    """The plan's entry for the claim test of a kind; the kind itself is the entry of the bound."""
    return f"{kind}: claim"


def planned(kind: str, count: int, claim: Claim, *, confidence: float, alpha: float) -> dict[str, tuple[int, int]]:
    """How many of the highest and lowest scores each test will guess: from counts and the claim, before any score."""
    r = bound_guesses("steinke", canaries=count, delta=claim.delta, confidence=confidence)
    bound = (r - r // 2, r // 2)
    if claimed_event(claim) is None:
        return {kind: bound, claim_key(kind): bound}
    wrong = 1 - SIGMA_REDUCTION
    row = plan_test(claim, canaries=count, alpha=alpha, share=0.9, alternative=wrong, separate=False)
    return {kind: bound, claim_key(kind): (row.top, row.bottom)}


def one_kind_tests(
    frame: pd.DataFrame, plan: Plan, *, claim: Claim, confidence: float, alpha: float, title: str, statistic: str
) -> tuple[Test, ...]:
    """Bound and claim test of a game of one kind of candidates, its guesses as `planned`; all bear the game's title.

    The claim test alone stakes evidence of these coins; a tenth is not staked.
    """
    kind = str(frame["kind"].iloc[0])
    plan = Plan({ALL: plan.guesses[kind], **plan.guesses}, plan.tie_seed)
    words = {"title": title, "statistic": statistic}
    at: dict[str, Any] = {"share": SHARE_ALONE, "key": claim_key(kind), **words}
    tests = (
        *bound_tests(frame, plan, confidence=confidence, delta=claim.delta, **words),
        *claim_tests(frame, plan, claim=claim, confidence=confidence, alpha=alpha, **at),
    )
    return tuple(test.model_copy(update={"name": title}) for test in tests)


def read_scores(
    frame: pd.DataFrame,
    checks: Sequence[Check],
    tests: Callable[[], tuple[Test, ...]],
    *,
    title: str,
    **about: Any,
) -> Played:
    """Scores of one kind as a game: validity first, and no number of an unsound one. about: further fields of it."""
    scores, members = frame["score"].to_numpy(dtype=np.float64), frame["member"].to_numpy(dtype=bool)
    if not 0 < members.sum() < members.size:
        return unsound(f"{frame['kind'].iloc[0]} coins", f"all {members.size} coins fell on one side; audit again")
    validity = sound([*checks, sign_check(scores, members)])
    if not validity.sound:
        return Played(validity, **about)
    return Played(validity, tests(), scores=(summarise(title, scores, members),), **about)


def too_small(frame: pd.DataFrame, guesses: Plan, *, confidence: float, delta: float) -> Check | None:
    """Why a game with so few candidates gets no number at all; None for one that could show something."""
    kinds = list(dict.fromkeys(frame["kind"]))
    level = confidences(confidence, kinds)[ALL]
    m, r = len(frame), sum(guesses.guesses[ALL])
    top = steinke.ceiling(canaries=m, guesses=r, delta=delta, confidence=level) if r else 0.0
    if top >= LEAST_CEILING:
        return None
    share = r / m if m else 0.2
    enough = next(size for size in range(10, 10**6, 10)
                  if steinke.ceiling(canaries=size, guesses=max(1, int(share * size)), delta=delta, confidence=level)
                  >= LEAST_CEILING)  # fmt: skip
    return Check(
        name="number of candidates",
        status="not applicable",
        measured=f"{m} candidates, {r} guesses: at most eps = {top:.2f} could be shown",
        allowed=f"at least {enough} candidates of these kinds",
        explanation="So few candidates show nothing, whatever the model leaks: no bound and no rate is computed.",
    )


def finite(values: Floats) -> Floats:
    """Infinite scores become the highest or lowest, NaN the lowest: ranks are all that counts."""
    good = np.isfinite(values)
    low, high = (float(values[good].min()), float(values[good].max())) if good.any() else (0.0, 0.0)
    return np.where(good, values, np.where(values == np.inf, high + 1.0, low - 1.0))
