"""The judge, run again over what a run recorded: a page takes no verdict on trust.

`audit.json` is a pure function of the recorded games, the claim and the run's ledger, so it is computed here anew.
Where the two differ the page shows what the documents give, and a notice says what `audit.json` said.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from attacks.fusion.verdicts import run_ledger
from dpaudit import record, stated, verdict
from dpaudit.config import RunConfig
from dpaudit.documents import (
    AuditDocument,
    Check,
    Claim,
    ClaimDocument,
    GameDocument,
    LedgerDocument,
    LedgerRow,
    RunInfo,
)
from reports.text import clean, plural

CONFIDENCE = 0.95  # of all bounds, where no audit.json says it: the default of `dpaudit audit`
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
    if ledger is not None:
        rows = (*rows, *stated.rows(claimed, config))
    found = verdict.document(
        run=audit.run if audit is not None and audit.run is not None else run,
        claim=claimed,
        alpha=audit.alpha if audit is not None else games[-1].alpha,
        confidence=audit.family_confidence if audit is not None else CONFIDENCE,
        games=games,
        ledger=rows,
        checks=_beside(games, audit),
    )
    return Judged(found, games, _differences(audit, found, rows))


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
