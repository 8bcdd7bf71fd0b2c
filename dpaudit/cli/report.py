"""`dpaudit report`: one self-contained HTML file over one or more runs."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their release/ parts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Privacy audit report",
    include_private: Annotated[
        bool, typer.Option("--include-private", help="Show exact training curves; adds an UNACCOUNTED ledger row.")
    ] = False,
    show_examples: Annotated[
        bool,
        typer.Option("--show-examples", help="Show canaries made from real pictures; adds an UNACCOUNTED ledger row."),
    ] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Write one self-contained HTML file: claim, evidence, limits and how to reproduce them.

    Reads the release/ part of each run and nothing else, unless asked. The page makes no request, runs no script and
    is under 500 kB; the same files give the same bytes.
    """
    from dpaudit.atomic import write_text
    from reports.html import ReportDocument, render, summarise
    from reports.inputs import load_runs

    loaded = load_runs(runs, include_private=include_private, show_examples=show_examples)
    page, detail = render(loaded, title=title, show_examples=show_examples)
    write_text(output, page)
    encoded = page.encode()
    document = ReportDocument(
        path=str(output),
        bytes=len(encoded),
        sha256=hashlib.sha256(encoded).hexdigest(),
        title=title,
        runs=summarise(loaded),
        left_out=detail.left_out,
    )
    if as_json:
        console.emit(document)
        return
    for run in document.runs:
        bound = "no bound" if run.epsilon_lower is None else f"eps >= {run.epsilon_lower:.3g}"
        claim = "no claim" if run.claimed_epsilon is None else f"claims eps = {run.claimed_epsilon:.3g}"
        console.say(f"{run.key} {run.name}: {run.verdict or 'not audited'} ({claim}; {bound})")
    console.say(f"{output} ({len(encoded) / 1000:.0f} kB). {console.LIMIT_SENTENCE}")
