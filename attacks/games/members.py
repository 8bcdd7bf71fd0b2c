"""`audit --mia`: one game of membership inference as part of an audit document.

Two games, both decided by coins that were hashed before training: the canary candidates of a run that has them, and
otherwise the training units themselves in a twin (attacks.membership.members). All attacks score all records; which
one reports is chosen on a development half (attacks.membership.selection); the bound, the test of the claim and the
breakdown by kind come from the other half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.blind import blind_check, features
from attacks.canaries import Canary, Coins, check_coins
from attacks.games.canaries import GENUINE, summaries
from attacks.games.played import Played, coins_check, sound, unsound
from attacks.games.reading import SHARE, SIGMA_REDUCTION, bound_tests, claim_tests, too_small
from attacks.membership.attack import Attack
from attacks.membership.extraction import exposures, regeneration
from attacks.membership.hygiene import overlap_check
from attacks.membership.members import MemberGame
from attacks.membership.records import StudyRecords, study_records
from attacks.membership.references import Study, load_study, train_references
from attacks.membership.selection import Choice, choose, report_plan
from attacks.membership.table import attacks, default_attack, score_all
from attacks.membership.trials import SHARE as TRIALS_SHARE
from attacks.membership.trials import Trials
from attacks.membership.view import Access, References, View
from attacks.scores import join_coins
from attacks.training import redraw_game
from dpaudit import atomic
from dpaudit.analysis.claim import describe_alternative
from dpaudit.analysis.scores import sign_check
from dpaudit.bounds.roc import auc_interval
from dpaudit.documents import AttackRow, Check, Claim, Extraction, LedgerDocument, Test
from dpaudit.errors import InvalidGame
from dpaudit.executors import Executor
from dpaudit.runs import RunFolder
from trainers import data
from trainers.run import load_model

Floats = npt.NDArray[np.float64]
TITLE = "membership"


@dataclass(frozen=True)
class Settings:
    """confidence: of all bounds of this game together. alpha: level of the test of the claim. references: how many
    reference models to train. processes, executor: see train_references. log: told what happens."""

    claim: Claim | None
    delta: float
    confidence: float
    alpha: float
    references: int = 0
    processes: int | None = None
    executor: Executor | None = None
    device: str = "auto"
    log: Callable[[str], None] = lambda _: None


def play_membership(run: RunFolder, settings: Settings) -> Played:
    """Play the game on a finished run with canaries, or on a finished member twin.

    Writes private/membership.parquet with every attack's scores. A game that is unsound (edited coins, other data,
    scores that don't fit) comes back with `validity.sound` False and without a single number.
    """
    try:
        coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
        records = study_records(run)
        _check_game(run, records, coins)
    except InvalidGame as error:
        return unsound("coins and scores", str(error))
    checks = _checks(records, coins, settings.log)
    if not sound(checks).sound:
        return Played(sound(checks), coins_sha256=coins.sha256)
    trials = Trials(settings.claim, records.kinds, coins.plan.tie_seed, settings.alpha)
    if settings.references:
        train_references(
            run,
            settings.references,
            processes=settings.processes,
            executor=settings.executor,
            log=settings.log,
            decided=trials.decided,
        )
    study = load_study(run, settings.references)
    settings.log("scoring records with every attack")
    view = view_of(run, records, study, settings.device, coins.plan.tie_seed)
    try:
        scores = {name: _joined(view, values, coins) for name, values in score_all(view).items()}
    except InvalidGame as error:
        return unsound("coins and scores", str(error))
    _save(run, coins, scores)
    part = report(view, scores, coins, settings)
    return replace(
        part,
        validity=sound((*checks, *part.validity.checks)),
        tests=(*part.tests, *trials.tests(study)) if part.validity.sound else (),
        coins_sha256=coins.sha256,
        alternative=describe_alternative(1 - SIGMA_REDUCTION) if settings.claim is not None else None,
        exposure=_exposure(records, view, coins) if part.tests else (),
        regeneration=regeneration(view.target.model, view.base.model, view.units, _members(coins))
        if part.tests
        else (),
    )


def _members(coins: Coins) -> npt.NDArray[np.bool_]:
    members: npt.NDArray[np.bool_] = coins.frame["member"].to_numpy(dtype=bool)
    return members


def _exposure(records: StudyRecords, view: View, coins: Coins) -> tuple[Extraction, ...]:
    """Of canaries that are secrets; real records have none to compare with."""
    candidates = [
        Canary(unit.id, str(kind), unit, bool(member), "")
        for unit, kind, member in zip(view.units, view.kinds, _members(coins), strict=True)
    ]
    spare = records.model.spare_tokens(2 * len(candidates))
    return exposures(view.target.model, view.base.model, candidates, spare_tokens=spare, seed=coins.plan.tie_seed)


def _check_game(run: RunFolder, records: StudyRecords, coins: Coins) -> None:
    """Raise InvalidGame when the records are not those of the coin file."""
    dataset = data.load(records.config.data)
    game = redraw_game(records.config, dataset, records.key, records.model, coins)
    if game is not None:
        game.check_against(coins)
        return
    if not MemberGame.draw(dataset, records.key).frame().equals(coins.frame):
        raise InvalidGame(
            f"{run.coins}: not the coins that this run's key and data give; the data set or the coins have changed "
            "since training"
        )


def _checks(records: StudyRecords, coins: Coins, log: Callable[[str], None]) -> list[Check]:
    units, members = records.candidate_units(), _members(coins)
    return [
        coins_check(coins.sha256, GENUINE.replace("candidates", "records")),
        overlap_check(units, members, log=log),
        blind_check(features(units), members, kinds=list(records.kinds), seed=coins.plan.tie_seed, what="records"),
    ]


def view_of(run: RunFolder, records: StudyRecords, study: Study, device: str, seed: int) -> View:
    """What the attacks may look at: the run's model, its base, and the finished reference models."""
    units = list(records.candidate_units())
    target = Access(load_model(run, device), units, adapted=True)
    base = Access(load_model(None, device, config=records.config), units, adapted=False)
    references = None
    if len(study.index):
        outside = Access(target.model, records.population_units(), adapted=True)
        references = References(study.losses, study.inside, study.population, records.population_kinds, outside.loss)
    others = [records.units[index] for index in records.fixed()]
    most = records.plan.max_grad_norm
    return View(units, records.kinds, target, base, references, seed, others=others, max_grad_norm=most)


