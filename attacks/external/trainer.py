"""`audit_trainer`: a trainer under test in, an AuditDocument out.

Order: build one trainer and ask what it has; draw canaries, then coins; write coins, planned guesses and their hash;
then play the games, and last decide. A means of audit that the trainer's methods do not allow is `not applicable`, with
the reason, in the document's validity checks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attacks.audit import alternative, merge
from attacks.canaries import COLUMNS, Coins, Plan
from attacks.canary_audit import CanaryAudit, unsound
from attacks.contract import check as step_contract
from attacks.contract.loading import load_factory
from attacks.contract.probe import MOST_NUMBERS
from attacks.external import canaries, gradients, one_run, runs
from attacks.external.claims import ledger_rows, make_claim, mechanism_epsilon
from attacks.external.folder import AuditFolder, loaded_code, settings_sha256
from attacks.external.options import TrainerOptions
from attacks.external.setting import Setting
from attacks.scores import join_coins
from attacks.white_box import TITLE as WHITE_BOX
from dpaudit.bounds.roc import summarise
from dpaudit.claims import decide
from dpaudit.documents import AuditDocument, Check, Claim, ContractAudit, RunInfo, Test, Validity
from dpaudit.errors import InvalidGame
from dpaudit.executors import Executor
from trainers.progress import Reporter

METHOD = "trainer under test"
PROCEDURE = "the training procedure, not these weights"
SEEDED = "Coins and noise came from --seed: the audit can be repeated exactly, and anyone can recompute its coins."

ReporterFor = Callable[[str], Reporter]


@dataclasses.dataclass
class _Games:
    """What will be played: candidates of each game (empty: not played), and why a game is not."""

    candidates: list[Any]
    gradients: int
    runs: int
    skipped: list[Check]

    @property
    def deciding(self) -> int:
        """Tests of the claim in all, which share its level."""
        found = one_run.DECIDING * bool(self.candidates) + gradients.DECIDING * bool(self.gradients)
        return max(1, found + runs.DECIDING * bool(self.runs))


def audit_trainer(
    options: TrainerOptions,
    out: Path | None,
    *,
    reporter: ReporterFor,
    log: Callable[[str], None] = lambda _: None,
    executor: Executor | None = None,
) -> tuple[AuditDocument, Path]:
    """Audit `options.target` and write the document to OUT/release/audit.json; returns both.

    reporter: makes a progress reporter of a name. executor: for the trainings of `--runs` (None: here, one by one).
    Raises UsageError (one line that names the method or the option) when the trainer can't be asked.
    """
    loaded = load_factory(options.target, limit=options.time_limit)
    factory = partial(loaded, **options.arguments) if options.arguments else loaded
    settings = _settings(options)
    folder = AuditFolder.take(out, options.target.replace(":", "-").replace(".", "-"), settings)
    with folder.run.lock():
        setting = Setting.of(factory, options, folder.key(options.seed))
        games = _choose(setting)
        provisional = _claim(setting)
        coins = _draw(setting, games, provisional, folder)
        log(f"coins, candidates and planned guesses are in {folder.run.coins}")
        stated, parts = _play(setting, games, coins, folder, reporter, log, executor)
        contract = _contract(setting, log) if _wants_contract(setting, games) else None
        claim = make_claim(setting.step_claim, steps=setting.steps, delta=setting.delta, stated=stated)
        audited = [_judge(setting, name, frame, coins, claim, games, len(parts)) for name, frame in parts.items()]
        document = _assemble(setting, claim, audited, games, contract, coins, settings)
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
    alpha = options.alpha / games.deciding
    levels = {"confidence": options.confidence, "alpha": alpha}
    frames, planned = [], dict[str, tuple[int, int]]()
    if games.candidates:
        frames.append(canaries.coins(key, games.candidates))
        planned |= one_run.guesses(canaries.KIND, len(games.candidates), claim, **levels)
    if games.gradients:
        frames.append(gradients.game_of(setting, key, games.gradients).frame())
        planned |= gradients.guesses(games.gradients, claim, alpha=alpha)
    if games.runs:
        frames.append(runs.coins(key, games.runs, runs.target_of(setting)))
        planned |= runs.guesses(games.runs, claim, **levels)
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
    plan = Plan(planned, int(key.generator(purpose="ties").integers(2**31)), one_run.SIGMA_REDUCTION)
    coins = folder.coins(frame.astype({"member": bool})[COLUMNS], plan, ())
    if not coins.frame.equals(frame.astype({"member": bool})[COLUMNS]):
        raise InvalidGame(
            f"{folder.run.coins}: not the coins and candidates of this trainer and key; use another --out"
        )
    return coins


def _play(
    setting: Setting,
    games: _Games,
    coins: Coins,
    folder: AuditFolder,
    reporter: ReporterFor,
    log: Callable[[str], None],
    executor: Executor | None,
) -> tuple[float | None, dict[str, pd.DataFrame]]:
    """Play what is not played yet: (eps that the trainer states, scores by kind)."""
    stated, parts = setting.options.epsilon, dict[str, pd.DataFrame]()

    def keep(kind: str, scores: Any, epsilon: float | None) -> None:
        mine = coins.frame[coins.frame["kind"] == kind]
        frame = join_coins(pd.DataFrame({"id": mine["id"].to_numpy(), "score": scores}), mine)
        folder.save_scores(kind, frame.assign(stated=np.nan if epsilon is None else epsilon))

    def members(kind: str) -> Any:
        return coins.frame.loc[coins.frame["kind"] == kind, "member"].to_numpy(dtype=bool)

    if games.candidates and folder.scores(canaries.KIND) is None:
        keep(canaries.KIND, *canaries.play(setting, games.candidates, members(canaries.KIND), reporter("canaries")))
    if games.gradients and folder.scores(gradients.KIND) is None:
        game = gradients.game_of(setting, setting.key, games.gradients)
        epsilon = gradients.play(setting, game, reporter("white box"))
        keep(gradients.KIND, game.scores, epsilon)
    if games.runs and folder.scores(runs.KIND) is None:
        log(f"{games.runs} trainings of {setting.steps} steps; interrupt at any time, --out {folder.path} goes on")
        heads = members(runs.KIND)
        many = _on(executor, setting, folder, heads) if executor is not None else None
        keep(runs.KIND, *runs.play(setting, heads, folder.runs_log, reporter("runs"), many))
    for kind in (canaries.KIND, gradients.KIND, runs.KIND):
        frame = folder.scores(kind)
        if frame is not None:
            parts[kind] = frame
            found = frame["stated"].dropna()
            stated = stated if stated is not None or found.empty else float(found.iloc[0])
    return stated, parts


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


def _judge(
    setting: Setting, kind: str, frame: pd.DataFrame, coins: Coins, claim: Claim, games: _Games, parts: int
) -> CanaryAudit:
    """One game's part of the document; the games share the error budget of the bounds."""
    confidence = 1.0 - (1.0 - setting.options.confidence) / parts
    alpha = setting.options.alpha / games.deciding
    scores, members = frame["score"].to_numpy(), frame["member"].to_numpy(dtype=bool)
    if not 0 < members.sum() < members.size:
        return unsound(f"{kind} coins", f"all {members.size} coins fell on one side; audit again")
    tests: tuple[Test, ...]
    checks: list[Check] = []
    if kind == canaries.KIND:
        checks += canaries.checks(games.candidates, members, setting.records, coins.plan.tie_seed)
        title = canaries.TITLE
        named = {"title": title, "statistic": canaries.STATISTIC}
        tests = one_run.tests(frame, coins.plan, claim, **named, confidence=confidence, alpha=alpha)
    elif kind == gradients.KIND:
        tests = gradients.tests(scores, members, coins.plan, claim, confidence=confidence, alpha=alpha)
        title = WHITE_BOX
    else:
        tests = runs.tests(scores, members, coins.plan, claim, confidence=confidence, alpha=alpha)
        title = runs.TITLE
    sound = all(check.status != "fail" for check in checks)
    return CanaryAudit(
        validity=Validity(sound=sound, checks=tuple(checks)),
        tests=tests if sound else (),
        scores=(summarise(title, scores, members),) if sound else (),
        coins_sha256=coins.sha256,
    )


