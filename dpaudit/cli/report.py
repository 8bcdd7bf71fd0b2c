"""`dpaudit report`: one self-contained HTML file over runs, sweeps and bare documents."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reports.embedded import Change, ReportDocument
    from reports.subjects import Page


def command(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUBJECT...", help="Run or sweep folders; JSON of dpaudit scores, audit, check or bugs."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Privacy audit report",
    against: Annotated[
        Path | None, typer.Option(metavar="OLD", help="An earlier report: also say what got better or worse.")
    ] = None,
    include_private: Annotated[
        bool, typer.Option("--include-private", help="Show exact training curves; adds an UNACCOUNTED ledger row.")
    ] = False,
    show_examples: Annotated[
        bool,
        typer.Option("--show-examples", help="Show canaries made from real pictures; adds an UNACCOUNTED ledger row."),
    ] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write SARIF 2.1.0 for code scanning.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a summary for pull requests.")
    ] = None,
    disclosure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the claims as a record for registries (JSON).")
    ] = None,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Write one self-contained HTML file: claim, evidence, limits and how to reproduce them.

    Reads the release/ part of each run and nothing else, unless asked. The page makes no request, works without
    JavaScript and is under 500 kB; the same files give the same bytes.
    """
    from dpaudit.atomic import write_text
    from reports.changes import compare, read_earlier
    from reports.embedded import ReportDocument, summarise, summarise_checks, summarise_sweeps
    from reports.html import render
    from reports.outputs import check
    from reports.subjects import load_page

    named = [("--output", output), ("--junit", junit), ("--sarif", sarif), ("--markdown", markdown)]
    check([*named, ("--disclosure", disclosure)], subjects)
    earlier = read_earlier(against) if against is not None else None  # before it may be overwritten
    page = load_page(subjects, include_private=include_private, show_examples=show_examples)
    changes = compare(page, earlier) if earlier is not None else None
    name = against.name if against is not None else ""
    made, detail = render(page, title=title, show_examples=show_examples, changes=changes, against=name)
    write_text(output, made)
    _write_formats(page, changes, title, junit=junit, sarif=sarif, markdown=markdown, disclosure=disclosure)
    encoded = made.encode()
    document = ReportDocument(
        path=str(output),
        bytes=len(encoded),
        sha256=hashlib.sha256(encoded).hexdigest(),
        title=title,
        runs=summarise(page.runs),
        sweeps=summarise_sweeps(page),
        checks=summarise_checks(page),
        changes=changes,
        left_out=detail.left_out,
    )
    for run in page.runs:
        for notice in run.notices:
            console.log(f"dpaudit: run {run.key} {run.name}: {notice}")
    if as_json:
        console.emit(document)
    else:
        for line in describe(document):
            console.say(line)
        console.say(f"{output} ({len(encoded) / 1000:.0f} kB). {console.LIMIT_SENTENCE}")
    if any(run.vouched.status == "invalid" for run in page.described):
        console.finish(console.REFUTED)  # a gate failed: somebody vouched for other files


def _write_formats(
    page: "Page",
    changes: "Sequence[Change] | None",
    title: str,
    *,
    junit: Path | None,
    sarif: Path | None,
    markdown: Path | None,
    disclosure: Path | None,
) -> None:
    """The page for machines, each in the file that was named for it."""
    from dpaudit.atomic import write_document, write_text
    from reports import formats
    from reports.formats.findings import findings

    found = findings(page, changes)
    if junit is not None:
        write_text(junit, formats.junit(found))
    if sarif is not None:
        write_text(sarif, formats.sarif(found))
    if markdown is not None:
        write_text(markdown, formats.markdown(page, found, title=title, changes=changes))
    if disclosure is not None:
        write_document(disclosure, formats.disclosure(page))


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
