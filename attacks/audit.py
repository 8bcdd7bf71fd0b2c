"""`audit`: play what was asked and has not been played, record it, and assemble the document. Nothing here judges.

A game is written to release/games/ as soon as it was played, so a later audit, or a kill between two writes, loses
nothing; release/audit.json is then made from all games that were ever played (dpaudit.verdict). An audit without
canaries of its own trains a twin with them first: it then speaks of the training procedure and not of the weights that
were released.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from attacks.fusion.verdicts import run_ledger
from attacks.games import twins
from attacks.games.canaries import play_canaries
from attacks.games.directions import Kind
from attacks.games.gradients import DEFAULT_COUNT
from attacks.games.members import Settings, play_membership
from attacks.games.played import Games
from attacks.membership.members import member_twin
from attacks.options import MEMBER_TWIN, TWIN, WHITE_BOX_TWIN, Options, prepare
from attacks.training import resume_run, start_run
from dpaudit import checksums, stated, verdict
from dpaudit.config import RunConfig
from dpaudit.documents import (
    ABOUT,
    STEP_CONTRACT,
    TOKEN_PATH,
    About,
    AuditDocument,
    ClaimDocument,
    ContractAudit,
    GameDocument,
    LedgerDocument,
    RunInfo,
)
from dpaudit.executors import Executor
from dpaudit.runs import RunFolder
from trainers import data
from trainers.plan import make_plan
from trainers.progress import Reporter
from trainers.run import config_sha256, read_config

TWIN_COUNT = 300
CONTRACT_UNITS = 24


@dataclass
class _Session:
    """One call of `audit`: the run, what was asked, and the games so far."""

    run: RunFolder
    config: RunConfig
    options: Options
    reporter: Reporter | None
    log: Callable[[str], None]
    processes: int | None
    executor: Executor | None
    games: Games

    @property
    def confidence(self) -> float:
        """Of all bounds of the next game together."""
        return self.games.next_confidence(self.options.confidence)

    def had(self, name: str) -> bool:
        """Whether a game was played already and is not asked for again; says so."""
        game = self.games.had(name)
        if game is None or self.options.again:
            return False
        self.log(
            f"{name}: played already (release/games/{game.name}.json); --again plays it once more, with fresh coins"
        )
        return True

    def require_stated(self) -> None:
        """Before a twin is trained, see twins.require_stated."""
        run = self.run
        twins.require_stated(self.config, ClaimDocument.read(run.claim).claim, LedgerDocument.read(run.ledger))

    def check(self, game: str, **content: Any) -> None:
        """Write a check without coins down."""
        self.games.add(game, about="weights", claim=ClaimDocument.read(self.run.claim).claim, **content)


def audit(
    path: Path,
    options: Options,
    *,
    reporter: Reporter | None = None,
    log: Callable[[str], None] = lambda _: None,
    processes: int | None = None,
    executor: Executor | None = None,
) -> AuditDocument:
    """Audit the run in `path`, write its release/audit.json and return it. Raises UsageError before any work.

    processes, executor: of the reference models (attacks.membership.references.train_references).
    """
    run = RunFolder.open(path)
    prepare(run, options)
    config = read_config(run)
    chosen = options.named(config)
    if not any(name.startswith("model/") for name in checksums.read(run.release / checksums.SUMS)):
        log(
            f"warning: {run.release / checksums.SUMS} does not name the released model: it was removed or made anew, "
            "so a game that was removed with it can't be noticed"
        )
    if not options.audits and not config.canaries.count:
        log(f"{path}: trained without canaries; --canaries trains {TWIN} with them and audits that")
    games = Games.of(run, options.alpha, options.command)
    session = _Session(run, config, options, reporter, log, processes, executor, games)
    plays = {
        "canaries": _canaries,
        "mia": _membership,
        "white-box": _white_box,
        "fusion": _fusion,
        "contract": _contract,
    }
    for name, play in plays.items():
        if name in chosen:
            play(session)
    with run.lock():
        document = assemble(run, games.documents, options)
        run.write(document)
    return document


def assemble(run: RunFolder, games: list[GameDocument], options: Options) -> AuditDocument:
    """The document of all games of a run, with the run's own ledger."""
    fusion = next((game.fusion for game in reversed(games) if game.fusion is not None), None)
    ledger = LedgerDocument.read(run.ledger)
    claim = ClaimDocument.read(run.claim).claim
    named = any(game.claim is not None for game in games)
    return verdict.document(
        run=RunInfo(
            name=run.path.resolve().name,
            method=run.read_config().method,
            config_sha256=config_sha256(run),
            coins_sha256=ledger.coins_sha256,
            command=options.command,
        ),
        claim=claim,
        alpha=max(options.alpha, verdict.level(games)) if games else options.alpha,
        confidence=options.confidence,
        games=games,
        ledger=(
            *run_ledger(ledger.rows, fusion),
            *stated.rows(claim, run.read_config(), ledger=ledger, named=named, own=True),
        ),
    )


