"""`audit`: a run in, an AuditDocument out. What was run is what the document holds; nothing is carried over.

An audit without canaries of its own trains a twin with them first: the same configuration, fresh key, canaries added.
It then speaks of the training procedure and not of the weights that were released.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from attacks.canary_audit import CanaryAudit, audit_canaries
from attacks.membership.audit import Settings, audit_membership
from attacks.membership.members import member_twin
from attacks.options import MEMBER_TWIN, TWIN, Options, prepare
from attacks.training import resume_run, start_run
from attacks.white_box import DEFAULT_COUNT, Directions, audit_twin, train_twin
from attacks.white_box import TITLE as WHITE_BOX
from dpaudit import accounting, stated
from dpaudit.bounds import pld
from dpaudit.claims import decide
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import (
    AuditDocument,
    Claim,
    ClaimDocument,
    ContractAudit,
    FusionAudit,
    LedgerDocument,
    LedgerRow,
    RunInfo,
    Validity,
)
from dpaudit.executors import Executor
from dpaudit.runs import RunFolder, discard
from trainers import data
from trainers.plan import make_plan
from trainers.progress import Reporter
from trainers.run import config_sha256, read_config

TWIN_COUNT = 300
CONTRACT_UNITS = 24
SIGMA_REDUCTION = 0.3
THESE_WEIGHTS = "these weights"
PROCEDURE = "the training procedure, not these weights"


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
    target, about = run, THESE_WEIGHTS
    if "canaries" in chosen:
        target, about = _with_canaries(run, config, options, reporter, log)
    white = _white_box_twin(run, config, options, reporter, log) if "white-box" in chosen else None
    members = _membership_target(run, config, options, reporter, log) if "mia" in chosen else None
    games = ("canaries" in chosen) + (white is not None) + (members is not None)
    confidence = 1.0 - (1.0 - options.confidence) / max(1, games)  # the games share one error budget
    with run.lock():
        parts = []
        if "canaries" in chosen:
            log("scoring canaries against the base model")
            parts.append(
                audit_canaries(
                    target,
                    claim=ClaimDocument.read(target.claim).claim,
                    delta=config.privacy.delta,
                    confidence=confidence,
                    alpha=options.alpha,
                    device=options.device,
                )
            )
        if members is not None:
            settings = Settings(
                claim=ClaimDocument.read(members.claim).claim,
                delta=config.privacy.delta,
                confidence=confidence,
                alpha=options.alpha,
                references=options.references,
                processes=processes,
                executor=executor,
                device=options.device,
                log=log,
            )
            parts.append(audit_membership(members, settings))
            if "canaries" not in chosen and members is not run:
                target, about = members, PROCEDURE
        if white is not None:
            log("testing the claim on the white-box scores")
            parts.append(audit_twin(white, confidence=confidence, alpha=options.alpha))
            if "canaries" not in chosen and members is None:
                target, about = white, PROCEDURE
        fusion = _fusion(run, log) if "fusion" in chosen else None
        contract = _contract(config, log) if "contract" in chosen else None
        document = assemble(run, target, about, merge(parts), fusion, contract, options)
        run.write(document)
    return document


def merge(parts: Sequence[CanaryAudit]) -> CanaryAudit | None:
    """Several games as one part of a document: sound only if all are. None for no game."""
    if not parts:
        return None
    return CanaryAudit(
        validity=Validity(
            sound=all(part.validity.sound for part in parts),
            checks=tuple(check for part in parts for check in part.validity.checks),
        ),
        tests=tuple(test for part in parts for test in part.tests),
        scores=tuple(summary for part in parts for summary in part.scores),
        gallery=tuple(item for part in parts for item in part.gallery),
        coins_sha256=parts[0].coins_sha256,
        attacks=tuple(row for part in parts for row in part.attacks),
        exposure=tuple(row for part in parts for row in part.exposure),
        regeneration=tuple(row for part in parts for row in part.regeneration),
    )


def _membership_target(
    run: RunFolder, config: RunConfig, options: Options, reporter: Reporter | None, log: Callable[[str], None]
) -> RunFolder:
    """What the membership game is played on: the run itself where coins decided about its canaries, else a twin in
    which coins decided about the training units."""
    if config.canaries.count:
        return run
    return member_twin(config, run.path / MEMBER_TWIN, reporter=reporter, log=log)


def _white_box_twin(
    run: RunFolder, config: RunConfig, options: Options, reporter: Reporter | None, log: Callable[[str], None]
) -> RunFolder:
    """The run's white-box twin, trained now unless a finished one is there already."""
    place = run.path / options.white_box_twin
    twin = RunFolder(place)
    if twin.config.is_file() and twin.finished and twin.scores.is_file():
        return twin
    if place.exists():
        log(f"{place}: interrupted; its scores cover some steps only, so it starts over")
        discard(place)
    count = options.count or DEFAULT_COUNT
    log(f"training a twin with {count} gradient canaries in {place}: this audits {PROCEDURE}")
    return train_twin(
        config,
        place,
        count=count,
        directions=cast(Directions, options.directions),
        final=options.final_only,
        reporter=reporter,
    )


