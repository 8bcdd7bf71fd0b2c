"""`dpaudit benchmark`: Measure VQA accuracy of a run with lmms-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from dpaudit.documents import BenchmarkDocument, Metric

SHOWN = 24  # rows of a task on a terminal; the document holds all


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished run folders. Runs on the same data are measured together."),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME...]", help="Tasks to measure (default: the run's own test questions)."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A local copy of a task's data (Parquet file or folder). Repeatable."),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Allow downloads from the hub of models and of data without a local copy.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Also report by group of units: a column of the run's local test file."),
    ] = None,
    base: Annotated[bool, typer.Option(help="Also measure the base model.")] = True,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first N test units, or questions of another task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time; does not change the answers.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Measure how well runs answer questions about held-out images.

    The default is the test questions of the run's own data, by exact match. --tasks takes textvqa_val, vqav2_val, gqa,
    pope, slake, scienceqa_img, ok_vqa_val2014, vizwiz_vqa_val or another task of lmms-eval, scored by its own code; or
    a local set by the rules of dpaudit_open_closed, dpaudit_pathvqa, dpaudit_vqa_rad or dpaudit_yes_no. Results are
    given overall and by subgroup, with 95 % intervals by bootstrap over privacy units or pictures. lmms-eval runs in a
    process of its own, offline unless --online. The command writes release/benchmark.json into each run and keeps the
    tasks that were measured before.
    """
    from dpaudit.errors import rejected
    from dpaudit.online import allow
    from dpaudit.runs import RunFolder
    from reports.benchmark import benchmark_many
    from reports.catalogue import parse_data

    if online:
        allow()
    if as_json and len(runs) > 1:
        raise rejected("--json", f"{len(runs)} runs", "one RUN, since exactly one document is printed")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    documents = benchmark_many(
        [RunFolder.open(run) for run in runs],
        tasks=names,
        data=parse_data(data or []),
        online=online,
        group=group,
        base=base,
        limit=limit,
        batch_size=batch_size,
        device=device,
        progress=lambda text: console.log(f"benchmark: {text}"),
    )
    if as_json:
        console.emit(documents[0])
        return
    for run, document in zip(runs, documents, strict=True):
        _show(run, document)


def _show(run: Path, document: "BenchmarkDocument") -> None:
    from reports.text import clean, percent
    from reports.utility import label

    for task, metrics in document.tasks.items():
        about = document.about.get(task)
        version = about.lmms_eval_version if about is not None else document.lmms_eval_version
        headline = about.headline if about is not None else "exact_match"
        console.say(f"{run}: {task}, lmms-eval {version}, {headline} with 95 % intervals")
        if about is not None and about.held_out not in (None, "yes"):
            console.say(f"  held out: {about.held_out}")
        if about is not None and about.missing:
            console.say(f"  {about.missing} questions do not fit into the model's context: no answer, counted as wrong")
        before = (document.base or {}).get(task, {}).get(headline)
        if before is not None and before.value == 0:
            console.say(
                "  the base model answers none of it: it knows nothing of this task in this form (train --model)"
            )
        for name, metric in list(metrics.items())[:SHOWN]:
            _row(label(headline, name), metric, (document.base or {}).get(task, {}).get(name))
        if len(metrics) > SHOWN:
            console.say(f"  and {len(metrics) - SHOWN} more in benchmark.json")
        if task in document.majority:
            console.say(f"  {'most common answer':<26}{percent(document.majority[task].value):>8}")
        for gap in document.gaps:
            if gap.task == task and gap.low is not None and gap.high is not None:
                span = f"{percent(gap.value)} ({percent(gap.low)} to {percent(gap.high)})"
                beside = f"; base model, same two groups: {percent(gap.base)}" if gap.base is not None else ""
                best, worst = clean(gap.best, 40), clean(gap.worst, 40)
                console.say(f"  widest gap by {gap.grouping}: {span}, {best} over {worst}{beside}")
    console.say(f"  written to {run / 'release' / 'benchmark.json'}")


def _row(name: str, metric: "Metric", base: "Metric | None") -> None:
    from reports.text import clean, percent

    beside = f"   base {percent(base.value)}" if base is not None else ""
    span = f"({percent(metric.low)} to {percent(metric.high)})" if metric.low is not None else "(no interval)"
    console.say(f"  {clean(name, 40):<26}{percent(metric.value):>8} {span:<22} n = {metric.n:,}{beside}")
