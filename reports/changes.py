"""What got better or worse since an earlier page.

The earlier page is an HTML file of `dpaudit report` (its data lies inside) or the JSON of `dpaudit report --json`. Runs
are matched by name. Verdicts, ledger and checks are compared as they are. Accuracy counts as changed only where the
intervals do not touch and the questions are the same. A lower bound on eps is a random number with a one-sided
guarantee: a larger one is worse news, a smaller one is no proof of anything, and the texts keep to that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dpaudit import untrusted
from dpaudit.documents import Metric
from dpaudit.errors import UsageError
from reports.embedded import ELEMENT, Change, ReportCheck, ReportRun, ReportSweep, summarise, summarise_checks
from reports.figures import describe_interval
from reports.subjects import Page
from reports.sweep.document import Averaged
from reports.text import number

MOST_BYTES = 1 << 25
# From good to bad; verdicts that say different kinds of things ("no claim") have no place in the order.
_ORDER = {"not refuted": 0, "inconclusive": 1, "unsupported": 2, "refuted": 3, "invalid": 4, "pass": 0, "fail": 3}
_STATUS = {"accounted": 0, "post-processing": 0, "per-example preprocessing": 0, "UNACCOUNTED": 1}
Direction = Literal["better", "worse", "changed", "within intervals"]


@dataclass(frozen=True)
class Earlier:
    """What an earlier page said."""

    runs: tuple[ReportRun, ...]
    sweeps: tuple[ReportSweep, ...]
    checks: tuple[ReportCheck, ...]


def read_earlier(path: Path) -> Earlier:
    """Read an earlier page; UsageError with one line for anything else."""
    wanted = "an HTML file written by dpaudit report, or the output of dpaudit report --json"
    try:
        text = untrusted.read_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--against {path}: can't be read ({error}); accepted: {wanted}") from error
    if not text.lstrip().startswith("{"):
        _, found, rest = text.partition(f'id="{ELEMENT}">')
        if not found:
            raise UsageError(f"--against {path}: not a page of dpaudit; accepted: {wanted}")
        text = rest.partition("</script>")[0]
    try:
        tree = untrusted.parse_json(text)
        runs = [row.get("summary", row) for row in tree["runs"]]
        sweeps = [{key: row[key] for key in ("name", "rows", "sample_sha256")} for row in tree.get("sweeps", [])]
        return Earlier(
            tuple(ReportRun.model_validate(row) for row in runs),
            tuple(ReportSweep.model_validate(row) for row in sweeps),
            tuple(ReportCheck.model_validate(row) for row in tree.get("checks", [])),
        )
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UsageError(f"--against {path}: from another version of dpaudit ({where}); accepted: {wanted}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--against {path}: damaged or not a page of dpaudit; accepted: {wanted}") from error


def compare(page: Page, earlier: Earlier) -> tuple[Change, ...]:
    """Every difference, in the order of the page; what is only in one of the two comes last."""
    changes: list[Change] = []
    now, before = summarise(page.runs), {run.name: run for run in earlier.runs}
    for run in now:
        if run.name in before:
            changes += _run(before[run.name], run)
    old_sweeps = {sweep.name: sweep for sweep in earlier.sweeps}
    for sweep in page.sweeps:
        if sweep.name in old_sweeps:
            changes += _sweep(old_sweeps[sweep.name], sweep.document.rows, sweep.document.sample_sha256)
    old_checks = {(check.kind, check.name): check for check in earlier.checks}
    checks = summarise_checks(page)
    for check in checks:
        if (check.kind, check.name) in old_checks:
            changes += _check(old_checks[check.kind, check.name], check)
    names = ([r.name for r in now], [s.name for s in page.sweeps], [c.name for c in checks])
    olds = (list(before), list(old_sweeps), [c.name for c in earlier.checks])
    for kind, new, old in zip(("run", "sweep", "document"), names, olds, strict=True):
        changes += [_change(n, kind, "not in the earlier page", "new", "changed") for n in new if n not in old]
        changes += [_change(n, kind, "in the earlier page", "not here", "changed") for n in old if n not in new]
    return tuple(changes)


def _change(subject: str, what: str, before: str, after: str, direction: Direction) -> Change:
    return Change(subject=subject, what=what, before=before, after=after, direction=direction)


def _ordered(before: float | None, after: float | None) -> Direction:
    """Smaller is better; what is missing can't be ordered."""
    if before is None or after is None or before == after:
        return "changed"
    return "better" if after < before else "worse"


