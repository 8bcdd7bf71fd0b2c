"""A page as data: what `dpaudit report --json` prints, what lies inside the page, what a later page is held against."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from markupsafe import Markup
from pydantic import Field

from dpaudit import __version__
from dpaudit.documents import SCHEMA_VERSION, Document, LedgerStatus, Metric, Number, Part, Verdict
from reports import utility
from reports.inputs import RunReport
from reports.subjects import BugsReport, CheckReport, Page
from reports.sweep.document import SweepRow

ELEMENT = "dpaudit-report"


class ReportRun(Part):
    """One run of a page, as a machine reads it: enough for a later page to say what changed."""

    key: str
    name: str
    method: str
    verdict: Verdict | None
    claimed_epsilon: Number | None
    delta: float | None
    epsilon_lower: Number | None
    ceiling: Number | None
    confidence: float | None
    accuracy: Metric | None = Field(description="On the first task, the measure that stands for it.")
    task: str | None = None
    measure: str = Field(default="exact match", description="What `accuracy` counts.")
    sample_sha256: str | None = None
    ledger: dict[str, LedgerStatus] = Field(default_factory=dict, description="Place -> status.")
    failed: tuple[str, ...] = Field(default=(), description="Checks of game, token path and contract that failed.")
    signature: Literal["unsigned", "signed", "invalid"] = "unsigned"
    key_sha256: str | None = Field(default=None, description="Fingerprint of the key that signed the release.")


class ReportSweep(Part):
    """A sweep of a page: its table."""

    name: str
    rows: tuple[SweepRow, ...]
    sample_sha256: str | None


class ReportCheck(Part):
    """A step contract, or the planted-bug benchmark, given by itself."""

    key: str
    name: str
    kind: Literal["check", "bugs"]
    verdict: Literal["pass", "fail", "inconclusive"] | None
    failed: tuple[str, ...] = Field(description="Checks that failed; bugs that nothing caught.")


class Change(Part):
    """One difference from an earlier page."""

    subject: str
    what: str
    before: str
    after: str
    direction: Literal["better", "worse", "changed", "within intervals"]


class ReportDocument(Document):
    """What `dpaudit report --json` prints."""

    kind: Literal["report"] = "report"
    path: str
    bytes: int
    sha256: str
    title: str
    runs: tuple[ReportRun, ...]
    sweeps: tuple[ReportSweep, ...] = ()
    checks: tuple[ReportCheck, ...] = ()
    changes: tuple[Change, ...] | None = Field(default=None, description="From the page of --against; null: not asked.")
    left_out: tuple[str, ...] = ()


def summarise(runs: Sequence[RunReport]) -> tuple[ReportRun, ...]:
    """The verdict strip as data."""
    tables = utility.tables(runs)
    table = tables[0] if tables else None
    rows = []
    for run in runs:
        measured = utility.utility(run, runs, table)
        test = run.headline
        rows.append(
            ReportRun(
                key=run.key,
                name=run.name,
                method=run.method,
                verdict=run.verdict,
                claimed_epsilon=run.claim.epsilon if run.claim is not None else None,
                delta=run.claim.delta if run.claim is not None else None,
                epsilon_lower=test.epsilon_lower if test is not None else None,
                ceiling=test.ceiling if test is not None else None,
                confidence=run.headline_confidence,
                accuracy=measured.metric if measured is not None else None,
                task=table.task if measured is not None and table is not None else None,
                measure=table.headline.replace("_", " ") if table is not None else "exact match",
                sample_sha256=_sample(run, table) if measured is not None else None,
                ledger={row.path: row.status for row in run.ledger},
                failed=failed_checks(run),
                signature=run.vouched.status,
                key_sha256=run.vouched.key.sha256 if run.vouched.status == "signed" and run.vouched.key else None,
            )
        )
    return tuple(rows)


def _sample(run: RunReport, table: utility.TaskTable | None) -> str | None:
    return run.benchmark.sample_sha256.get(table.task) if run.benchmark is not None and table is not None else None


def failed_checks(run: RunReport) -> tuple[str, ...]:
    """Names of the checks of a run's audit that failed."""
    if run.audit is None:
        return ()
    fusion = run.audit.fusion.checks if run.audit.fusion is not None else ()
    contract = run.audit.contract.checks if run.audit.contract is not None else ()
    return tuple(c.name for c in (*run.audit.validity.checks, *fusion, *contract) if c.status == "fail")


def summarise_sweeps(page: Page) -> tuple[ReportSweep, ...]:
    """The sweeps' tables as data."""
    return tuple(
        ReportSweep(name=s.name, rows=s.document.rows, sample_sha256=s.document.sample_sha256) for s in page.sweeps
    )


def summarise_checks(page: Page) -> tuple[ReportCheck, ...]:
    """Contracts and planted bugs as data."""
    found = [
        ReportCheck(
            key=item.key,
            name=item.name,
            kind="check",
            verdict=item.document.verdict,
            failed=tuple(c.name for c in item.document.checks if c.status == "fail" and c.waived is None),
        )
        for item in page.checks
    ]
    for bugs in page.bugs:
        missed = tuple(row.name for row in bugs.document.bugs if not row.caught)
        found.append(ReportCheck(key="", name=bugs.name, kind="bugs", verdict=None, failed=missed))
    return tuple(found)


def embed(page: Page, *, scores: bool, documents: bool, changes: Sequence[Change] | None) -> Markup:
    """The page's data as JSON that can't end its script element: every <, > and & is written as an escape.

    scores: with histograms and ROC points; documents: with the documents at all.
    """
    summary = {run.key: row.model_dump(mode="json") for run, row in zip(page.runs, summarise(page.runs), strict=True)}
    entries = []
    for run in page.runs:
        entry: dict[str, Any] = {"summary": summary[run.key], "notices": list(run.notices)}
        entry["files"] = {file.name: file.sha256 for file in run.files}
        if documents:
            own = (run.claim_document, run.ledger_document, run.audit, run.benchmark, run.environment)
            entry["documents"] = {d.kind: _trimmed(d, scores) for d in own if d is not None}
        entries.append(entry)
    report: dict[str, Any] = {
        "kind": "report",
        "schema_version": SCHEMA_VERSION,
        "dpaudit": __version__,
        "runs": entries,
    }
    if page.sweeps:
        report["sweeps"] = [_sweep(item.document.model_dump(mode="json"), documents) for item in page.sweeps]
    if page.checks or page.bugs:
        report["checks"] = [row.model_dump(mode="json") for row in summarise_checks(page)]
        if documents:
            loose: list[CheckReport | BugsReport] = [*page.checks, *page.bugs]
            report["documents"] = [{"name": i.name, i.document.kind: i.document.model_dump(mode="json")} for i in loose]
    if changes is not None:
        report["changes"] = [change.model_dump(mode="json") for change in changes]
    raw = json.dumps(report, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        raw = raw.replace(character, f"\\u{ord(character):04x}")
    return Markup(raw)


def _sweep(tree: dict[str, Any], whole: bool) -> dict[str, Any]:
    return tree if whole else {"name": tree["name"], "rows": tree["rows"], "sample_sha256": tree["sample_sha256"]}


def _trimmed(document: Document, scores: bool) -> dict[str, Any]:
    data = document.model_dump(mode="json", by_alias=True)
    data.pop("gallery", None)
    released = (data.get("fusion") or {}).get("released") or {}
    released.pop("strip_png_base64", None)
    if not scores:
        for summary in data.get("scores", []):
            for field in ("edges", "counts_in", "counts_out", "roc"):
                summary.pop(field)
    return data
