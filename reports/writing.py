"""A page in every form that is asked for, each in a file of its own."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from dpaudit import atomic, printable
from dpaudit.errors import UsageError, rejected
from dpaudit.runs import RunFolder
from reports import card, formats, outputs
from reports.changes import Earlier, compare
from reports.embedded import ReportDocument, summarise, summarise_checks, summarise_sweeps
from reports.formats.findings import findings
from reports.html import render
from reports.inputs import release_of
from reports.subjects import Page, load_page, named_from
from reports.vouched import SIGNATURE


class Format(StrEnum):
    """What a page can be written as."""

    html = "html"
    card = "card"
    md = "md"
    junit = "junit"
    sarif = "sarif"
    json = "json"


NAMES = {
    Format.html: "report.html",
    Format.card: "MODEL_CARD.md",
    Format.md: "summary.md",
    Format.junit: "junit.xml",
    Format.sarif: "dpaudit.sarif",
    Format.json: "disclosure.json",
}


@dataclass(frozen=True)
class Request:
    """What is to be written of what. files: each form with its place; earlier: the page that `against` names."""

    subjects: tuple[Path, ...]
    files: tuple[tuple[Format, Path], ...]
    title: str
    include_private: bool = False
    show_examples: bool = False
    earlier: Earlier | None = None
    against: str = ""


@dataclass(frozen=True)
class Written:
    """What was written: the page, its summary, and the size in bytes of every file."""

    page: Page
    document: ReportDocument
    sizes: tuple[tuple[Path, int], ...]


def paired(wanted: Sequence[str], places: Sequence[Path]) -> tuple[tuple[Format, Path], ...]:
    """Forms with their places, in the order of both; without places each form has its usual name."""
    unknown = next((name for name in wanted if name not in list(Format)), None)
    if unknown is not None:
        raise rejected("--format", unknown, tuple(Format))
    chosen = [Format(name) for name in wanted] or [Format.html]
    if places and len(places) != len(chosen):
        raise UsageError(
            f"--format: {len(chosen)} and -o: {len(places)}; accepted: one -o for each --format, in the same order, or "
            "no -o at all"
        )
    if len(set(chosen)) != len(chosen):
        raise UsageError("--format: one is given twice; accepted: each once")
    return tuple(zip(chosen, places or [Path(NAMES[name]) for name in chosen], strict=True))


def check(request: Request) -> None:
    """UsageError for a form or a place that can't be; called before anything is read."""
    elsewhere = [(f"-o ({name})", place) for name, place in request.files if not _in_place(request, name, place)]
    outputs.check(elsewhere, request.subjects)
    if Format.card in dict(request.files) and (len(request.subjects) != 1 or not request.subjects[0].is_dir()):
        raise UsageError("--format card: is of one run; accepted: exactly one SUBJECT, a run folder")


def _in_place(request: Request, name: Format, place: Path) -> bool:
    """Whether this is the card of the run itself, the one file of a run that a report may write."""
    if name is not Format.card or len(request.subjects) != 1 or not request.subjects[0].is_dir():
        return False
    release = release_of(request.subjects[0])
    if place.resolve() != (release / card.PLACE).resolve():
        return False
    atomic.require_ordinary(place)
    if (release / SIGNATURE).exists():
        raise UsageError(
            f"-o {place}: is signed; accepted: another place, or no {SIGNATURE} (it covers the card: remove it, renew "
            "the card, and sign again)"
        )
    return True


def write(request: Request) -> Written:
    """Read the subjects and write all files; the document is of the first."""
    page = load_page(request.subjects, include_private=request.include_private, show_examples=request.show_examples)
    if not any(_in_place(request, name, place) for name, place in request.files):
        page = _with_cards(page, request.subjects)
    changes = compare(page, request.earlier) if request.earlier is not None else None
    found = findings(page, changes)
    left_out: tuple[str, ...] = ()
    made: list[tuple[Path, str]] = []
    for name, place in request.files:
        if name is Format.html:
            text, detail = render(
                page,
                title=request.title,
                show_examples=request.show_examples,
                changes=changes,
                against=request.against,
            )
            left_out = detail.left_out
        elif name is Format.card:
            text = _card(request, page)
        elif name is Format.md:
            text = formats.markdown(page, found, title=request.title, changes=changes)
        elif name is Format.junit:
            text = formats.junit(found)
        elif name is Format.sarif:
            text = formats.sarif(found)
        else:
            text = printable.json_text(formats.disclosure(page).to_json())
        made.append((place, text))
    for (name, place), (_, text) in zip(request.files, made, strict=True):  # all were made: none is replaced in vain
        with _locked(request, name, place):
            atomic.write_text(place, text)
    first = made[0][1].encode()
    document = ReportDocument(
        path=str(made[0][0]),
        bytes=len(first),
        sha256=hashlib.sha256(first).hexdigest(),
        title=request.title,
        runs=summarise(page.runs),
        sweeps=summarise_sweeps(page),
        checks=summarise_checks(page),
        changes=changes,
        left_out=left_out,
    )
    return Written(page, document, tuple((place, len(text.encode())) for place, text in made))


def _with_cards(page: Page, subjects: Sequence[Path]) -> Page:
    """Runs whose model card contradicts the documents beside it say so."""
    places = {typed: path for path, typed in named_from(subjects).items()}
    runs = []
    for run in page.runs:
        wrong = card.problem(release_of(places[run.typed]), run) if run.source == "run" else None
        runs.append(run if wrong is None else replace(run, notices=(*run.notices, f"{wrong}.")))
    return replace(page, runs=tuple(runs))


def _locked(request: Request, name: Format, place: Path) -> AbstractContextManager[None]:
    """Hold the run alone while its own card is replaced; a release without its run belongs to nobody else."""
    if not _in_place(request, name, place):
        return nullcontext()
    run = RunFolder(release_of(request.subjects[0]).parent)
    return run.lock() if run.private.is_dir() else nullcontext()


def _card(request: Request, page: Page) -> str:
    if len(page.runs) != 1 or page.runs[0].source != "run":
        raise UsageError("--format card: is of one run; accepted: exactly one SUBJECT, a run folder")
    return card.card(page.runs[0], card.read(release_of(request.subjects[0]) / card.PLACE))