def _joined(view: View, values: Floats, coins: Coins) -> Floats:
    frame = pd.DataFrame({"id": [unit.id for unit in view.units], "score": values})
    return join_coins(frame, coins.frame)["score"].to_numpy(dtype=np.float64)


def _save(run: RunFolder, coins: Coins, scores: dict[str, Floats]) -> None:
    frame = coins.frame[["id", "kind", "member"]].assign(**scores)
    atomic.write_frame(run.private / "membership.parquet", frame, mode=0o600)


def report(view: View, scores: dict[str, Floats], coins: Coins, settings: Settings) -> Played:
    """Choose on the development half, report on the other."""
    members, seed = _members(coins), coins.plan.tie_seed
    choice = choose(scores, members, view.kinds, seed=seed, default=default_attack(view))
    rest = ~choice.development
    frame = coins.frame[["id", "kind", "member"]].assign(score=choice.scores)[rest].reset_index(drop=True)
    plan = report_plan(view.kinds[rest], seed)
    rows = _rows(scores, choice, members)
    small = too_small(frame, plan, confidence=settings.confidence, delta=settings.delta)
    if small is not None:
        return Played(sound([small]), attacks=rows)
    statistic = f"{choice.name}, chosen among {len(choice.auc)} attacks on the other half of the records"
    words = {"title": TITLE, "statistic": statistic}
    turned = sign_check(frame["score"].to_numpy(dtype=np.float64), frame["member"].to_numpy(dtype=bool))
    if turned.status == "fail":
        return Played(sound([turned]), attacks=rows)
    tests: tuple[Test, ...] = bound_tests(frame, plan, confidence=settings.confidence, delta=settings.delta, **words)
    if settings.claim is not None:
        tests += claim_tests(
            frame,
            plan,
            claim=settings.claim,
            confidence=settings.confidence,
            alpha=settings.alpha,
            share=SHARE - TRIALS_SHARE,
            **words,
        )
    shown = summaries(frame, TITLE, (f"{TITLE}: {choice.name}", frame["score"].to_numpy(dtype=np.float64)))
    return Played(sound([turned]), tests=tests, scores=shown, attacks=rows)


def _rows(scores: dict[str, Floats], choice: Choice, members: npt.NDArray[np.bool_]) -> tuple[AttackRow, ...]:
    """Every attack with its AUC on the development half, the strongest first."""
    known = attacks()
    labels = members[choice.development]
    n_in = int(labels.sum())
    rows = []
    for name, value in sorted(choice.auc.items(), key=lambda item: -item[1]):
        low, high = auc_interval(value, n_in, labels.size - n_in)
        rows.append(_row(known.get(name), name, value, (low, high), labels.size, name == choice.name))
    return tuple(rows)


def _row(attack: Attack | None, name: str, value: float, interval: Sequence[float], n: int, chosen: bool) -> AttackRow:
    return AttackRow(
        name=name,
        description=attack.description if attack else "Logistic regression on all attacks, fitted on this half.",
        source=attack.source if attack else "fitted on the development half's coins",
        level=attack.level if attack else "weights",
        cost=attack.cost if attack else "that of all attacks",
        n=n,
        auc=value,
        auc_low=interval[0],
        auc_high=interval[1],
        chosen=chosen,
    )
