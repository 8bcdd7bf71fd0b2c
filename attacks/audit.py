"""`audit`: play what was asked and has not been played, record it, and assemble the document. Nothing here judges.

A game is written to release/games/ as soon as it was played, so a later audit, or a kill between two writes, loses
nothing; release/audit.json is then made from all games that were ever played (dpaudit.verdict). An audit without
canaries of its own trains a twin with them first: it then speaks of the training procedure and not of the weights that
were released.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from attacks.fusion.verdicts import run_ledger
from attacks.games import twins
from attacks.games.canaries import play_canaries
from attacks.games.gradients import DEFAULT_COUNT, Directions
from attacks.games.members import Settings, play_membership
from attacks.games.played import Played
from attacks.membership.members import member_twin
from attacks.options import MEMBER_TWIN, TWIN, WHITE_BOX_TWIN, Options, prepare
from attacks.training import resume_run, start_run
from dpaudit import record, stated, verdict
from dpaudit.config import RunConfig
from dpaudit.documents import (
    ABOUT,
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
from trainers.run import config_sha256

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
    games: list[GameDocument] = field(default_factory=list)

    @property
    def confidence(self) -> float:
        """Of all bounds of the next game together."""
        played = sum(game.game not in ("token path", "step contract") for game in self.games)
        return verdict.confidence_of(played + 1, self.options.confidence)

    def had(self, name: str) -> bool:
        """Whether a game was played already and is not asked for again; says so."""
        number = next((game.name for game in self.games if game.game == name), None)
        if number is None or self.options.again:
            return False
        self.log(f"{name}: played already (release/games/{number}.json); --again plays it with fresh coins")
        return True

    def keep(self, game: str, played: Played, *, about: About, **more: Any) -> None:
        """Write a game down. The caller holds the run's lock."""
        number, previous = record.following(self.games)
        shared: dict[str, Any] = {
            "number": number,
            "previous_sha256": previous,
            "alpha": self.options.alpha,
            "command": self.options.command,
        }
        self.add(played.document(game, about=about, **shared, **more))

    def add(self, document: GameDocument) -> None:
        """Write a game's document down."""
        record.add(self.run, document)
        self.games.append(document)

    def bare(self, game: Any, **content: Any) -> GameDocument:
        """The document of a check without coins."""
        number, previous = record.following(self.games)
        return GameDocument(
            game=game,
            number=number,
            previous_sha256=previous,
            about="weights",
            claim=ClaimDocument.read(self.run.claim).claim,
            coins_sha256=None,
            alpha=self.options.alpha,
            command=self.options.command,
            **content,
        )


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
    config = prepare(run, options)
    chosen = options.named(config)
    if not options.audits and not config.canaries.count:
        log(f"{path}: trained without canaries; --canaries trains {TWIN} with them and audits that")
    session = _Session(run, config, options, reporter, log, processes, executor, list(record.read(run)))
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
        document = assemble(run, session.games, options)
        run.write(document)
    return document


def assemble(run: RunFolder, games: list[GameDocument], options: Options) -> AuditDocument:
    """The document of all games of a run, with the run's own ledger."""
    fusion = next((game.fusion for game in reversed(games) if game.fusion is not None), None)
    ledger = LedgerDocument.read(run.ledger)
    claim = ClaimDocument.read(run.claim).claim
    return verdict.document(
        run=RunInfo(
            name=run.path.resolve().name,
            method=run.read_config().method,
            config_sha256=config_sha256(run),
            coins_sha256=ledger.coins_sha256,
            command=options.command,
        ),
        claim=claim,
        alpha=options.alpha,
        confidence=options.confidence,
        games=games,
        ledger=(*run_ledger(ledger.rows, fusion), *stated.rows(claim, run.read_config())),
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
        session.keep("canaries", played, about=about, claim=claim, supplied=supplied)


def _with_canaries(session: _Session) -> tuple[RunFolder, About, bool]:
    """What the canary game is played on, what that speaks of, and whether it lay there before this audit: the run
    itself, the twin of an audit that was interrupted, or a twin trained now."""
    config, options = session.config, session.options
    again = any(game.game == "canaries" for game in session.games)
    if config.canaries.count and not again:
        return session.run, "weights", False
    place = twins.latest(session.run, TWIN)
    if place is not None and not again and RunFolder(place).config.is_file():
        twin = RunFolder.open(place)
        if not twin.finished:
            session.log(f"going on with {place}")
            if twin.ledger.exists():
                twin = resume_run(place, reporter=session.reporter)
            else:  # it was stopped before its first step
                twin = start_run(twin.read_config(), place, reporter=session.reporter)
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
    if not config.canaries.count or any(game.game == "membership" for game in session.games):
        again = any(game.game == "membership" for game in session.games)
        place = run.path / MEMBER_TWIN if not again else twins.free(run, MEMBER_TWIN)
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
        session.keep("membership", play_membership(run, settings), about=about, claim=claim, supplied=supplied)


def _white_box(session: _Session) -> None:
    if session.had("white-box"):
        return
    options = session.options
    count = options.count or DEFAULT_COUNT
    place = twins.free(session.run, WHITE_BOX_TWIN)
    session.log(f"training a twin with {count} gradient canaries in {place}: audits {ABOUT['procedure']}")
    played, claim = twins.play_white_box(
        twins.config_of(session.config, place),
        place,
        count=count,
        confidence=session.confidence,
        alpha=options.alpha,
        directions=cast(Directions, options.directions),
        final=options.final_only,
        reporter=session.reporter,
    )
    with session.run.lock():
        session.keep("white-box", played, about="procedure", claim=claim)


def _fusion(session: _Session) -> None:
    from attacks.fusion.audit import audit_fusion, record

    with session.run.lock():
        result = audit_fusion(session.run, log=session.log)
        record(session.run, result)
        session.add(session.bare("token path", fusion=result))


def _contract(session: _Session) -> None:
    with session.run.lock():
        session.add(session.bare("step contract", contract=contract(session.config, session.log)))


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
