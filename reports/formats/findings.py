"""Everything on a page that can pass or fail, as one flat list that all formats share.

A finding is `pass`, `fail` (a gate should stop), `warn` (a person should look) or `skip` (not made, or can't say). What
counts as failing follows the verdicts: a refuted, unsupported or invalid claim, a failed check, a broken control or a
private path that is UNACCOUNTED beside a claim, and a planted bug that slipped through. Of the tests the judge alone
says which refutes (dpaudit.verdict); one that refutes nothing passes where it had earned power, and is not decided
elsewhere. An inconclusive audit is a warning: nothing was tested, and the exit code for it is 0 unless `--strict`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpaudit.documents import Check, CheckDocument, Test
from dpaudit.verdict import exceeds, powerful
from reports import prose
from reports.embedded import Change
from reports.inputs import RunReport
from reports.subjects import BugsReport, Page, SweepReport
from reports.text import clean, confidence, number, p_value, percent

Outcome = Literal["pass", "fail", "warn", "skip"]


@dataclass(frozen=True)
class Finding:
    """One thing that passed, failed or could not be decided. Texts are single lines without control characters.

    subject: whose (a run, a document); place: the file that says so, as a relative address, and the line in it; rule: a
    stable id. waived: why a failure was waived; its outcome is then `skip`. seconds: what it took, where that is known.
    """

    subject: str
    place: str
    rule: str
    name: str
    outcome: Outcome
    message: str
    help: str
    line: int = 1
    waived: str | None = None
    seconds: float = 0.0


RULES: dict[str, str] = {
    "claim": "The claimed privacy guarantee against the audit's evidence",
    "claim-test": "A statistical test of the claim itself",
    "bound": "The headline lower bound on eps beside the claimed eps; it informs and refutes nothing by itself",
    "control": "What an injected gradient or known records show does not contradict the claim",
    "documents": "The documents of a run fit each other",
    "game": "The game is sound: coins, records and guesses",
    "token-path": "One record's tokens do not reach another record",
    "step-contract": "What one training step must satisfy",
    "ledger": "Every place where private data is touched is accounted for",
    "planted-bug": "A trainer with one deliberate bug is noticed",
    "sweep": "Every cell of a sweep has finished",
    "change": "Nothing got worse since the earlier page",
}


def findings(page: Page, changes: Sequence[Change] | None = None) -> tuple[Finding, ...]:
    """All findings of a page, in its order."""
    found: list[Finding] = []
    for run in page.runs:
        found += _run(run)
    for sweep in page.sweeps:
        found += _sweep(sweep)
    for check in page.checks:
        found += of_contract(check.document, check.name, check.place)
    for bugs in page.bugs:
        found += _bugs(bugs)
    for change in changes or ():
        if change.direction == "worse":
            text = f"{clean(change.what)}: {clean(change.before)} before, {clean(change.after)} now"
            found.append(Finding(clean(change.subject, 80), "", "change", clean(change.what, 120), "warn", text, ""))
    return tuple(found)


def _run(run: RunReport) -> Iterator[Finding]:
    def finding(rule: str, name: str, outcome: Outcome, message: str, help: str = "") -> Finding:
        return Finding(run.name, run.place, rule, name, outcome, message, help)

    for notice in run.notices:
        yield finding("documents", f"documents of the run: {clean(notice, 80)}", "fail", notice)
    if run.audit is None:
        yield finding("claim", "claim", "skip", "not audited")
    else:
        outcome, meaning = _verdict(run)
        reasons = " ".join(clean(reason, 400) for reason in run.audit.reasons)
        yield finding("claim", "claim", outcome, f"{run.audit.verdict}. {meaning} {reasons}".strip(), prose.LIMIT)
        yield from (
            _test(run, test)
            for test in run.audit.tests
            if test.decides and not test.estimate and test.refutes is not None
        )
        yield from _bound(run)
        for control in (item for item in run.audit.controls if item.broken):
            text = f"broken: measured {clean(control.measured, 400)}; allowed {clean(control.allowed, 400)}"
            outcome = "fail" if run.claim is not None else "warn"
            yield finding("control", clean(control.name, 120), outcome, text, clean(control.explanation, 600))
        fusion = run.audit.fusion.checks if run.audit.fusion is not None else ()
        contract = run.audit.contract.checks if run.audit.contract is not None else ()
        groups = (("game", run.audit.validity.checks), ("token-path", fusion), ("step-contract", contract))
        for rule, checks in groups:
            yield from (_check(run.name, run.place, rule, check) for check in checks)
    for row in run.ledger:
        bad = row.status == "UNACCOUNTED"
        outcome = ("fail" if run.claim is not None else "warn") if bad else "pass"
        text = f"{row.status}: {clean(row.explanation, 600)}"
        yield finding("ledger", clean(row.path, 120), outcome, text, clean(row.evidence, 600))


def _verdict(run: RunReport) -> tuple[Outcome, str]:
    assert run.audit is not None
    outcome: Outcome = "pass"
    if run.audit.verdict in ("refuted", "unsupported", "invalid"):
        outcome = "fail"
    elif run.audit.verdict == "inconclusive":
        outcome = "warn"
    elif run.audit.verdict == "no claim":
        outcome = "skip"
    return outcome, prose.VERDICT_MEANING[run.audit.verdict]


def _test(run: RunReport, test: Test) -> Finding:
    """A test of the claim, as the judge marked it."""
    name = f"{clean(test.name, 120)} ({clean(test.bound, 60)})"
    said = f" ({clean(test.statement, 300)})" if test.statement is not None else ""
    shown = f", p = {p_value(test.p_value)}" if test.p_value is not None else ""
    able = f"power {percent(test.power, 0)}" if test.power is not None else "no power earned"
    decided = f"{'refutes' if test.refutes else 'does not refute'} by itself at level {number(test.level)}"
    text = f"e = {number(test.e_value)}{shown}{said}; {decided}; {able}"
    outcome: Outcome = "fail" if test.refutes else "pass" if powerful(test) else "skip"
    return Finding(run.name, run.place, "claim-test", name, outcome, text, clean(test.control or "", 300))


def _bound(run: RunReport) -> Iterator[Finding]:
    """The headline bound: above the claim it deserves a look, below it nothing follows."""
    test = run.headline
    if test is None or run.audit is None:
        return
    name = f"{clean(test.name, 120)} ({clean(test.bound, 60)})"
    claimed = run.claim.epsilon if run.claim is not None else math.inf
    outcome: Outcome = "warn" if exceeds(run.audit, claimed) else "skip"
    text = (
        f"eps ≥ {number(test.epsilon_lower)} with confidence {confidence(run.headline_confidence)}, ceiling "
        f"{number(test.ceiling)}, claimed {number(claimed)}"
    )
    yield Finding(run.name, run.place, "bound", name, outcome, text, "")


def of_contract(document: CheckDocument, name: str, place: str = "") -> tuple[Finding, ...]:
    """A step contract, at the factory's source line where the document names it."""
    source, line = document.factory, 1
    if source is not None:
        name, place, line = clean(source.name, 80), clean(source.file or place, 200), source.line
    found = [
        replace(_check(name, place, "step-contract", check), line=line, seconds=document.seconds.get(check.name, 0.0))
        for check in document.checks
    ]
    if document.problem is not None:
        what, problem = "the trainer can be tested", clean(document.problem, 400)
        found.append(Finding(name, place, "step-contract", what, "fail", problem, "", line=line))
    return tuple(found)