def _run(old: ReportRun, new: ReportRun) -> list[Change]:
    found = []
    name = new.name
    if old.verdict != new.verdict:
        rank = _ordered(_ORDER.get(old.verdict or ""), _ORDER.get(new.verdict or ""))
        found.append(_change(name, "verdict", old.verdict or "not audited", new.verdict or "not audited", rank))
    for field, what in (("claimed_epsilon", "claimed eps"), ("epsilon_lower", "audited lower bound on eps")):
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            found.append(_change(name, what, number(before), number(after), _ordered(before, after)))
    same = (old.task, old.sample_sha256) == (new.task, new.sample_sha256)
    found += _accuracy(name, new.measure, old.accuracy, new.accuracy, same=same)
    for place in dict.fromkeys([*old.ledger, *new.ledger]):
        was, now = old.ledger.get(place), new.ledger.get(place)
        if was != now:
            rank = _ordered(_STATUS.get(was or "", 0), _STATUS.get(now or "", 0))
            found.append(_change(name, f"ledger: {place}", was or "no row", now or "no row", rank))
    return found + _failures(name, old.failed, new.failed)


def _failures(name: str, old: Sequence[str], new: Sequence[str]) -> list[Change]:
    found = [_change(name, f"check: {check}", "did not fail", "fails", "worse") for check in new if check not in old]
    found += [
        _change(name, f"check: {check}", "failed", "does not fail", "better") for check in old if check not in new
    ]
    return found


def _accuracy(name: str, what: str, old: Metric | None, new: Metric | None, *, same: bool) -> list[Change]:
    if old is None or new is None:
        if old is new:
            return []
        before, after = (describe_interval(metric) if metric is not None else "not measured" for metric in (old, new))
        return [_change(name, what, before, after, "changed")]
    if not same:
        return [_change(name, what, describe_interval(old), "other questions: not compared", "changed")]
    if (old.value, old.low, old.high) == (new.value, new.low, new.high):
        return []
    return [_change(name, what, describe_interval(old), describe_interval(new), _apart(old, new))]


def _apart(old: Metric | Averaged, new: Metric | Averaged) -> Direction:
    """Better or worse only where the two intervals do not touch."""
    if None in (old.low, old.high, new.low, new.high):
        return "changed"
    assert old.low is not None and old.high is not None and new.low is not None and new.high is not None
    if new.low > old.high:
        return "better"
    return "worse" if new.high < old.low else "within intervals"


def _sweep(old: ReportSweep, rows: Sequence[Any], sample: str | None) -> list[Change]:
    before: Mapping[str, Averaged | None] = {row.configuration: row.exact_match for row in old.rows}
    found = []
    for row in rows:
        was, now = before.get(row.configuration), row.exact_match
        if was is None or now is None or was == now:
            continue
        name = f"{old.name}: {row.configuration}"
        shown = [describe_interval(Metric(value=m.value, low=m.low, high=m.high, n=m.n)) for m in (was, now)]
        if old.sample_sha256 != sample:
            found.append(_change(name, "exact match", shown[0], "other questions: not compared", "changed"))
        else:
            found.append(_change(name, "exact match", shown[0], shown[1], _apart(was, now)))
    return found


def _check(old: ReportCheck, new: ReportCheck) -> list[Change]:
    found = []
    if old.verdict != new.verdict:
        rank = _ordered(_ORDER.get(old.verdict or ""), _ORDER.get(new.verdict or ""))
        found.append(_change(new.name, "step contract", old.verdict or "–", new.verdict or "–", rank))
    return found + _failures(new.name, old.failed, new.failed)