def _canaries(session: _Session) -> None:
    if session.had("canaries"):
        return
    run, about, supplied = _with_canaries(session)
    claim = ClaimDocument.read(run.claim).claim
    with session.run.lock():
        session.log("scoring canaries against the base model")
        played = play_canaries(
            run,
            claim=claim,
            delta=session.config.privacy.delta,
            confidence=session.confidence,
            alpha=session.options.alpha,
            device=session.options.device,
        )
        session.games.keep("canaries", played, about=about, claim=claim, supplied=supplied)


def _with_canaries(session: _Session) -> tuple[RunFolder, About, bool]:
    """What the canary game is played on, what that speaks of, and whether it lay there before this audit: the run
    itself, the twin of an audit that was interrupted, or a twin trained now."""
    config, options = session.config, session.options
    again = session.games.had("canaries") is not None
    if config.canaries.count and not again:
        return session.run, "weights", False
    session.require_stated()
    place = twins.latest(session.run, TWIN)
    if place is not None and not again and RunFolder(place).config.is_file():
        twin = RunFolder.open(place)
        if not twin.finished:
            session.log(f"going on with {place}")
            if twin.ledger.exists():
                twin = resume_run(place, reporter=session.reporter)
            else:  # it was stopped before its first step
                twin = start_run(read_config(twin), place, reporter=session.reporter)
        return twin, "procedure", True
    place = twins.free(session.run, TWIN)
    wanted = twins.canary_twin(twins.config_of(config, place), options.count or config.canaries.count or TWIN_COUNT)
    session.log(
        f"training a twin with {wanted.canaries.count} canary candidates in {place}: audits {ABOUT['procedure']}"
    )
    return start_run(wanted, place, reporter=session.reporter), "procedure", False


def _membership(session: _Session) -> None:
    if session.had("membership"):
        return
    run, config, options = session.run, session.config, session.options
    about: About = "weights"
    supplied = False
    # With fresh coins, or where coins decided about no record of the run, the training units of a twin are tossed.
    again = session.games.had("membership") is not None
    if again or not config.canaries.count:
        place = run.path / MEMBER_TWIN if not again else twins.free(run, MEMBER_TWIN)
        session.require_stated()
        supplied, about = place.exists(), "procedure"
        run = member_twin(twins.config_of(config, place), place, reporter=session.reporter, log=session.log)
    claim = ClaimDocument.read(run.claim).claim
    with session.run.lock():
        settings = Settings(
            claim=claim,
            delta=config.privacy.delta,
            confidence=session.confidence,
            alpha=options.alpha,
            references=options.references,
            processes=session.processes,
            executor=session.executor,
            device=options.device,
            log=session.log,
        )
        session.games.keep("membership", play_membership(run, settings), about=about, claim=claim, supplied=supplied)


def _white_box(session: _Session) -> None:
    if session.had("white-box"):
        return
    options = session.options
    count = options.count or DEFAULT_COUNT
    session.require_stated()
    place = twins.free(session.run, WHITE_BOX_TWIN)
    session.log(f"training a twin with {count} gradient canaries in {place}: audits {ABOUT['procedure']}")
    played, claim = twins.play_white_box(
        twins.config_of(session.config, place),
        place,
        count=count,
        confidence=session.confidence,
        alpha=options.alpha,
        directions=cast(Kind, options.directions),
        final=options.final_only,
        reporter=session.reporter,
    )
    with session.run.lock():
        session.games.keep("white-box", played, about="procedure", claim=claim)


def _fusion(session: _Session) -> None:
    if session.had(TOKEN_PATH):
        return
    from attacks.fusion.audit import audit_fusion, record

    with session.run.lock():
        result = audit_fusion(session.run, log=session.log)
        record(session.run, result)
        session.check(TOKEN_PATH, fusion=result)


def _contract(session: _Session) -> None:
    if session.had(STEP_CONTRACT):
        return
    with session.run.lock():
        session.check(STEP_CONTRACT, contract=contract(session.config, session.log))


def contract(config: RunConfig, log: Callable[[str], None]) -> ContractAudit:
    """The step contract on this run's trainer: its code, model, reducer, clipping, noise and pruning, on a few units.

    The sampler is tested with a small batch of few units, since the contract needs many draws; sigma is the run's own.
    """
    from attacks.contract import check
    from trainers.adapters.vlm import factory_for

    log(f"step contract on {CONTRACT_UNITS} of the run's units (about a minute)")
    dataset = data.load(config.data)
    plan = make_plan(config, dataset, config.canaries.count)
    few = replace(dataset, train=dataset.train[:CONTRACT_UNITS])
    training = config.training.model_copy(update={"batch_size": max(1, len(few.train) // 5), "steps": 20})
    privacy = config.privacy.model_copy(
        update={"epsilon": None, "noise_multiplier": plan.noise_multiplier, "delta": min(1e-3, config.privacy.delta)}
    )
    small = config.model_copy(update={"training": training, "privacy": privacy})
    found = check(factory_for(small, few))
    return ContractAudit(verdict=found.verdict, checks=found.checks)
