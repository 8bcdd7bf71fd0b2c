"""`dpaudit benchmark`: VQA utility of a run through lmms-eval."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    base: Annotated[bool, typer.Option(help="Also measure the base model.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only the first N held-out units (quick look).")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time; answers don't depend on it.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Measure how well a run answers the held-out questions of its own data set.

    Exact match (equal text after Unicode normalisation, case folding and joining of white space), overall and per
    question kind, with 95 % intervals by bootstrap over privacy units. lmms-eval does the evaluation, in a process of
    its own, offline. Writes release/benchmark.json.
    """
    from dpaudit.runs import RunFolder
    from reports.benchmark import benchmark
    from reports.text import number, percent

    document = benchmark(
        RunFolder.open(run),
        base=base,
        limit=limit,
        batch_size=batch_size,
        device=device,
        progress=lambda text: console.log(f"benchmark: {text}"),
    )
    if as_json:
        console.emit(document)
        return
    for task, metrics in document.tasks.items():
        console.say(f"{task}, lmms-eval {document.lmms_eval_version}, exact match with 95 % intervals")
        for name, metric in metrics.items():
            label = "all questions" if name == "exact_match" else name.removeprefix("exact_match/")
            reference = (document.base or {}).get(task, {}).get(name)
            beside = f"   base {percent(reference.value)}" if reference is not None else ""
            span = f"({percent(metric.low)} to {percent(metric.high)})" if metric.low is not None else "(no interval)"
            console.say(f"  {label:<24}{percent(metric.value):>8} {span:<22} n = {metric.n:,}{beside}")
        if task in document.majority:
            console.say(f"  {'commonest answer':<24}{percent(document.majority[task].value):>8}")
    console.say(f"took {number(document.seconds)} s; written to {run / 'release' / 'benchmark.json'}")
