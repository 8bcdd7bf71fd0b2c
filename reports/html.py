"""One self-contained HTML page over one or more runs.

No script, no external request, no inline style attribute: the page's own CSP allows one style sheet by its hash and
pictures from data: addresses, nothing else. The same released files give the same bytes.
"""

import base64
import binascii
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from markupsafe import Markup

from dpaudit import __version__
from dpaudit.documents import Document, Number, Part, RocPoint, ScoreSummary, Thumbnail, Verdict
from dpaudit.errors import UsageError
from reports import figures, prose, text, utility
from reports.diagram import diagram, evidence_bar, scale_top
from reports.inputs import Curve, RunReport
from reports.svg import StyleSheet

TEMPLATES = Path(__file__).parent / "templates"
SIZE_LIMIT = 500_000  # bytes; contract: a page that mail systems and reviewers accept
TABLE_POINTS = 40  # rows of a figure's data table; the embedded JSON holds all
PICTURE_BYTES = 12_000
CONTENTS = (
    ("verdicts", "Verdicts"),
    ("claims", "What is claimed"),
    ("ledger", "Where private data is touched"),
    ("audit", "What the audit found"),
    ("utility", "What privacy cost in accuracy"),
    ("gallery", "Canaries"),
    ("limits", "Limits"),
    ("environment", "Environment and reproduction"),
)


class ReportRun(Part):
    """One run of a report, as a machine reads it."""

    key: str
    name: str
    method: str
    verdict: Verdict | None
    claimed_epsilon: Number | None
    delta: float | None
    epsilon_lower: Number | None
    ceiling: Number | None
    confidence: float | None
    exact_match: float | None


class ReportDocument(Document):
    """What `dpaudit report --json` prints."""

    kind: ClassVar[str] = "report"
    path: str
    bytes: int
    sha256: str
    title: str
    runs: tuple[ReportRun, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detail:
    """How much of a page is written; less of it when many runs would make it too large."""

    scores_embedded: bool = True
    documents_embedded: bool = True
    pictures: int = 24
    table_points: int = TABLE_POINTS

    @property
    def left_out(self) -> tuple[str, ...]:
        notes = ["the pictures of canaries"]
        if not self.documents_embedded:
            return ("everything but the summary of each run, to keep the page small",)
        return (
            (*notes, "histograms and ROC points, to keep the page small") if not self.scores_embedded else tuple(notes)
        )


DETAILS = (
    Detail(),
    Detail(scores_embedded=False, pictures=12, table_points=20),
    Detail(scores_embedded=False, pictures=3, table_points=10),
    Detail(scores_embedded=False, pictures=0, table_points=5),
    Detail(scores_embedded=False, documents_embedded=False, pictures=0, table_points=5),
)


def render(runs: Sequence[RunReport], *, title: str, show_examples: bool = False) -> tuple[str, Detail]:
    """The page as text, with as much detail as fits into `SIZE_LIMIT`; UsageError if the least doesn't."""
    size = 0
    for detail in DETAILS:
        page = _render(runs, title=text.clean(title, 160), show_examples=show_examples, detail=detail)
        size = len(page.encode())
        if size < SIZE_LIMIT:
            return page, detail
    raise UsageError(
        f"RUN: {len(runs)} runs make a page of {text.file_size(size)}; accepted: under "
        f"{text.file_size(SIZE_LIMIT)}, so give fewer runs"
    )


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
                exact_match=measured.metric.value if measured is not None else None,
            )
        )
    return tuple(rows)


def _render(runs: Sequence[RunReport], *, title: str, show_examples: bool, detail: Detail) -> str:
    styles = StyleSheet()
    tables = utility.tables(runs)
    drawn = _figures(runs, tables, styles, detail)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8") + styles.css()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            title=title,
            policy=Markup(policy),  # made here from a base64 digest; quotes must stay quotes inside the attribute
            style=Markup(style),
            limit_sentence=prose.LIMIT,
            contents=CONTENTS,
            runs=runs,
            verdict_rows=_verdict_rows(runs, tables[0] if tables else None),
            verdict_meaning=prose.VERDICT_MEANING,
            claim_groups=_claim_groups(runs),
            ceiling_note=prose.ceiling_note,
            limits=prose.limits(runs),
            figures=drawn,
            tables=tables,
            measured=[run for run in runs if run.benchmark is not None],
            question_count=_question_count,
            galleries=_galleries(runs, detail.pictures),
            show_examples=show_examples,
            embedded=_embedded(runs, detail),
            left_out=", without " + " and ".join(detail.left_out),
        )
    )


def environment() -> jinja2.Environment:
    """The template environment: everything is escaped, an unknown name is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=text.number,
        percent=text.percent,
        confidence=text.confidence,
        p_value=text.p_value,
        clean=text.clean,
        clean_lines=lambda value: "\n".join(
            line[: len(line) - len(line.lstrip(" "))] + text.clean(line, 400) for line in str(value).split("\n")
        ),
        plural=text.plural,
        file_size=text.file_size,
        points=lambda value: "–" if value is None else f"{100 * value:+.1f} points".replace("-", "−"),
        shell=shlex.quote,
    )
    return env


def _verdict_rows(runs: Sequence[RunReport], table: utility.TaskTable | None) -> list[dict[str, Any]]:
    top = scale_top([(run.headline, run.claim) for run in runs if run.headline is not None])
    return [
        {
            "run": run,
            "utility": utility.utility(run, runs, table),
            "note": prose.ceiling_note(run.headline, run.claim) if run.headline is not None else None,
            "evidence": evidence_bar(run.headline, run.claim, top) if run.headline is not None else "",
        }
        for run in runs
    ]


def _claim_groups(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Runs that make word for word the same statement share it: readers compare what differs."""
    groups: list[dict[str, Any]] = []
    for run in runs:
        paragraphs, open_items = prose.claim_paragraphs(run), prose.not_covered(run)
        curve = run.claim.curve if run.claim is not None else ()
        said = (paragraphs, open_items, curve)
        same = next((g for g in groups if (g["paragraphs"], g["open_items"], g["curve"]) == said), None)
        if same is None:
            groups.append({"runs": [run], "paragraphs": paragraphs, "open_items": open_items, "curve": curve})
        else:
            same["runs"].append(run)
    return groups


