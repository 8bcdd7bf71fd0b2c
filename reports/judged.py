"""The judge, run again over what a run recorded: a page takes no verdict on trust.

`audit.json` is a pure function of the recorded games, the claim and the run's ledger, so it is computed here anew.
Where the two differ the page shows what the documents give, and a notice says what `audit.json` said.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attacks.fusion.verdicts import run_ledger
from dpaudit import record, stated, verdict
from dpaudit.config import RunConfig
from dpaudit.documents import (
    WITHOUT_COINS,
    AuditDocument,
    Check,
    Claim,
    ClaimDocument,
    GameDocument,
    LedgerDocument,
    LedgerRow,
    RunInfo,
    Test,
    Verdict,
)
from reports.text import clean, plural

# The defaults of `dpaudit audit`. CONFIDENCE: of all bounds, where no audit.json says it.
CONFIDENCE, ALPHA = 0.95, 0.001
NO_LEDGER = LedgerRow(
    path="missing ledger",
    status="UNACCOUNTED",
    explanation="The run has no ledger, so where private data was touched is not stated.",
    evidence="release/ledger.json: missing",
)
# What the games alone determine, and a name for it.
_OF_GAMES = {
    "tests": "tests",
    "validity": "checks of validity",
    "controls": "controls",
    "scores": "summaries of scores",
    "fusion": "token path",
    "contract": "step contract",
    "attacks": "attacks",
    "exposure": "exposure",
    "regeneration": "answers",
}


@dataclass(frozen=True)
class Judged:
    """The audit as the documents give it, the games behind it, and where audit.json says something else."""

    audit: AuditDocument | None = None
    games: tuple[GameDocument, ...] = ()
    notices: tuple[str, ...] = ()


def judge(
    release: Path,
    *,
    claim: ClaimDocument | None,
    ledger: LedgerDocument | None,
    audit: AuditDocument | None,
    run: RunInfo,
    config: RunConfig | None = None,
) -> Judged:
    """Judge the games under `release`. run: which run it is, where audit.json is missing; config: of the run, against
    which the claim is held (dpaudit.stated).

    UsageError (one line naming the file) when a recorded game was edited, taken out or moved.
    """
    games = record.read_release(release)
    if not games:
        return Judged(audit)
    fusion = next((game.fusion for game in reversed(games) if game.fusion is not None), None)
    rows = run_ledger(ledger.rows, fusion) if ledger is not None else audit.ledger if audit is not None else ()
    claimed = _claim(claim, audit)
    rows = (*_plain(rows), *priced(release, claimed, config, ledger, games))
    if ledger is None and claimed is not None:
        rows = (*rows, NO_LEDGER)
    found = verdict.document(
        run=audit.run if audit is not None and audit.run is not None else run,
        claim=claimed,
        alpha=verdict.level(games),
        confidence=_confidence(games, audit),
        games=games,
        ledger=rows,
        checks=_beside(games, audit),
    )
    return Judged(found, games, (*_levels(audit, found), *_differences(audit, found, rows)))


def alone(said: AuditDocument) -> Judged:
    """A document that is shown without the games behind it: what its own fields say about the verdict that it states.

    Its verdict stands unless its fields contradict it. Documents of version 1 hold no evidence: their tests count for
    nothing, so what was supported by them no longer is.
    """
    tests = verdict.marked(said.tests, said.alpha)
    notices = []
    if said.schema_version > 1 and tests != said.tests:
        notices.append("Tests of the document are marked otherwise than their own e-values and p-values say.")
    found = _verdict_of_fields(said, tests)
    if found == said.verdict:
        return Judged(said, notices=tuple(notices))
    old = " (made before controls were required, so no power counts)" if said.schema_version == 1 else ""
    notices.append(f"The document says “{said.verdict}”; its own fields give “{found}”{old}.")
    reason = "The verdict that the document states is contradicted by its own fields."
    return Judged(
        said.model_copy(update={"verdict": found, "reasons": (reason,), "tests": tests}), notices=tuple(notices)
    )


def _verdict_of_fields(said: AuditDocument, tests: Sequence[Test]) -> Verdict:
    """The verdict that a document's fields leave; the stated one where they leave several."""
    if said.schema_version == 1:
        return "inconclusive" if said.verdict == "not refuted" else said.verdict
    failed = any(check.status == "fail" for check in said.validity.checks)
    if not said.validity.sound or failed:
        return "invalid"
    assures = said.verdict in ("not refuted", "inconclusive", "no claim", "invalid")
    if said.claim is None:
        return "no claim" if assures else said.verdict
    if verdict.refutes(_log_evidence(said, tests), said.alpha):
        return "refuted"
    checks = said.contract.checks if said.contract is not None else ()
    gaps = [
        *(row for row in said.ledger if row.status == "UNACCOUNTED"),
        *(item for item in said.controls if item.broken),
    ]
    # The contract shown is the latest: an earlier one may have failed.
    if gaps or any(c.status == "fail" and c.waived is None for c in checks) or said.verdict == "unsupported":
        return "unsupported"
    return "not refuted" if said.verdict == "not refuted" and any(map(verdict.powerful, tests)) else "inconclusive"


