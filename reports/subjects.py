"""What a page is about: run folders, sweeps, and bare documents of `dpaudit scores`, `audit`, `check` and `bugs`."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpaudit import folders, untrusted
from dpaudit.documents import AuditDocument, CheckDocument, ScoresDocument
from dpaudit.errors import UsageError
from reports.inputs import ReleasedFile, RunReport, check_summary, distinct, letter, load_release, load_runs, place
from reports.judged import alone as judged_alone
from reports.sweep.document import SweepDocument, SweepRow
from reports.sweep.layout import RUNS, require_plain
from reports.text import clean

if TYPE_CHECKING:
    from attacks.bugs.benchmark import BugsDocument

SWEEP = "sweep.json"
MOST_BYTES = untrusted.MOST_DOCUMENT
ACCEPTED = "a run folder, a sweep folder, or a document of dpaudit sweep, audit, scores, check or bugs"


@dataclass(frozen=True)
class SweepLine:
    """One configuration of a sweep. run: a finished cell, whose claim, ledger and environment stand for all."""

    key: str
    row: SweepRow
    run: RunReport | None


@dataclass(frozen=True)
class SweepReport:
    """A sweep with its lines in the order of the table."""

    name: str
    document: SweepDocument
    file: ReleasedFile
    place: str
    typed: str
    lines: tuple[SweepLine, ...]


@dataclass(frozen=True)
class CheckReport:
    """A step contract by itself; the document does not know whose, so the file's name says it."""

    key: str
    name: str
    document: CheckDocument
    file: ReleasedFile
    place: str
    typed: str = ""


@dataclass(frozen=True)
class BugsReport:
    """The planted-bug benchmark."""

    name: str
    document: "BugsDocument"
    file: ReleasedFile
    place: str
    typed: str = ""


@dataclass(frozen=True)
class Page:
    """Everything that one page shows."""

    runs: tuple[RunReport, ...]
    sweeps: tuple[SweepReport, ...] = ()
    checks: tuple[CheckReport, ...] = ()
    bugs: tuple[BugsReport, ...] = ()

    @property
    def described(self) -> tuple[RunReport, ...]:
        """Runs whose claim and ledger are shown: those given, and one for each configuration of a sweep."""
        cells = (line.run for sweep in self.sweeps for line in sweep.lines)
        return (*self.runs, *(run for run in cells if run is not None))


def load_page(paths: Sequence[Path], *, include_private: bool = False, show_examples: bool = False) -> Page:
    """Read everything; UsageError with one line that names file and field when something can't be understood."""
    if not paths:
        raise UsageError(f"SUBJECT: give at least one; accepted: {ACCEPTED}")
    sweeps = [path for path in paths if _is_sweep(path)]
    files = [path for path in paths if path not in sweeps and path.is_file()]
    folders = [path for path in paths if path not in sweeps and path not in files]
    typed = named_from(paths)
    runs = load_runs(folders, include_private=include_private, show_examples=show_examples) if folders else ()
    runs = tuple(replace(run, typed=typed[path]) for run, path in zip(runs, folders, strict=True))
    used = len(runs)
    page = Page(runs)
    for path in dict.fromkeys(sweeps):
        sweep = _sweep(path, typed[path], first=used)
        used += len(sweep.lines)
        page = replace(page, sweeps=(*page.sweeps, sweep))
    for path in dict.fromkeys(files):
        page = _with_document(page, path, letter(used), typed[path])
        used += 1
    names = distinct([run.name for run in page.runs])
    runs = tuple(replace(run, name=name) for run, name in zip(page.runs, names, strict=True))
    return replace(page, runs=_claims_first(runs))


def _claims_first(runs: Sequence[RunReport]) -> tuple[RunReport, ...]:
    """Runs with a claim before runs without one, otherwise as given; letters follow the order of the page."""
    ordered = sorted(runs, key=lambda run: run.claim is None)
    return tuple(replace(run, key=before.key) for run, before in zip(ordered, runs, strict=True))


def named_from(paths: Sequence[Path]) -> dict[Path, str]:
    """How a command names each subject in the deepest folder that holds all of them; a run by its own folder."""
    whole = {path: Path(os.path.abspath(path)) for path in paths}
    named = {
        path: place.parent if place.name == "release" and place.is_dir() else place for path, place in whole.items()
    }
    parent = Path(os.path.commonpath([place.parent for place in named.values()]))
    names = {path: place.relative_to(parent).as_posix() for path, place in named.items()}
    return {path: f"./{name}" if name.startswith("-") else name for path, name in names.items()}


