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

import numpy as np
import pandas as pd

from attacks.canaries import ALL, COLUMNS, Coins, Plan
from attacks.contract import check as step_contract
from attacks.contract.loading import load_factory
from attacks.contract.probe import MOST_NUMBERS
from attacks.external import canaries, gradients, runs
from attacks.external.claims import ledger_rows, make_claim, mechanism_epsilon
from attacks.external.folder import AuditFolder, loaded_code, settings_sha256
from attacks.external.options import TrainerOptions
from attacks.external.setting import Setting
from attacks.games import reading
from attacks.games.gradients import read_game
from attacks.games.played import Played, unsound
from attacks.scores import join_coins
from dpaudit import record, verdict
from dpaudit.analysis.claim import describe_alternative
from dpaudit.analysis.scores import sign_check
from dpaudit.bounds.roc import summarise
from dpaudit.documents import AuditDocument, Check, Claim, ContractAudit, GameDocument, RunInfo, Test, Validity
from dpaudit.errors import InvalidGame
from dpaudit.executors import Executor
from trainers.progress import Reporter

METHOD = "trainer under test"
CANARY_SHARE = 0.9  # of the evidence of the canaries' coins; a tenth is not staked
SEEDED = "Coins and noise came from --seed: the audit can be repeated exactly, and anyone can recompute its coins."

ReporterFor = Callable[[str], Reporter]


@dataclasses.dataclass
class _Games:
    """What will be played: candidates of each game (empty: not played), and why a game is not."""

    candidates: list[Any]
    gradients: int
    runs: int
    skipped: list[Check]


