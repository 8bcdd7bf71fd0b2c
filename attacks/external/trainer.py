"""`audit_trainer`: a trainer under test in, an AuditDocument out.

Order: build one trainer and ask what it has; draw canaries, then coins; write coins, planned guesses and their hash;
then play the games, and last decide. A means of audit that the trainer's methods do not allow is `not applicable`, with
the reason, in the document's validity checks.
"""

import dataclasses
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from attacks.canaries import COLUMNS, Coins, Plan
from attacks.contract import check as step_contract
from attacks.contract.loading import load_factory
from attacks.contract.probe import MOST_NUMBERS
from attacks.external.canaries import CanaryGame
from attacks.external.claims import ledger_rows
from attacks.external.folder import AuditFolder, loaded_code, settings_sha256
from attacks.external.gradients import InjectionGame
from attacks.external.options import TrainerOptions
from attacks.external.runs import ManyRuns
from attacks.external.setting import Game, Playing, Setting
from attacks.games import reading
from attacks.games.played import Games, coins_check
from dpaudit import verdict
from dpaudit.documents import AuditDocument, Check, Claim, ContractAudit, RunInfo
from dpaudit.errors import InvalidGame
from dpaudit.executors import Executor
from trainers.progress import Reporter

SEEDED = "Coins and noise came from --seed: the audit can be repeated exactly, and anyone can recompute its coins."
DRAWN = "Fair coins, candidates and planned guesses were written and hashed before the first step."


def audit_trainer(
    options: TrainerOptions,
    out: Path | None,
    *,
    reporter: Callable[[str], Reporter],
    log: Callable[[str], None] = lambda _: None,
    executor: Executor | None = None,
    given: Callable[..., Any] | None = None,
) -> tuple[AuditDocument, Path]:
    """Audit `options.target` and write the document to OUT/release/audit.json; returns both.

    reporter: makes a progress reporter of a name. executor: for the trainings of `--runs` (None: here, one by one).
    given: the factory itself, where it can't be loaded by its name; an audit of it that was interrupted is not gone on
    with, since nobody can say whether it is the same code.
    Raises UsageError (one line that names the method or the option) when the trainer can't be asked.
    """
    loaded = load_factory(options.target, limit=options.time_limit) if given is None else given
    factory = partial(loaded, **options.arguments) if options.arguments else loaded
    settings = _settings(options)
    if given is not None:
        settings["session"] = secrets.token_hex(8)
    folder = AuditFolder.take(out, options.target.replace(":", "-").replace(".", "-"), settings)
    with folder.run.lock():
        setting = Setting.of(factory, options, folder.key(options.seed))
        claim = setting.provisional_claim
        games, contract, skipped = _choose(setting, claim)
        coins = _toss(setting, games, folder)
        log(f"coins, candidates and planned guesses are in {folder.run.coins}")
        played = Games.of(folder.run, options.alpha, options.command)
        claim = _play(Playing(setting, folder, coins, reporter, log, executor), games, contract, played, claim)
        document = _assemble(setting, claim, played, skipped, coins, settings)
        folder.finish(document, claim, (SEEDED,) if setting.key.seeded else ())
    return document, folder.path


def _settings(options: TrainerOptions) -> dict[str, Any]:
    tree = dataclasses.asdict(options)
    for name in ("command", "time_limit", "confidence", "alpha"):
        tree.pop(name)
    return {**tree, "arguments": dict(options.arguments), "audits": list(options.audits), "code": loaded_code()}


def _choose(setting: Setting, claim: Claim) -> tuple[list[Game], bool, tuple[Check, ...]]:
    """What will be played, whether the step contract is checked, and why a means of audit is not used."""
    options = setting.options

    def wanted(name: str) -> bool:
        """Named; or nothing named at all, and then everything but the many trainings."""
        return name in options.audits or not (options.audits or options.runs)

    games, skipped = list[Game](), dict[str, str]()
    kinds: list[tuple[type[Game], bool]] = [
        (CanaryGame, wanted("canaries")),
        (InjectionGame, wanted("white-box")),
        (ManyRuns, options.runs is not None),
    ]
    for kind, asked in kinds:
        why = kind.why_not(setting) if asked else None
        if why is not None:
            skipped[kind.label] = why
        elif asked:
            games.append(kind(setting, claim))
    if wanted("contract") and "contract" not in options.audits and setting.first.size() > MOST_NUMBERS:
        size = setting.first.size()
        skipped["step contract"] = f"{size:,} trained numbers; the contract takes at most {MOST_NUMBERS:,}"
    allowed = "what the audit needs (docs/audit-your-own.md)"
    checks = (
        Check(name=name, status="not applicable", measured=why, allowed=allowed, explanation="Not played.")
        for name, why in skipped.items()
    )
    return games, wanted("contract") and "step contract" not in skipped, tuple(checks)


def _toss(setting: Setting, games: list[Game], folder: AuditFolder) -> Coins:
    """One coin file for all games, with the guesses of every test, before the first step."""
    frame = pd.concat([game.frame for game in games], ignore_index=True) if games else pd.DataFrame(columns=COLUMNS)
    frame = frame.astype({"member": bool})[COLUMNS]
    guesses = {name: pair for game in games for name, pair in game.guesses.items()}
    tie_seed = int(setting.key.generator(purpose="ties").integers(2**31))
    coins = folder.coins(frame, Plan(guesses, tie_seed, reading.SIGMA_REDUCTION), ())
    if not coins.frame.equals(frame):
        raise InvalidGame(
            f"{folder.run.coins}: not the coins and candidates of this trainer and key; use another --out"
        )
    return coins


def _play(at: Playing, games: list[Game], contract: bool, played: Games, claim: Claim) -> Claim:
    """Play what is not played yet; returns the claim with the eps that the trainer states after its steps.

    Each game is written down as soon as it was played: an interrupted audit plays the rest.
    """
    numbers = {"canaries": 1, "white-box": 2, "many runs": 3}
    for game in games:
        done = played.had(game.name)
        if done is not None and done.claim is not None:
            claim = done.claim
        elif done is None:
            confidence = verdict.confidence_of(numbers[game.name], at.setting.options.confidence)
            found, claim = game.play(at, confidence)
            played.keep(game.name, found, about="procedure", claim=claim)
    if contract and played.had("step contract") is None:
        at.log("step contract")
        options = at.setting.options
        named = None if options.arguments else options.target  # a process of its own can't be handed arguments
        seen = step_contract(at.setting.factory, time_limit=options.time_limit, target=named)
        result = ContractAudit(verdict=seen.verdict, checks=seen.checks)
        played.add("step contract", about="procedure", claim=claim, contract=result)
    return claim


def _assemble(
    setting: Setting, claim: Claim, played: Games, skipped: tuple[Check, ...], coins: Coins, settings: dict[str, Any]
) -> AuditDocument:
    options = setting.options
    tossed = any(game.coins_sha256 is not None for game in played.documents)
    return verdict.document(
        run=RunInfo(
            name=options.target,
            method=verdict.UNDER_TEST,
            config_sha256=settings_sha256(settings),
            about="procedure",
            coins_sha256=coins.sha256 if tossed else None,
            command=options.command,
        ),
        claim=claim,
        alpha=options.alpha,
        confidence=options.confidence,
        games=played.documents,
        ledger=ledger_rows(claim),
        checks=((coins_check(coins.sha256, DRAWN),) if tossed else ()) + skipped,
    )
