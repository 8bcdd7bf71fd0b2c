"""What one canary game says: bounds with ceilings, score summaries, validity, a gallery.

The error budget 1 - confidence is shared: half for all candidates together, the rest in equal parts for the kinds
(Bonferroni). How many guesses each test makes was written down with the coins.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from attacks.blind import LEAST, blind_baseline
from attacks.canaries import ALL, KINDS, Coins, Game, Plan, check_coins
from attacks.scores import STATISTIC, loss_scores, prioritise, save_scores, standardise
from attacks.training import redraw_game
from dpaudit.analysis.claim import claim_test
from dpaudit.bounds import steinke
from dpaudit.bounds.guesses import count_correct, rank_guesses
from dpaudit.bounds.roc import summarise
from dpaudit.documents import (
    AttackRow,
    Check,
    Claim,
    Extraction,
    LedgerDocument,
    Regeneration,
    ScoreSummary,
    Test,
    Thumbnail,
    Validity,
)
from dpaudit.errors import InvalidGame
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.run import load_model, read_config

GAME = "canaries"
TITLE = "canaries: all kinds"
PER_KIND = 4  # pictures of each kind in the gallery
SIDE = 384  # pixels of such a picture at most: a page shows it smaller still
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CanaryAudit:
    """The parts of an audit document that the canary game fills."""

    validity: Validity
    tests: tuple[Test, ...] = ()
    scores: tuple[ScoreSummary, ...] = ()
    gallery: tuple[Thumbnail, ...] = ()
    coins_sha256: str | None = None
    attacks: tuple[AttackRow, ...] = ()
    exposure: tuple[Extraction, ...] = ()
    regeneration: tuple[Regeneration, ...] = ()


def unsound(name: str, problem: str) -> CanaryAudit:
    """The audit of a game that must not be scored: no test, no number, only the reason."""
    check = Check(name=name, status="fail", measured=problem, allowed="an unedited game", explanation=problem)
    return CanaryAudit(Validity(sound=False, checks=(check,)))


def audit_canaries(
    run: RunFolder, *, claim: Claim | None, delta: float, confidence: float, alpha: float, device: str = "auto"
) -> CanaryAudit:
    """Score the canaries of a finished run, bound eps at `delta` (all bounds together with `confidence`) and test the
    claim, if there is one, at level `alpha`.

    Writes private/scores.parquet. A game that is unsound (edited coins, other data, scores that don't fit) comes back
    with `validity.sound` False and without a single number.
    """
    try:
        coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
        game = _redraw(run, coins)
        game.check_against(coins)
        frame = loss_scores(run, game, device=device)
    except InvalidGame as error:
        return unsound("coins and scores", str(error))
    save_scores(run, frame)
    validity = _validity(game, coins)
    if not validity.sound:
        return CanaryAudit(validity, coins_sha256=coins.sha256)
    small = too_small(frame, coins.plan, confidence=confidence, delta=delta)
    if small is not None:
        return CanaryAudit(validity.model_copy(update={"checks": (*validity.checks, small)}), coins_sha256=coins.sha256)
    tests = bound_tests(frame, coins.plan, confidence=confidence, delta=delta)
    if claim is not None:
        tests += claim_tests(frame, coins.plan, claim=claim, confidence=confidence, alpha=alpha)
    return CanaryAudit(
        validity=validity,
        tests=tests,
        scores=summaries(frame),
        gallery=gallery(game),
        coins_sha256=coins.sha256,
    )


def _redraw(run: RunFolder, coins: Coins) -> Game:
    config = read_config(run)
    dataset = data.load(config.data)
    base = load_model(None, "cpu", config=config)
    game = redraw_game(config, dataset, Key.load(run.noise_key), base, coins)
    if game is None:
        raise InvalidGame(f"{run.path}: the configuration says no canaries, but there are coins")
    return game


def _validity(game: Game, coins: Coins) -> Validity:
    checks = [
        Check(
            name="coins",
            status="pass",
            measured=f"SHA-256 {coins.sha256[:16]}…",
            allowed="the hash in the ledger",
            explanation="The coins are those hashed before the first step, and candidates and coins are what the run's "
            "key and data give.",
        )
    ]
    baseline = blind_baseline(
        [canary.unit for canary in game.candidates],
        [canary.member for canary in game.candidates],
        kinds=[canary.kind for canary in game.candidates],
        seed=coins.plan.tie_seed,
    )
    if baseline is not None:
        checks.append(baseline.check())
    else:
        checks.append(
            Check(
                name="blind baseline",
                status="not applicable",
                measured=f"{len(game.candidates)} candidates",
                allowed=f"at least {LEAST}, of both classes",
                explanation="Too few candidates to fit a classifier that never sees the model.",
            )
        )
    return Validity(sound=all(check.status != "fail" for check in checks), checks=tuple(checks))


LEAST_CEILING = 0.5  # eps; a game that can't show even this says nothing, whatever comes out


def too_small(frame: pd.DataFrame, plan: Plan, *, confidence: float, delta: float) -> Check | None:
    """Why a game with so few candidates gets no number at all; None for one that could show something."""
    kinds = list(dict.fromkeys(frame["kind"]))
    level = _confidences(confidence, kinds)[ALL]
    m, r = len(frame), sum(plan.guesses[ALL])
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


def _confidences(confidence: float, kinds: list[str]) -> dict[str, float]:
    """Confidence of each test, so that all hold together with `confidence`. One kind needs no test of its own."""
    if len(kinds) < 2:
        return {ALL: confidence}
    error = 1.0 - confidence
    return {ALL: 1.0 - error / 2} | {kind: 1.0 - error / 2 / len(kinds) for kind in kinds}


def _ranked(frame: pd.DataFrame, plan: Plan) -> Floats:
    """The scores that all tests rank: the same for each of them, ties settled by the seed stored with the coins."""
    return prioritise(frame, plan.guesses, np.random.default_rng([plan.tie_seed]))


def title_of(title: str, kinds: list[str]) -> str:
    """The name of the test on all candidates: 'canaries: all kinds', 'membership: record'."""
    return f"{title}: {kinds[0]}" if title != GAME and len(kinds) == 1 else f"{title}: all kinds"


def bound_tests(
    frame: pd.DataFrame,
    plan: Plan,
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
    scores = _ranked(frame, plan)
    kinds = list(dict.fromkeys(frame["kind"]))
    tests = []
    for place, (name, level) in enumerate(_confidences(confidence, kinds).items()):
        mine = np.ones(len(frame), dtype=bool) if name == ALL else (frame["kind"] == name).to_numpy()
        top, bottom = plan.guesses[name]
        rng = np.random.default_rng([plan.tie_seed, place])
        guesses = rank_guesses(scores[mine], top, bottom, rng=rng)
        correct = count_correct(guesses, frame["member"].to_numpy()[mine])
        m, r = int(mine.sum()), top + bottom
        tests.append(
            Test(
                name=title_of(title, kinds) if name == ALL else f"{title}: {name}",
                statistic=statistic + (", ranked within each kind" if name == ALL and len(kinds) > 1 else ""),
                bound="steinke",
                assumes="none",
                selection=f"fixed with the coins: the {top} highest scores guessed in, the {bottom} lowest out",
                confidence=level,
                delta=delta,
                n=m,
                guesses=r,
                correct=correct,
                epsilon_lower=steinke.epsilon_lower(
                    canaries=m, guesses=r, correct=correct, delta=delta, confidence=level
                ),
                ceiling=steinke.ceiling(canaries=m, guesses=r, delta=delta, confidence=level),
            )
        )
    return tuple(tests)


def claim_tests(
    frame: pd.DataFrame,
    plan: Plan,
    *,
    claim: Claim,
    confidence: float,
    alpha: float,
    title: str = GAME,
    statistic: str = STATISTIC,
) -> tuple[Test, ...]:
    """The same guesses on all candidates, put to the claimed mechanism itself (dpaudit.analysis.claim).

    Canaries of a black-box game meet in the same weights, so the f-DP test decides, and its power stays unknown: what
    an ideal attacker would find says nothing about this one.
    """
    top, bottom = plan.guesses[ALL]
    return tuple(
        claim_test(
            _ranked(frame, plan),
            frame["member"].to_numpy(dtype=bool),
            claim=claim,
            top=top,
            bottom=bottom,
            rng=np.random.default_rng([plan.tie_seed, 0]),  # as in bound_tests: one game, one set of guesses
            name=title_of(title, list(dict.fromkeys(frame["kind"]))),
            statistic=statistic,
            alpha=alpha,
            confidence=confidence,
            separate=False,
            alternative=1.0 - plan.sigma_reduction,
        )
    )


def summaries(frame: pd.DataFrame) -> tuple[ScoreSummary, ...]:
    """Histograms and ROC of all candidates (standardised) and of each kind (loss differences, in nats)."""
    scores = frame["score"].to_numpy(dtype=np.float64)
    kinds = list(dict.fromkeys(frame["kind"]))
    parts = [(TITLE, standardise(frame), np.ones(len(frame), dtype=bool))] if len(kinds) > 1 else []
    parts += [(f"canaries: {kind}", scores, (frame["kind"] == kind).to_numpy()) for kind in kinds]
    members = frame["member"].to_numpy(dtype=bool)
    return tuple(
        summarise(name, values[mine], members[mine])
        for name, values, mine in parts
        if 0 < members[mine].sum() < mine.sum()
    )


def gallery(game: Game) -> tuple[Thumbnail, ...]:
    """The first candidates of each synthetic kind, members or not. Real people's pictures are never shown."""
    shown: list[Thumbnail] = []
    for kind in dict.fromkeys(canary.kind for canary in game.candidates):
        if not KINDS[kind].synthetic:
            continue
        for canary in [item for item in game.candidates if item.kind == kind][:PER_KIND]:
            picture = canary.unit.pictures[0]
            out = io.BytesIO()
            shown_small = Image.fromarray(picture.pixels)
            shown_small.thumbnail((SIDE, SIDE))
            shown_small.save(out, "PNG", optimize=True)
            shown.append(
                Thumbnail(
                    caption=KINDS[kind].description,
                    kind=kind,
                    png_base64=base64.b64encode(out.getvalue()).decode("ascii"),
                    question=picture.questions[0].text,
                    answer=picture.questions[0].answer,
                )
            )
    return tuple(shown)
