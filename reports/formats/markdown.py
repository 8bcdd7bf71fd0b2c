"""A summary for pull requests and job summaries: a few lines and tables of GitHub-flavoured Markdown."""

import re
from collections.abc import Sequence

from reports import prose, utility
from reports.embedded import Change
from reports.figures import describe_interval
from reports.formats.findings import Finding, counts
from reports.inputs import RunReport
from reports.subjects import CheckReport, Page, SweepReport
from reports.sweep.document import Averaged
from reports.text import clean, number, points

MOST_ROWS = 30
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>!|~]|:(?!\s|$))")  # a colon in a word may start an emoji or a link
_BREAK = "\u200b"  # a zero-width space: GitHub turns @name, #1 and www. into links even where they are escaped


def markdown(page: Page, found: Sequence[Finding], *, title: str, changes: Sequence[Change] | None = None) -> str:
    """The summary as text."""
    number_of = counts(found)
    lines = [f"## {escape(title)}", ""]
    lines += [
        f"{number_of['fail']} failed, {number_of['warn']} warnings, {number_of['pass']} passed, "
        f"{number_of['skip']} not decided."
    ]
    lines += ["", *_runs(page.runs)] if page.runs else []
    lines += ["", *_contracts(page.checks)] if page.checks else []
    for sweep in page.sweeps:
        lines += ["", f"### Sweep {escape(sweep.name)}", "", *_sweep(sweep)]
    bad = [finding for finding in found if finding.outcome in ("fail", "warn") and finding.rule != "change"]
    if bad:
        lines += ["", "### Findings", ""]
        lines += [
            f"- **{'fails' if finding.outcome == 'fail' else 'warning'}** {escape(finding.subject)}: "
            f"{escape(finding.name)}. {escape(clean(finding.message, 300))}"
            for finding in bad[:MOST_ROWS]
        ]
        lines += [f"- and {len(bad) - MOST_ROWS} more"] if len(bad) > MOST_ROWS else []
    if changes is not None:
        lines += ["", "### Changes", "", *(_changes(changes) or ["None."])]
    return "\n".join([*lines, "", f"_{prose.LIMIT}_", ""])


def escape(text: str, limit: int = 400) -> str:
    """Foreign text as Markdown text: nothing in it is markup, a link, a mention or a table cell's end."""
    shown = _SPECIAL.sub(r"\\\1", clean(text, limit)).replace("&", "&amp;")
    return re.sub(r"[@#]|(?i:www)(?=\.)", lambda match: match.group() + _BREAK, shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _runs(runs: Sequence[RunReport]) -> list[str]:
    tables = utility.tables(runs)
    rows = []
    for run in runs[:MOST_ROWS]:
        test, measured = run.headline, utility.utility(run, runs, tables[0] if tables else None)
        claim = f"{number(run.claim.epsilon)} at {number(run.claim.delta)}" if run.claim is not None else "none"
        bound = "–" if test is None else f"{number(test.epsilon_lower)} (ceiling {number(test.ceiling)})"
        accuracy = describe_interval(measured.metric) if measured is not None else "–"
        rows.append((escape(run.name), claim, bound, run.verdict or "not audited", accuracy, _signer(run)))
    measure = escape(tables[0].headline.replace("_", " ")) if tables else "exact match"
    return _table(("run", "claimed eps", "audited eps ≥", "verdict", measure, "who vouches"), rows)


def _contracts(checks: Sequence[CheckReport]) -> list[str]:
    """Step contracts by themselves: a table that is read without the page must say which passed, and on what."""
    rows = []
    for check in checks[:MOST_ROWS]:
        made = check.document.checks
        of = {kind: sum(item.status == kind for item in made) for kind in ("pass", "fail", "not applicable")}
        whose = check.document.factory
        name = check.name if whose is None else f"{check.name}: {whose.name}"
        rows.append((escape(name), check.document.verdict, *(str(of[kind]) for kind in of)))
    return _table(("step contract", "verdict", "passed", "failed", "not applicable"), rows)


def _signer(run: RunReport) -> str:
    """Who stands behind the files of a run: a key, which proves no name, or nobody."""
    found = run.vouched
    if found.status == "unsigned" or found.key is None:
        return "nobody (unsigned)"
    key = f"`{found.key.sha256[:16]}…`"
    if found.status == "invalid":
        return f"nobody: the signature by key {key} is **invalid**"
    name = found.statement.signer if found.statement is not None else ""
    return f"key {key}" + (f"; the signer states the name {escape(name, 80)}" if name else "")


def _sweep(sweep: SweepReport) -> list[str]:
    rows = []
    for line in sweep.lines[:MOST_ROWS]:
        row = line.row
        claim = number(row.epsilon) if row.epsilon is not None else "none"
        gap = f"{points(row.difference.value)} against {escape(row.against or '')}" if row.difference else "–"
        rows.append((escape(row.configuration), claim, _averaged(row.exact_match), str(len(row.seeds) or "–"), gap))
    return _table(("configuration", "claimed eps", "exact match", "trainings", "difference"), rows)


def _averaged(value: Averaged | None) -> str:
    if value is None:
        return "–"
    span = (
        f" ({100 * value.low:.1f} to {100 * value.high:.1f})"
        if value.low is not None and value.high is not None
        else ""
    )
    return f"{100 * value.value:.1f} %{span}"


def _changes(changes: Sequence[Change]) -> list[str]:
    if not changes:
        return []
    rows = [
        (c.direction, escape(c.subject), escape(c.what), escape(c.before), escape(c.after)) for c in changes[:MOST_ROWS]
    ]
    return _table(("direction", "subject", "what", "before", "now"), rows)