def _is_sweep(path: Path) -> bool:
    if path.is_dir():
        return (path / SWEEP).is_file()
    return path.is_file() and path.name == SWEEP


def _file(path: Path) -> ReleasedFile:
    content = untrusted.read_bytes(path, MOST_BYTES)
    return ReleasedFile(clean(path.name, 80), hashlib.sha256(content).hexdigest(), len(content))


def _sweep(path: Path, typed: str, *, first: int) -> SweepReport:
    """A sweep folder, or its sweep.json alone (then nothing but the table is known)."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and folders.kind(folder / SWEEP) != "file":
        raise UsageError(f"{folder / SWEEP}: is {folders.kind(folder / SWEEP)}; accepted in a sweep: the file itself")
    document = SweepDocument.read(folder / SWEEP)
    require_plain(folder)
    own: dict[str, list[str]] = {}
    for cell in document.cells:
        if cell.state == "finished" and Path(cell.folder).name == cell.folder and cell.folder != "..":
            own.setdefault(cell.configuration, []).append(cell.folder)
    lines, loaded = [], dict[Path, RunReport]()
    for index, row in enumerate(document.rows):
        key = letter(first + index)
        releases = (folder / RUNS / name / "release" for name in own.get(row.configuration, ()))
        release = next((found for found in releases if found.is_dir()), None)
        run = None
        if release is not None:
            if release not in loaded:
                loaded[release] = load_release(release, key=key, name=row.configuration)
            run = replace(loaded[release], key=key, cell_of=document.name)
        lines.append(SweepLine(key, row, run))
    return SweepReport(
        clean(document.name, 60), document, _file(folder / SWEEP), place(folder / SWEEP), typed, tuple(lines)
    )


def _with_document(page: Page, path: Path, key: str, typed: str) -> Page:
    name = clean(path.stem, 60)
    kind = _kind(path)
    if kind == "check":
        check = CheckReport(key, name, CheckDocument.read(path), _file(path), place(path), typed)
        return replace(page, checks=(*page.checks, check))
    if kind == "bugs":
        from attacks.bugs.benchmark import BugsDocument

        bugs = BugsReport(name, BugsDocument.read(path), _file(path), place(path), typed)
        return replace(page, bugs=(*page.bugs, bugs))
    audit = AuditDocument.read(path) if kind == "audit" else _as_audit(ScoresDocument.read(path))
    for index, summary in enumerate(audit.scores):
        check_summary(path, f"scores.{index}", summary)
    judged = judged_alone(audit)
    run = RunReport(
        key=key,
        name=name,
        config=None,
        claim_document=None,
        ledger_document=None,
        audit=judged.audit,
        benchmark=None,
        environment=None,
        files=(_file(path),),
        notices=judged.notices,
        source="audit" if kind == "audit" else "scores",
        place=place(path),
        typed=typed,
    )
    return replace(page, runs=(*page.runs, run))


def _as_audit(document: ScoresDocument) -> AuditDocument:
    """The same evidence in the form of an audit: scores from elsewhere come without ledger and run."""
    shared: dict[str, Any] = {name: getattr(document, name) for name in ScoresDocument.model_fields if name != "kind"}
    return AuditDocument(**shared)


SHOWN = ("audit", "scores", "bugs", "check")
# Version 1 documents do not say what they are; these fields tell them apart.
_FIELDS_OF_VERSION_1: tuple[tuple[str, frozenset[str]], ...] = (
    ("audit", frozenset({"verdict", "tests", "validity", "alternative"})),
    ("scores", frozenset({"verdict", "tests", "validity"})),
    ("bugs", frozenset({"bugs", "caught"})),
    ("check", frozenset({"verdict", "checks"})),
)


def _kind(path: Path) -> str:
    """Which document a file says that it is; UsageError for any other JSON."""
    try:
        tree = untrusted.read_json(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read ({error}); accepted: {ACCEPTED}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON, or cut off; accepted: {ACCEPTED}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: not a document that a report shows; accepted: {ACCEPTED}")
    said = tree.get("kind")
    if said is None and tree.get("schema_version") == 1:
        said = next((kind for kind, needed in _FIELDS_OF_VERSION_1 if needed <= set(tree)), None)
    if said in SHOWN:
        return str(said)
    what = "says no kind" if said is None else f"is of kind {clean(str(said), 40)!r}"
    raise UsageError(f"{path}: {what}, not a document that a report shows by itself; accepted: {ACCEPTED}")