@dataclass(frozen=True)
class ScoreFigures:
    """The two figures of a game and the numbers of their data tables."""

    summary: ScoreSummary
    histogram: Markup
    roc: Markup
    bins: tuple[tuple[float, float, int, int], ...]
    points: tuple[RocPoint, ...]
    banded: bool


@dataclass(frozen=True)
class Figures:
    """All drawings of a page, by run letter or task."""

    diagrams: dict[str, Markup]
    scores: dict[str, ScoreFigures]
    frontiers: dict[str, dict[str, Any]]
    curves: dict[str, tuple[tuple[Curve, Markup], ...]]


def _figures(
    runs: Sequence[RunReport], tables: Sequence[utility.TaskTable], styles: StyleSheet, detail: Detail
) -> Figures:
    diagrams, scores, curves = {}, {}, {}
    for run in runs:
        key = run.key.lower()
        if run.ledger:
            diagrams[run.key] = diagram(run.config, run.claim, run.ledger, key=f"flow-{key}")
        if run.audit is not None and run.audit.scores:
            scores[run.key] = _score_figures(run, key, styles, detail)
        if run.curves:
            curves[run.key] = tuple(
                (data, figures.curve(data, key=f"curve-{key}-{index}", styles=styles))
                for index, data in enumerate(run.curves[:8])
            )
    frontiers = {}
    for index, table in enumerate(tables):
        points = utility.frontier_points(runs, table)
        if points:
            drawing = figures.frontier(points, table.base, key=f"frontier-{index}", styles=styles)
            by_key = {run.key: run for run in runs}
            legend = [
                {"mark": figures.legend_mark(position), "run": by_key[point.key]}
                for position, point in enumerate(points)
            ]
            base = figures.BASE_MARK if table.base is not None else None
            frontiers[table.task] = {"svg": drawing, "points": points, "legend": legend, "base": base}
    return Figures(diagrams, scores, frontiers, curves)


def _score_figures(run: RunReport, key: str, styles: StyleSheet, detail: Detail) -> ScoreFigures:
    assert run.audit is not None
    summary = run.audit.scores[0]
    stride = max(1, math.ceil(len(summary.roc) / detail.table_points))
    return ScoreFigures(
        summary=summary,
        histogram=figures.histogram(summary, key=f"scores-{key}", styles=styles),
        roc=figures.roc(summary, run.claim, key=f"roc-{key}", styles=styles),
        bins=tuple(zip(summary.edges, summary.edges[1:], summary.counts_in, summary.counts_out, strict=False)),
        points=summary.roc[::stride],
        banded=any(point.tpr_low is not None and point.tpr_high is not None for point in summary.roc),
    )


def _question_count(table: utility.TaskTable, metric: str) -> str:
    counts = {column.metrics[metric].n for column in table.columns if metric in column.metrics}
    return " / ".join(f"{count:,}" for count in sorted(counts)) or "–"


def _galleries(runs: Sequence[RunReport], limit: int) -> list[tuple[list[RunReport], list[dict[str, Any]], int]]:
    """Canary pictures by runs that share them: runs of one seed have the same candidates."""
    shared: dict[tuple[Thumbnail, ...], list[RunReport]] = {}
    for run in runs:
        if run.gallery:
            shared.setdefault(run.gallery, []).append(run)
    found = []
    for gallery, owners in shared.items():
        shown = [{**item.model_dump(), "source": _picture(item)} for item in gallery[:limit]]
        found.append((owners, shown, len(gallery) - len(shown)))
    return found


def _picture(item: Thumbnail) -> str | None:
    """A data: address for a small PNG; None when the bytes are anything else."""
    try:
        data = base64.b64decode(item.png_base64, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > PICTURE_BYTES:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _embedded(runs: Sequence[RunReport], detail: Detail) -> Markup:
    """The documents as JSON that can't end its script element: every <, > and & is written as an escape."""
    summary = {run.key: row.model_dump(mode="json") for run, row in zip(runs, summarise(runs), strict=True)}
    entries = []
    for run in runs:
        entry: dict[str, Any] = {"summary": summary[run.key], "notices": list(run.notices)}
        entry["files"] = {file.name: file.sha256 for file in run.files}
        if detail.documents_embedded:
            documents = (run.claim_document, run.ledger_document, run.audit, run.benchmark, run.environment)
            entry["documents"] = {d.kind: _trimmed(d, detail) for d in documents if d is not None}
        entries.append(entry)
    report = {"kind": "report", "schema_version": 1, "dpaudit": __version__, "runs": entries}
    raw = json.dumps(report, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        raw = raw.replace(character, f"\\u{ord(character):04x}")
    return Markup(raw)


def _trimmed(document: Document, detail: Detail) -> dict[str, Any]:
    data = document.model_dump(mode="json", by_alias=True)
    data.pop("gallery", None)
    if not detail.scores_embedded:
        for summary in data.get("scores", []):
            for field in ("edges", "counts_in", "counts_out", "roc"):
                summary.pop(field)
    return data
