"""Utility side by side: which numbers of several runs may be compared, and what privacy cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpaudit.documents import BenchmarkDocument, Gap, Metric
from reports import groups
from reports.catalogue import HELD_OUT, LOCAL_SETS, base
from reports.figures import FrontierPoint
from reports.inputs import RunReport

OVERALL = "exact_match"


@dataclass(frozen=True)
class TaskColumn:
    """One model's numbers for a task. `key` is a run's letter, or empty for the base model and the majority."""

    key: str
    label: str
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class TaskTable:
    """One task: columns that were measured on the same questions (equal sample hash), and rows of metric names.

    `others` are runs whose numbers come from other questions: shown, never compared. `headline`: the metric that stands
    for the task.
    """

    task: str
    headline: str
    own: bool  # the runs' own questions
    missing: int  # questions that the context can't hold, the most of the columns
    held_out: str | None  # whether their pictures were in train, in words; None: not looked at
    rows: tuple[tuple[str, str], ...]  # (metric name, what a reader sees)
    columns: tuple[TaskColumn, ...]
    others: tuple[TaskColumn, ...]
    base: Metric | None
    sample_sha256: str | None


@dataclass(frozen=True)
class Utility:
    """A run's accuracy beside its yardsticks, in the units of the task's headline metric (0 to 1).

    `kept` is (run - base) / (non-private - base), where non-private fine-tuning clearly adds something at all; it has
    no interval, because release documents hold no pairs.
    """

    task: str
    metric: Metric
    over_base: float | None
    to_non_private: float | None
    kept: float | None


def tables(runs: Sequence[RunReport]) -> tuple[TaskTable, ...]:
    """One table per task that any run was measured on."""
    names = dict.fromkeys(task for run in runs if run.benchmark is not None for task in run.benchmark.tasks)
    return tuple(_table(task, runs) for task in names)


def _table(task: str, runs: Sequence[RunReport]) -> TaskTable:
    measured = [(run, run.benchmark) for run in runs if run.benchmark is not None and task in run.benchmark.tasks]
    reference = _reference_hash(task, [document for _, document in measured])
    same: list[TaskColumn] = []
    others: list[TaskColumn] = []
    for run, document in measured:
        column = TaskColumn(run.key, run.name, document.tasks[task])
        (same if document.sample_sha256.get(task) == reference else others).append(column)
    comparable = [document for _, document in measured if document.sample_sha256.get(task) == reference]
    untrained = next((d.base[task] for d in comparable if d.base is not None and task in d.base), None)
    majority = next((d.majority[task] for d in comparable if task in d.majority), None)
    yardsticks = []
    main = headline(task, comparable[0] if comparable else measured[0][1])
    if majority is not None:
        yardsticks.append(TaskColumn("", "most common answer", {main: majority}))
    if untrained is not None:
        yardsticks.append(TaskColumn("", "base model", untrained))
    metrics = dict.fromkeys(name for column in (*same, *others) for name in column.metrics)
    rows = sorted(metrics, key=lambda name: (name != main, "/" in name, ": " in name, name))  # kinds, then other groups
    return TaskTable(
        task=task,
        headline=main,
        own=task == HELD_OUT,
        held_out=_held_out(task, comparable or [document for _, document in measured]),
        missing=max((d.about[task].missing for d in comparable or [] if task in d.about), default=0),
        rows=tuple((name, label(main, name)) for name in rows),
        columns=(*yardsticks, *same),
        others=tuple(others),
        base=untrained.get(main) if untrained is not None else None,
        sample_sha256=reference,
    )


def _held_out(task: str, documents: Sequence[BenchmarkDocument]) -> str | None:
    """The least of what the documents say."""
    said = [document.about[task].held_out for document in documents if task in document.about]
    return next((item for item in said if item != "yes"), "yes") if said else None


def headline(task: str, document: BenchmarkDocument) -> str:
    """The metric that stands for a task: what the document says, else exact match, else the first."""
    if task in document.about:
        return document.about[task].headline
    metrics = document.tasks[task]
    return OVERALL if OVERALL in metrics else next(iter(metrics), OVERALL)


def label(headline: str, name: str) -> str:
    """A metric's name as a reader sees it: the headline is `all questions`, its subgroups go by their own name."""
    if name == headline:
        return "all questions"
    if name.startswith(f"{headline}/"):
        return name.removeprefix(f"{headline}/")
    if name == "pope_yes_ratio":
        return "true answers that are yes"  # what lmms-eval's code counts, whatever the name
    return name.replace("_", " ")


def meaning(table: TaskTable) -> str:
    """What a task's headline counts, in words."""
    if table.own:
        said = {"yes": "", None: "; whether the pictures were in train was not checked"}
        beside = said.get(table.held_out, f"; held out: {table.held_out}")
        return f"Exact match (text equal after lower-casing and joining white space{beside}{_missing(table)})"
    if base(table.task) in LOCAL_SETS:
        rule = "equal words; case, punctuation and articles do not count"
        return f"Exact match ({rule})" if table.headline == OVERALL else "Share answered yes or no rightly"
    return f"{table.headline.replace('_', ' ').capitalize()} as lmms-eval's task counts it{_missing(table)}"