def _contract(setting: Setting, log: Callable[[str], None]) -> ContractAudit:
    log("step contract")
    found = step_contract(setting.factory, time_limit=setting.options.time_limit)
    return ContractAudit(verdict=found.verdict, checks=found.checks)


def _assemble(
    setting: Setting,
    claim: Claim,
    parts: list[CanaryAudit],
    games: _Games,
    contract: ContractAudit | None,
    coins: Coins,
    settings: dict[str, Any],
) -> AuditDocument:
    options = setting.options
    part = merge(parts) or CanaryAudit(Validity(sound=True, checks=()))
    drawn = Check(
        name="coins",
        status="pass",
        measured=f"SHA-256 {coins.sha256[:16]}…",
        allowed="the hash in the ledger",
        explanation="Fair coins, candidates and planned guesses were written and hashed before the first step.",
    )
    checks = ((drawn,) if parts else ()) + part.validity.checks + tuple(games.skipped)
    validity = Validity(sound=part.validity.sound, checks=checks)
    ledger = ledger_rows(claim)
    verdict, reasons = decide(
        claim=claim,
        alpha=options.alpha,
        family_confidence=options.confidence,
        validity=validity,
        tests=part.tests,
        ledger=ledger,
        checks=contract.checks if contract else (),
    )
    return AuditDocument(
        verdict=verdict,
        reasons=(*reasons, f"Audited by trainings of its own: this speaks of {PROCEDURE}."),
        claim=claim,
        alternative=alternative(claim),
        alpha=options.alpha,
        family_confidence=options.confidence,
        tests=part.tests,
        validity=validity,
        ledger=ledger,
        contract=contract,
        scores=part.scores,
        run=RunInfo(
            name=options.target,
            method=METHOD,
            config_sha256=settings_sha256(settings),
            audits=PROCEDURE,
            coins_sha256=coins.sha256 if parts else None,
            command=options.command,
        ),
    )
