"""The canary game of a finished run: losses of its candidates, read against their coins."""

import base64
import io

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from attacks.blind import blind_check, features
from attacks.canaries import KINDS, Coins, Game, check_coins
from attacks.games.played import Played, coins_check, sound, unsound
from attacks.games.reading import GAME, SIGMA_REDUCTION, bound_tests, claim_tests, too_small
from attacks.scores import loss_scores, save_scores, standardise
from attacks.training import redraw_game
from dpaudit.analysis.claim import describe_alternative
from dpaudit.analysis.scores import sign_check
from dpaudit.bounds.roc import summarise
from dpaudit.documents import Check, Claim, LedgerDocument, ScoreSummary, Thumbnail
from dpaudit.errors import InvalidGame
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.run import load_model, read_config

Floats = npt.NDArray[np.float64]
TITLE = f"{GAME}: all kinds"
GENUINE = (
    "The coins are those hashed before the first step, and candidates and coins are what the run's key and data give."
)
PER_KIND = 4  # pictures of each kind in the gallery
SIDE = 384  # pixels of such a picture at most: a page shows it smaller still


def play_canaries(
    run: RunFolder, *, claim: Claim | None, delta: float, confidence: float, alpha: float, device: str = "auto"
) -> Played:
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
    checks = _checks(game, coins)
    members = frame["member"].to_numpy(dtype=bool)
    if 0 < members.sum() < members.size:
        checks.append(sign_check(standardise(frame), members))
    if not sound(checks).sound:
        return Played(sound(checks), coins_sha256=coins.sha256)
    small = too_small(frame, coins.plan, confidence=confidence, delta=delta)
    if small is not None:
        return Played(sound([*checks, small]), coins_sha256=coins.sha256)
    tests = bound_tests(frame, coins.plan, confidence=confidence, delta=delta)
    if claim is not None:
        tests += claim_tests(frame, coins.plan, claim=claim, confidence=confidence, alpha=alpha)
    return Played(
        validity=sound(checks),
        tests=tests,
        scores=summaries(frame),
        gallery=gallery(game),
        coins_sha256=coins.sha256,
        alternative=describe_alternative(1 - SIGMA_REDUCTION) if claim is not None else None,
    )


def _redraw(run: RunFolder, coins: Coins) -> Game:
    config = read_config(run)
    dataset = data.load(config.data)
    base = load_model(None, "cpu", config=config)
    game = redraw_game(config, dataset, Key.load(run.noise_key), base, coins)
    if game is None:
        raise InvalidGame(f"{run.path}: the configuration says no canaries, but there are coins")
    return game


def _checks(game: Game, coins: Coins) -> list[Check]:
    units, kinds = [canary.unit for canary in game.candidates], [canary.kind for canary in game.candidates]
    members = [canary.member for canary in game.candidates]
    return [
        coins_check(coins.sha256, GENUINE),
        blind_check(features(units), members, kinds=kinds, seed=coins.plan.tie_seed),
    ]


def summaries(
    frame: pd.DataFrame, title: str = GAME, pooled: tuple[str, Floats] | None = None
) -> tuple[ScoreSummary, ...]:
    """Histograms and ROC of all candidates together and, where there are several kinds, of each (scores as they are).

    pooled: name and scores of all together; by default standardised ones, and only where there are several kinds.
    """
    scores, members = frame["score"].to_numpy(dtype=np.float64), frame["member"].to_numpy(dtype=bool)
    kinds, everybody = list(dict.fromkeys(frame["kind"])), np.ones(len(frame), dtype=bool)
    parts = []
    if pooled is not None or len(kinds) > 1:
        parts.append((*(pooled or (TITLE, standardise(frame))), everybody))
    if pooled is None or len(kinds) > 1:
        parts += [(f"{title}: {kind}", scores, (frame["kind"] == kind).to_numpy()) for kind in kinds]
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
            small = Image.fromarray(picture.pixels)
            small.thumbnail((SIDE, SIDE))
            small.save(out, "PNG", optimize=True)
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
