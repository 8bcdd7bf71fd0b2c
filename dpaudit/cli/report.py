"""`dpaudit report`: a page over runs, sweeps and bare documents, and the same for machines."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from reports.embedded import ReportDocument


def command(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUBJECT...", help="Run or sweep folders; JSON of dpaudit scores, audit, check or bugs."
        ),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", readable=False, help="The file to write; one per --format, in the same order."),
    ] = None,
    forms: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="What to write: html (default), card (model card of one run), md (summary for pull "
            "requests), junit, sarif, json (the claims as a record for registries). Repeatable.",
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Privacy audit report",
    against: Annotated[
        Path | None, typer.Option(metavar="OLD", help="An earlier report; the new one says what got better or worse.")
    ] = None,
    include_private: Annotated[
        bool, typer.Option("--include-private", help="Show exact training curves; adds an UNACCOUNTED ledger row.")
    ] = False,
    show_examples: Annotated[
        bool,
        typer.Option("--show-examples", help="Show canaries made from real pictures; adds an UNACCOUNTED ledger row."),
    ] = False,
    watching: Annotated[
        bool,
        typer.Option(
            "--watch", help="Write the report again whenever a document changes; stop with Ctrl-C (exit code 0)."
        ),
    ] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Write a report: claim, evidence, limits and how to reproduce them, by default as one self-contained HTML file.

    Only the release/ part of each run is read, unless --include-private or --show-examples is given. The page makes no
    request, works without JavaScript and is under 500 kB; the same files give the same bytes. --format card
    -o RUN/release/model/README.md renews the model card of a run and keeps what its owner wrote in it.
    """
    from dpaudit.errors import UsageError
    from reports.changes import read_earlier
    from reports.watch import watch
    from reports.writing import Request, check, paired, write

    if watching and as_json:
        raise UsageError("--watch: writes again and again; accepted: without --json, which prints one document")
    request = Request(
        subjects=tuple(subjects),
        files=paired(forms or [], output or []),
        title=title,
        include_private=include_private,
        show_examples=show_examples,
        earlier=read_earlier(against) if against is not None else None,  # before it may be overwritten
        against=against.name if against is not None else "",
    )
    if watching:
        try:
            watch(request, _say_at_once)
        except KeyboardInterrupt:
            console.finish(console.DONE)
    check(request)
    written = write(request)
    for run in written.page.runs:
        for notice in run.notices:
            console.log(f"dpaudit: run {run.key} {run.name}: {notice}")
    if as_json:
        console.emit(written.document)
    else:
        for line in describe(written.document):
            console.say(line)
        for place, size in written.sizes:
            console.say(f"{place} ({size / 1000:.0f} kB)")
        console.say(console.LIMIT_SENTENCE)
    if any(run.vouched.status == "invalid" for run in written.page.described):
        console.finish(console.REFUTED)  # a gate failed: somebody vouched for other files


def _say_at_once(text: str) -> None:
    console.say(text)
    sys.stdout.flush()


def describe(document: "ReportDocument") -> list[str]:
    """The page in a few lines for people."""
    from reports.text import clean

    lines = []
    for run in document.runs:
        bound = "no bound" if run.epsilon_lower is None else f"eps >= {run.epsilon_lower:.3g}"
        claim = "no claim" if run.claimed_epsilon is None else f"claims eps = {run.claimed_epsilon:.3g}"
        signed = {"invalid": "signature invalid", "signed": f"signed by {(run.key_sha256 or '')[:16]}…"}
        vouched = signed.get(run.signature, "unsigned")
        lines.append(f"{run.key} {run.name}: {run.verdict or 'not audited'} ({claim}; {bound}; {vouched})")
    lines += [f"sweep {clean(sweep.name)}: {len(sweep.rows)} configurations" for sweep in document.sweeps]
    for check in document.checks:
        failed = f"; failed: {', '.join(clean(name, 60) for name in check.failed[:5])}" if check.failed else ""
        lines.append(f"{clean(check.name)}: {check.verdict or f'{len(check.failed)} planted bugs missed'}{failed}")
    for change in document.changes or ():
        subject, what = clean(change.subject, 60), clean(change.what, 80)
        lines.append(f"{change.direction}: {subject}, {what}: {clean(change.before, 60)} -> {clean(change.after, 60)}")
    if document.changes is not None and not document.changes:
        lines.append("no change since the earlier report")
    return lines