def audit_trainer(
    options: TrainerOptions,
    out: Path | None,
    *,
    reporter: ReporterFor,
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
        games = _choose(setting)
        provisional = _claim(setting)
        coins = _draw(setting, games, provisional, folder)
        log(f"coins, candidates and planned guesses are in {folder.run.coins}")
        session = _Session(setting, games, coins, folder, reporter, log, executor, list(record.read(folder.run)))
        claim = session.play(provisional)
        document = _assemble(setting, claim, session.documents, games, coins, settings)
        folder.finish(document, claim, (SEEDED,) if setting.key.seeded else ())
    return document, folder.path


def _settings(options: TrainerOptions) -> dict[str, Any]:
    tree = dataclasses.asdict(options)
    for name in ("command", "time_limit", "confidence", "alpha"):
        tree.pop(name)
    return {**tree, "arguments": dict(options.arguments), "audits": list(options.audits), "code": loaded_code()}


def _claim(setting: Setting) -> Claim:
    """The claim as far as it is known before training; the guesses are planned from its mechanism and delta.

    A trainer whose mechanism has no accountant here states its eps after its steps: any eps stands in until then.
    """
    stated = setting.options.epsilon
    claim = make_claim(setting.step_claim, steps=setting.steps, delta=setting.delta, stated=1.0)
    if stated is None and setting.first.offers("epsilon") and mechanism_epsilon(claim) is None:
        return claim
    return make_claim(setting.step_claim, steps=setting.steps, delta=setting.delta, stated=stated)


def _choose(setting: Setting) -> _Games:
    options, first = setting.options, setting.first
    games = _Games([], 0, 0, [])

    def skip(name: str, why: str) -> None:
        allowed = "what the audit needs (docs/audit-your-own.md)"
        games.skipped.append(
            Check(name=name, status="not applicable", measured=why, allowed=allowed, explanation="Not played.")
        )

    if _wanted(options, "canaries"):
        why = _records_missing(setting) or setting.drives
        if why is None:
            games.candidates = canaries.draw(setting, options.count or canaries.DEFAULT_COUNT)
        else:
            skip("canary game", why)
    if _wanted(options, "white-box"):
        why = gradients.why_not(setting)
        if why is None:
            games.gradients = gradients.count_for(setting)
        else:
            skip("white-box game", why)
    if options.runs is not None:
        why = _records_missing(setting) or setting.drives
        if why is None:
            games.runs = options.runs
        else:
            skip("multi-run audit", why)
    if _wanted(options, "contract") and "contract" not in options.audits:
        size = sum(int(np.prod(shape)) for shape in first.parameters().values())
        if size > MOST_NUMBERS:
            skip("step contract", f"{size:,} trained numbers; the contract takes at most {MOST_NUMBERS:,}")
    return games


def _records_missing(setting: Setting) -> str | None:
    """Why no game with records can be played."""
    missing = next((name for name in ("canaries", "score") if not setting.first.offers(name)), None)
    return None if missing is None else setting.first.lacking(missing)


def _wanted(options: TrainerOptions, name: str) -> bool:
    """Named; or nothing named at all, and then everything but the many trainings."""
    return name in options.audits or not (options.audits or options.runs)


def _wants_contract(setting: Setting, games: _Games) -> bool:
    return _wanted(setting.options, "contract") and all(check.name != "step contract" for check in games.skipped)


def _draw(setting: Setting, games: _Games, claim: Claim, folder: AuditFolder) -> Coins:
    """One coin file for all games, with the guesses of every test, before the first step."""
    options, key = setting.options, setting.key
    levels = {"confidence": options.confidence, "alpha": options.alpha}
    frames, planned = [], dict[str, tuple[int, int]]()
    if games.candidates:
        frames.append(canaries.coins(key, games.candidates))
        planned |= reading.planned(canaries.KIND, len(games.candidates), claim, **levels)
    if games.gradients:
        game = gradients.game_of(setting, key, games.gradients)
        frames.append(game.frame())
        planned[gradients.KIND] = game.plan.guesses[gradients.KIND]
    if games.runs:
        frames.append(runs.coins(key, games.runs, runs.target_of(setting)))
        planned |= runs.guesses(games.runs, claim, **levels)
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
    plan = Plan(planned, int(key.generator(purpose="ties").integers(2**31)), reading.SIGMA_REDUCTION)
    coins = folder.coins(frame.astype({"member": bool})[COLUMNS], plan, ())
    if not coins.frame.equals(frame.astype({"member": bool})[COLUMNS]):
        raise InvalidGame(
            f"{folder.run.coins}: not the coins and candidates of this trainer and key; use another --out"
        )
    return coins


@dataclasses.dataclass
class _Session:
    """The games of one audit, each written down as soon as it was played: an interrupted audit plays the rest."""

    setting: Setting
    games: _Games
    coins: Coins
    folder: AuditFolder
    reporter: ReporterFor
    log: Callable[[str], None]
    executor: Executor | None
    documents: list[GameDocument]

    def play(self, claim: Claim) -> Claim:
        """Play what is not played yet; returns the claim with the eps that the trainer states after its steps."""
        plays: list[tuple[str, bool, Callable[[float], tuple[Played, Claim]]]] = [
            ("canaries", bool(self.games.candidates), self._canaries),
            ("white-box", bool(self.games.gradients), self._gradients),
            ("many runs", bool(self.games.runs), self._runs),
        ]
        for number, (name, wanted, play) in enumerate(plays, start=1):
            done = next((game.claim for game in self.documents if game.game == name), None)
            if done is not None:
                claim = done
            elif wanted:
                played, claim = play(verdict.confidence_of(number, self.setting.options.confidence))
                self._keep(played.document(name, claim=claim, **self._bare()))
        if _wants_contract(self.setting, self.games) and all(game.contract is None for game in self.documents):
            found = _contract(self.setting, self.log)
            self._keep(
                GameDocument(game="step contract", coins_sha256=None, claim=claim, contract=found, **self._bare())
            )
        return claim

    def _keep(self, document: GameDocument) -> None:
        record.add(self.folder.run, document)
        self.documents.append(document)

    def _bare(self) -> dict[str, Any]:
        number, previous = record.following(self.documents)
        options = self.setting.options
        shared = {"about": "procedure", "alpha": options.alpha, "command": options.command}
        return {"number": number, "previous_sha256": previous, **shared}

    def _mine(self, kind: str) -> pd.DataFrame:
        return self.coins.frame[self.coins.frame["kind"] == kind]

    def _frame(self, kind: str, scores: Any) -> pd.DataFrame:
        mine = self._mine(kind)
        frame = join_coins(pd.DataFrame({"id": mine["id"].to_numpy(), "score": scores}), mine)
        self.folder.save_scores(kind, frame)
        return frame

    def _claim(self, stated: float | None) -> Claim:
        setting = self.setting
        stated = stated if setting.options.epsilon is None else setting.options.epsilon
        return make_claim(setting.step_claim, steps=setting.steps, delta=setting.delta, stated=stated)

    def _canaries(self, confidence: float) -> tuple[Played, Claim]:
        setting, candidates = self.setting, self.games.candidates
        members = self._mine(canaries.KIND)["member"].to_numpy(dtype=bool)
        scores, stated = canaries.play(setting, candidates, members, self.reporter("canaries"))
        frame, claim = self._frame(canaries.KIND, scores), self._claim(stated)
        checks = canaries.checks(candidates, members, setting.records, self.coins.plan.tie_seed)
        words = {"title": canaries.TITLE, "statistic": canaries.STATISTIC}
        guesses = self.coins.plan.guesses
        plan = Plan({ALL: guesses[canaries.KIND], **guesses}, self.coins.plan.tie_seed)
        return self._read(frame, checks, canaries.TITLE, claim, lambda: (
            *(
                test.model_copy(update={"name": canaries.TITLE})
                for test in reading.bound_tests(frame, plan, confidence=confidence, delta=claim.delta, **words)
            ),
            *reading.claim_tests(
                frame, plan, claim=claim, confidence=confidence, alpha=setting.options.alpha,
                share=CANARY_SHARE, key=reading.claim_key(canaries.KIND), **words
            ),
        )), claim  # fmt: skip

    def _gradients(self, confidence: float) -> tuple[Played, Claim]:
        setting = self.setting
        game = gradients.game_of(setting, setting.key, self.games.gradients)
        stated = gradients.play(setting, game, self.reporter("white box"))
        self._frame(gradients.KIND, game.scores())
        claim = self._claim(stated)
        if not 0 < game.members.sum() < game.count:
            return unsound("gradient coins", f"all {game.count} coins fell on one side; audit again"), claim
        levels: dict[str, Any] = {"confidence": confidence, "alpha": setting.options.alpha}
        return read_game(game, claim, coins_sha256=self.coins.sha256, **levels), claim

    def _runs(self, confidence: float) -> tuple[Played, Claim]:
        setting, folder = self.setting, self.folder
        count, alpha = self.games.runs, setting.options.alpha
        self.log(f"{count} trainings of {setting.steps} steps; interrupt at any time, --out {folder.path} goes on")
        heads = self._mine(runs.KIND)["member"].to_numpy(dtype=bool)
        many = _on(self.executor, setting, folder, heads) if self.executor is not None else None
        scores, stated = runs.play(setting, heads, folder.runs_log, self.reporter("runs"), many)
        frame, claim = self._frame(runs.KIND, scores), self._claim(stated)
        found = frame["score"].to_numpy()
        levels = {"confidence": confidence, "alpha": alpha}
        read = self._read(
            frame, [], runs.TITLE, claim, lambda: runs.tests(found, heads, self.coins.plan, claim, **levels)
        )
        return read, claim

    def _read(
        self, frame: pd.DataFrame, checks: list[Check], title: str, claim: Claim, tests: Callable[[], tuple[Test, ...]]
    ) -> Played:
        """Scores as evidence: validity first, and no number of an unsound game."""
        scores, members = frame["score"].to_numpy(), frame["member"].to_numpy(dtype=bool)
        kind = str(frame["kind"].iloc[0])
        if not 0 < members.sum() < members.size:
            return unsound(f"{kind} coins", f"all {members.size} coins fell on one side; audit again")
        checks = [*checks, sign_check(scores, members)]
        sound = all(check.status != "fail" for check in checks)
        return Played(
            validity=Validity(sound=sound, checks=tuple(checks)),
            tests=tests() if sound else (),
            scores=(summarise(title, scores, members),) if sound else (),
            coins_sha256=self.coins.sha256,
            coins=kind,
            alternative=describe_alternative(1 - reading.SIGMA_REDUCTION),
        )


def _on(executor: Executor, setting: Setting, folder: AuditFolder, members: Any) -> Callable[[Any], Any]:
    """The trainings named, on an executor. A job reads the key where it lies: it is in no message to a cluster."""
    shared = {"options": dataclasses.asdict(setting.options), "folder": str(folder.path.resolve())}

    def run_all(indices: Any) -> Any:
        payloads = [{**shared, "run": index, "member": bool(members[index])} for index in indices]
        for outcome in executor.run("attacks.external.runs:job", payloads):
            if outcome.error is not None or outcome.result is None:
                raise outcome.failure(f"run {payloads[outcome.index]['run']}")
            yield outcome.result

    return run_all


def _contract(setting: Setting, log: Callable[[str], None]) -> ContractAudit:
    log("step contract")
    found = step_contract(setting.factory, time_limit=setting.options.time_limit)
    return ContractAudit(verdict=found.verdict, checks=found.checks)


def _assemble(
    setting: Setting,
    claim: Claim,
    documents: list[GameDocument],
    games: _Games,
    coins: Coins,
    settings: dict[str, Any],
) -> AuditDocument:
    options = setting.options
    drawn = Check(
        name="coins",
        status="pass",
        measured=f"SHA-256 {coins.sha256[:16]}…",
        allowed="the hash in the ledger",
        explanation="Fair coins, candidates and planned guesses were written and hashed before the first step.",
    )
    tossed = any(game.coins_sha256 is not None for game in documents)
    return verdict.document(
        run=RunInfo(
            name=options.target,
            method=METHOD,
            config_sha256=settings_sha256(settings),
            about="procedure",
            coins_sha256=coins.sha256 if tossed else None,
            command=options.command,
        ),
        claim=claim,
        alpha=options.alpha,
        confidence=options.confidence,
        games=documents,
        ledger=ledger_rows(claim),
        checks=((drawn,) if tossed else ()) + tuple(games.skipped),
    )