def _with_canaries(
    run: RunFolder, config: RunConfig, options: Options, reporter: Reporter | None, log: Callable[[str], None]
) -> tuple[RunFolder, str]:
    """The run itself when it was trained with canaries, else its twin, trained now unless it is there already."""
    if config.canaries.count:
        return run, THESE_WEIGHTS
    place = run.path / TWIN
    if RunFolder(place).config.is_file():
        twin = RunFolder.open(place)
        if not twin.finished:
            log(f"going on with {place}")
            begun = twin.ledger.exists()  # else it was stopped before its first step
            twin = (
                resume_run(place, reporter=reporter)
                if begun
                else start_run(read_config(twin), place, reporter=reporter)
            )
        return twin, PROCEDURE
    wanted = twin_config(config, options.count or TWIN_COUNT)
    log(f"training a twin with {wanted.canaries.count} canary candidates in {place}: this audits {PROCEDURE}")
    return start_run(wanted, place, reporter=reporter), PROCEDURE


def twin_config(config: RunConfig, count: int) -> RunConfig:
    """The configuration of a twin. A local set without a reserve has no record to mislabel: the kind is left out."""
    tree = config.model_dump(mode="json", by_alias=True)
    kinds = [
        kind
        for kind in config.canaries.kinds
        if kind != "mislabelled"
        or config.data.reserve
        or (config.data.path is None and config.data.name in (None, "digits"))
    ]
    tree["canaries"] = {"count": count, "kinds": kinds}
    return resolve(tree)


def _fusion(run: RunFolder, log: Callable[[str], None]) -> FusionAudit:
    from attacks.fusion.audit import audit_fusion, record

    result: FusionAudit = audit_fusion(run, log=log)
    record(run, result)
    return result


def _contract(config: RunConfig, log: Callable[[str], None]) -> ContractAudit:
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


def assemble(
    run: RunFolder,
    target: RunFolder,
    about: str,
    canaries: CanaryAudit | None,
    fusion: FusionAudit | None,
    contract: ContractAudit | None,
    options: Options,
) -> AuditDocument:
    """The document: `run` is what was asked about, `target` what was attacked (the run or its twin)."""
    claim = ClaimDocument.read(target.claim).claim
    config = read_config(run)
    ledger = (*_ledger(LedgerDocument.read(target.ledger).rows, fusion), *stated.rows(claim, config))
    part = canaries or CanaryAudit(Validity(sound=True, checks=()))
    verdict, reasons = decide(
        claim=claim,
        alpha=options.alpha,
        family_confidence=options.confidence,
        validity=part.validity,
        tests=part.tests,
        ledger=ledger,
        checks=contract.checks if contract else (),
    )
    if about == PROCEDURE:
        reasons = (*reasons, "Audited a twin of the run: this speaks of " + PROCEDURE + ".")
    elif any(test.name == WHITE_BOX for test in part.tests):
        reasons = (*reasons, "The white-box test was played on a twin: it speaks of " + PROCEDURE + ".")
    return AuditDocument(
        verdict=verdict,
        reasons=reasons,
        claim=claim,
        alternative=alternative(claim) if claim else None,
        alpha=options.alpha,
        family_confidence=options.confidence,
        tests=part.tests,
        validity=part.validity,
        ledger=ledger,
        fusion=fusion,
        contract=contract,
        scores=part.scores,
        gallery=part.gallery,
        attacks=part.attacks,
        exposure=part.exposure,
        regeneration=part.regeneration,
        run=RunInfo(
            name=run.path.resolve().name,
            method=config.method,
            config_sha256=config_sha256(run),
            audits=about,
            coins_sha256=part.coins_sha256,
            command=options.command,
        ),
    )


def _ledger(rows: Sequence[LedgerRow], fusion: FusionAudit | None) -> tuple[LedgerRow, ...]:
    """The run's ledger, with the token path as its tests decided it instead of as construction promises."""
    if fusion is None:
        return tuple(rows)
    from attacks.fusion.verdicts import ledger

    decided = ledger(rows, fusion.cases) if fusion.cases else tuple(rows)
    if fusion.training != "UNACCOUNTED" or any(row.status == "UNACCOUNTED" for row in decided):
        return decided
    # Whatever a part of the audit found, the verdict must see it.
    explanation = f"One record reaches what the model computes about another, first at {fusion.first_leaking_stage}."
    evidence = "; ".join(f"{check.name}: {check.measured}" for check in fusion.checks if check.status == "fail")
    row = LedgerRow(path="isolation of records", status="UNACCOUNTED", explanation=explanation, evidence=evidence)
    return (*decided, row)


def alternative(claim: Claim, reduction: float = SIGMA_REDUCTION) -> str:
    """The wrong claim that the audit must be able to find, in words and figures."""
    text = f"the true sigma is {reduction:.0%} smaller than claimed"
    if claim.noise_multiplier is None or claim.sample_rate is None or claim.steps is None:
        return text
    sigma = float(claim.noise_multiplier) * (1 - reduction)
    if claim.relation == "replace" or claim.noise != "gaussian" or claim.sampling in ("fixed", "shuffle"):
        scheme = claim.sampling if claim.sampling in ("fixed", "shuffle") else "poisson"
        event = accounting.DpSgd(sigma, claim.sample_rate, claim.steps, claim.relation, claim.noise, scheme)
        epsilon = accounting.epsilon(event, claim.delta)
    else:
        epsilon = pld.dp_sgd_epsilon(sigma, claim.sample_rate, claim.steps, claim.delta)
    return f"{text} ({sigma:.3g} instead of {float(claim.noise_multiplier):.3g}: eps {epsilon:.3g} at {claim.delta:g})"


def headline(document: AuditDocument) -> float | None:
    """The largest lower bound on eps that assumes nothing, or only the claimed mechanism; None without a bound."""
    found = [
        float(test.epsilon_lower)
        for test in document.tests
        if test.epsilon_lower is not None and not test.estimate and test.assumes in ("none", "claimed-mechanism")
    ]
    return max(found, default=None)