def _check(subject: str, place: str, rule: str, check: Check) -> Finding:
    outcome: Outcome = {"pass": "pass", "fail": "fail", "not applicable": "skip"}[check.status]  # type: ignore[assignment]
    text = f"measured {clean(check.measured, 400)}; allowed {clean(check.allowed, 400)}"
    waived = clean(check.waived, 400) if check.waived is not None and outcome == "fail" else None
    if waived is not None:
        outcome, text = "skip", f"waived: {waived}; {text}"
    help = clean(check.explanation, 600)
    return Finding(subject, place, rule, clean(check.name, 120), outcome, text, help, waived=waived)


def _sweep(sweep: SweepReport) -> Iterator[Finding]:
    for cell in sweep.document.cells:
        name = f"{clean(cell.configuration, 100)}, seed {cell.seed}"
        outcome: Outcome = {"finished": "pass", "failed": "fail"}.get(cell.state, "warn")  # type: ignore[assignment]
        text = clean(cell.error, 400) if cell.error is not None else cell.state
        yield Finding(sweep.name, sweep.place, "sweep", name, outcome, text, "")
    for row in sweep.document.ledger:
        text = f"{row.status}: {clean(row.explanation, 600)}"
        status: Outcome = "warn" if row.status == "UNACCOUNTED" else "pass"
        yield Finding(sweep.name, sweep.place, "ledger", clean(row.path, 120), status, text, clean(row.evidence, 600))


def _bugs(bugs: BugsReport) -> Iterator[Finding]:
    for row in bugs.document.bugs:
        outcome: Outcome = "pass" if row.caught else "skip" if row.why_not is not None else "fail"
        by = ", ".join(clean(name, 60) for name in row.contract[:5])
        text = (
            f"caught by {by or 'the white-box game'}" if row.caught else clean(row.why_not or "nothing noticed it", 400)
        )
        help = f"{clean(row.what, 400)} (source: {clean(row.source, 200)})"
        yield Finding(bugs.name, bugs.place, "planted-bug", clean(row.name, 120), outcome, text, help)


def counts(found: Iterable[Finding]) -> dict[Outcome, int]:
    """How many of each outcome."""
    total: dict[Outcome, int] = {"pass": 0, "fail": 0, "warn": 0, "skip": 0}
    for finding in found:
        total[finding.outcome] += 1
    return total


def slug(text: str) -> str:
    """Letters, digits and dashes of a text, for ids."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "unnamed"