def _log_evidence(said: AuditDocument, tests: Sequence[Test]) -> float:
    """As stated; of a single game at least that of each of its tests."""
    log = said.log_evidence or 0.0
    if len(said.games) > 1:
        return log
    staked = [test.share * float(test.e_value or 0.0) for test in tests if verdict.counts(test)]
    return max([log, *(math.log(value) for value in staked if value > 0)])


def priced(
    release: Path,
    claim: Claim | None,
    config: RunConfig | None,
    ledger: LedgerDocument | None,
    games: Sequence[GameDocument],
) -> tuple[LedgerRow, ...]:
    """The claim of a release against its own mechanism, configuration and ledger (dpaudit.stated.rows)."""
    # What the audit of a foreign trainer or model leaves has neither a model nor a budget of its own.
    own = (release / "model").exists() or (ledger is not None and ledger.spent is not None)
    named = any(game.claim is not None for game in games)
    return stated.rows(claim, config, ledger=ledger, named=named, own=own)


def _confidence(games: Sequence[GameDocument], audit: AuditDocument | None) -> float:
    """Of all bounds together: what audit.json says, unless the bounds of a game have not that confidence together."""
    if audit is None:
        return CONFIDENCE
    for number, game in enumerate((game for game in games if game.game not in WITHOUT_COINS), 1):
        bounds = [t for t in game.tests if t.epsilon_lower is not None and t.decides and not t.estimate]
        missed = sum(1 - test.confidence for test in bounds)
        if missed > 1 - verdict.confidence_of(number, audit.family_confidence) + 1e-9 and game.game != "earlier audit":
            return CONFIDENCE
    return audit.family_confidence


def _levels(said: AuditDocument | None, found: AuditDocument) -> tuple[str, ...]:
    """Where audit.json states other levels than its games, or all of them one that hides what they found."""
    notices = []
    if said is not None and said.alpha != found.alpha:
        notices.append(f"audit.json states alpha = {said.alpha:g}; its games were played at {found.alpha:g}.")
    if said is not None and said.family_confidence != found.family_confidence:
        notices.append(f"audit.json states a confidence of {said.family_confidence:g}, which its bounds do not have.")
    log = found.log_evidence
    if found.verdict != "refuted" and log is not None and verdict.refutes(log, ALPHA) and found.validity.sound:
        notices.append(
            f"The evidence refutes the claim at the usual alpha = {ALPHA:g}; it was judged at {found.alpha:g}."
        )
    return tuple(notices)


def _plain(rows: Iterable[LedgerRow]) -> tuple[LedgerRow, ...]:
    """Without what the price of the claim decides anew."""
    return tuple(row for row in rows if row.path not in stated.ROWS)


def _beside(games: tuple[GameDocument, ...], audit: AuditDocument | None) -> tuple[Check, ...]:
    """Checks of the audit as a whole, which no game records: how the coins were drawn, what was not offered. They are
    shown as they were said; the judge reads those of the games."""
    recorded = {check.name for game in games for check in game.validity.checks}
    return tuple(check for check in audit.validity.checks if check.name not in recorded) if audit is not None else ()


def _claim(claim: ClaimDocument | None, audit: AuditDocument | None) -> Claim | None:
    if claim is not None:
        return claim.claim
    return audit.claim if audit is not None else None


def _differences(said: AuditDocument | None, found: AuditDocument, rows: tuple[LedgerRow, ...]) -> tuple[str, ...]:
    if said is None:
        return (f"There is no audit.json; the verdict here is that of {plural(len(found.games), 'recorded game')}.",)
    notices = []
    if said.games and len(said.games) < len(found.games):
        notices.append(f"audit.json counts {len(said.games)} of {len(found.games)} recorded games; here all count.")
    if said.verdict != found.verdict:
        why = _why(said, rows)
        notices.append(f"audit.json says “{said.verdict}”; its documents give “{found.verdict}”{why}.")
    elif len(said.games) == len(found.games):
        names = [name for field, name in _OF_GAMES.items() if getattr(said, field) != getattr(found, field)]
        if not _close(said.log_evidence, found.log_evidence):
            names.append("evidence")
        if names:
            notices.append(f"audit.json differs from what its documents give: {', '.join(names)}.")
    return tuple(notices)


def _why(said: AuditDocument, rows: tuple[LedgerRow, ...]) -> str:
    """What happened since audit.json was written, where that explains another verdict."""
    if not said.games:
        return " (made before controls were required, so no power counts)"
    judged = {row.path for row in said.ledger}
    added = [clean(row.path, 60) for row in rows if row.status == "UNACCOUNTED" and row.path not in judged]
    return f" (UNACCOUNTED in the ledger since: {', '.join(added[:5])})" if added else ""


def _close(one: float | None, other: float | None) -> bool:
    """Logarithms may differ in the last digit from one machine to another."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
