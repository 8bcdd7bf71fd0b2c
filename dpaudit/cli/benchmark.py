"""`dpaudit benchmark`: VQA utility of a run through lmms-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from dpaudit.documents import BenchmarkDocument


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished run folders; runs on the same data share one start."),
    ],
    base: Annotated[bool, typer.Option(help="Also measure the base model.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only the first N held-out units (quick look).")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time; answers don't depend on it.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Measure how well runs answer the held-out questions of their own data set.

    Exact match (equal text after Unicode normalisation, case folding and joining of white space), overall and per
    question kind, with 95 % intervals by bootstrap over privacy units. lmms-eval does the evaluation, in a process of
    its own, offline. Writes release/benchmark.json into each run.
    """
    from dpaudit.errors import rejected
    from dpaudit.runs import RunFolder
    from reports.benchmark import benchmark_many

    if as_json and len(runs) > 1:
        raise rejected("--json", f"{len(runs)} runs", "one RUN, since exactly one document is printed")
    documents = benchmark_many(
        [RunFolder.open(run) for run in runs],
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
    from reports.text import percent

    for task, metrics in document.tasks.items():
        console.say(f"{run}: {task}, lmms-eval {document.lmms_eval_version}, exact match with 95 % intervals")
        for name, metric in metrics.items():
            label = "all questions" if name == "exact_match" else name.removeprefix("exact_match/")
            reference = (document.base or {}).get(task, {}).get(name)
            beside = f"   base {percent(reference.value)}" if reference is not None else ""
            span = f"({percent(metric.low)} to {percent(metric.high)})" if metric.low is not None else "(no interval)"
            console.say(f"  {label:<24}{percent(metric.value):>8} {span:<22} n = {metric.n:,}{beside}")
        if task in document.majority:
            console.say(f"  {'commonest answer':<24}{percent(document.majority[task].value):>8}")
    console.say(f"  written to {run / 'release' / 'benchmark.json'}")