def _missing(table: TaskTable) -> str:
    what = "question does" if table.missing == 1 else "questions do"
    return f"; {table.missing} {what} not fit into the context: counted as wrong" if table.missing else ""


@dataclass(frozen=True)
class Measured:
    """How the numbers of a task were measured, for the runs that share it all."""

    runs: tuple[RunReport, ...]
    task: str
    data: str
    scored_by: str
    prompt: str
    max_new_tokens: int | None
    batch_size: int
    precision: str
    device: str
    version: str
    limit: int | None
    sha256: str


def measured(runs: Sequence[RunReport]) -> tuple[Measured, ...]:
    """Rows by what differs; documents of earlier versions state the call's settings alone."""
    rows: list[Measured] = []
    for run in runs:
        document = run.benchmark
        for task in document.tasks if document is not None else ():
            assert document is not None
            about = document.about.get(task)
            source = about if about is not None else document
            row = Measured(
                runs=(),
                task=task,
                data=about.data if about is not None else "not stated",
                scored_by=about.scored_by if about is not None else "not stated",
                prompt=source.prompt,
                max_new_tokens=about.max_new_tokens if about is not None else None,
                batch_size=source.batch_size,
                precision=source.precision,
                device=source.device,
                version=source.lmms_eval_version,
                limit=about.limit if about is not None else None,
                sha256=document.sample_sha256.get(task, ""),
            )
            same = next((at for at, other in enumerate(rows) if replace(other, runs=()) == row), None)
            if same is None:
                rows.append(replace(row, runs=(run,)))
            else:
                rows[same] = replace(rows[same], runs=(*rows[same].runs, run))
    return tuple(rows)


def _reference_hash(task: str, documents: Sequence[BenchmarkDocument]) -> str | None:
    """The questions that most runs share; the first of equals."""
    hashes = [document.sample_sha256.get(task) for document in documents]
    return max(hashes, key=hashes.count) if hashes else None


def utility(run: RunReport, runs: Sequence[RunReport], table: TaskTable | None) -> Utility | None:
    """Accuracy of one run against base and non-private, on the same questions only."""
    if table is None:
        return None
    own = next((c.metrics.get(table.headline) for c in (*table.columns, *table.others) if c.key == run.key), None)
    if own is None:
        return None
    if all(column.key != run.key for column in table.columns):
        return Utility(table.task, own, None, None, None)
    base = table.base
    reference = _non_private(runs, table)
    over_base = own.value - base.value if base is not None else None
    against = own.value - reference.value if reference is not None and run.method != "non-private" else None
    kept = None
    if against is not None and base is not None and reference is not None and _clearly_above(reference, base):
        kept = (own.value - base.value) / (reference.value - base.value)
    return Utility(table.task, own, over_base, against, kept)


def _clearly_above(upper: Metric, lower: Metric) -> bool:
    """A share of a gain means something only where the gain itself is beyond doubt: intervals that do not touch."""
    return upper.low is not None and lower.high is not None and upper.low > lower.high


def _non_private(runs: Sequence[RunReport], table: TaskTable) -> Metric | None:
    keys = [run.key for run in runs if run.method == "non-private"]
    return next((c.metrics.get(table.headline) for c in table.columns if c.key in keys), None)


def gaps(document: BenchmarkDocument | None) -> tuple[Gap, ...]:
    """Gaps between subgroups, widest first; from the question kinds alone where the document states none."""
    if document is None:
        return ()
    found = list(document.gaps)
    for task, metrics in document.tasks.items() if not found else ():
        kinds = groups.of(OVERALL, groups.QUESTION, metrics)
        if len(kinds) < 2:
            continue
        best = max(kinds, key=lambda name: kinds[name].value)
        worst = min(kinds, key=lambda name: kinds[name].value)
        base = (document.base or {}).get(task, {})
        pair = [base.get(f"{OVERALL}/{name}") for name in (best, worst)]
        before = pair[0].value - pair[1].value if pair[0] is not None and pair[1] is not None else None
        found.append(
            Gap(
                task=task,
                metric=OVERALL,
                grouping=groups.QUESTION,
                best=best,
                worst=worst,
                value=kinds[best].value - kinds[worst].value,
                low=None,
                high=None,
                base=before,
            )
        )
    return tuple(sorted(found, key=lambda gap: -gap.value))


def same_gap(gap: Gap, other: BenchmarkDocument | None) -> float | None:
    """Another model's difference between the same two groups; None where it was not measured on the same questions."""
    metrics = other.tasks.get(gap.task, {}) if other is not None else {}
    best, worst = (metrics.get(groups.key(gap.metric, gap.grouping, name)) for name in (gap.best, gap.worst))
    return best.value - worst.value if best is not None and worst is not None else None


def frontier_points(runs: Sequence[RunReport], table: TaskTable) -> tuple[FrontierPoint, ...]:
    """The runs that share the task's questions, in the order given."""
    found = []
    for run in runs:
        column = next((c for c in table.columns if c.key == run.key), None)
        metric = column.metrics.get(table.headline) if column is not None else None
        if metric is None:
            continue
        test = run.headline
        claimed = run.claim.epsilon if run.claim is not None else math.inf
        audited = (test.epsilon_lower,) if test is not None and test.epsilon_lower is not None else ()
        found.append(FrontierPoint(run.key, claimed, audited, metric, run.key))
    return tuple(found)
