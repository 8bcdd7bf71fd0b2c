"""What a report is made of: the typed documents in the `release/` part of each run folder, and nothing else.

`private/` is opened only when the reader's user asks for it (`--include-private`, `--show-examples`), and what comes
from there carries an UNACCOUNTED ledger row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from dpaudit import untrusted, verdict
from dpaudit.config import RunConfig, read_yaml, resolve
from dpaudit.documents import (
    AuditDocument,
    BenchmarkDocument,
    Claim,
    ClaimDocument,
    Document,
    EnvironmentDocument,
    GameDocument,
    LedgerDocument,
    LedgerRow,
    Part,
    RunInfo,
    ScoreSummary,
    Test,
    Thumbnail,
    Verdict,
)
from dpaudit.errors import UsageError
from dpaudit.folders import require_plain
from reports.integrity import notices
from reports.judged import judge, priced
from reports.text import clean
from reports.vouched import Vouched, check

MOST_STEP, MOST_VALUE = 10**12, 1e100  # of training curves: what a figure can show
AnyDocument = TypeVar("AnyDocument", bound=Document)

PRIVATE_CURVES = LedgerRow(
    path="report: training curves",
    stage="report",
    status="UNACCOUNTED",
    explanation="This report shows exact training curves, which are computed from private records without noise.",
    evidence="Asked for with --include-private; the claim does not cover this page.",
)
PRIVATE_PICTURES = LedgerRow(
    path="report: pictures",
    stage="report",
    status="UNACCOUNTED",
    explanation="This report shows pictures that were made from real data.",
    evidence="Asked for with --show-examples; the claim does not cover this page.",
)


@dataclass(frozen=True)
class ReleasedFile:
    """A file under `release/` as it was read: its hash pins the report to it."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Curve:
    """One training curve from the private part: values by step."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunReport:
    """One run as the report sees it. A document that isn't there (yet) is None.

    `key` is the letter that stands for the run in figures; `notices` are contradictions between its documents.
    `source`: what was given, a run folder or a bare document. `cell_of`: the sweep for one of whose configurations this
    run stands. `place`: where its evidence is, as a relative address; pages don't show it. `vouched`: who signed it.
    `unfit`: those of the notices for which it can't be signed.
    `typed`: how a command names it in the folder that holds all subjects.
    """

    key: str
    name: str
    config: RunConfig | None
    claim_document: ClaimDocument | None
    ledger_document: LedgerDocument | None
    audit: AuditDocument | None  # of a run folder: as the recorded games give it (reports.judged)
    benchmark: BenchmarkDocument | None
    environment: EnvironmentDocument | None
    files: tuple[ReleasedFile, ...]
    games: tuple[GameDocument, ...] = ()
    notices: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    private_gallery: tuple[Thumbnail, ...] = ()
    source: Literal["run", "scores", "audit"] = "run"
    cell_of: str | None = None
    place: str = ""
    vouched: Vouched = field(default_factory=Vouched)
    unfit: tuple[str, ...] = ()
    typed: str = ""

    @property
    def claim(self) -> Claim | None:
        """The claim under audit; `claim.json` is the owner's word, the audit's copy stands in where it is missing."""
        if self.claim_document is not None:
            return self.claim_document.claim
        return self.audit.claim if self.audit is not None else None

    @property
    def method(self) -> str:
        if self.config is not None:
            return self.config.method
        return self.audit.run.method if self.audit is not None and self.audit.run is not None else "unknown method"

    @property
    def verdict(self) -> Verdict | None:
        return self.audit.verdict if self.audit is not None else None

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """The rows of the run, those that the audit added, and those that this report itself adds."""
        own = self.ledger_document.rows if self.ledger_document is not None else ()
        audited = self.audit.ledger if self.audit is not None else ()
        later = [row for row in own if row.path not in {judged.path for judged in audited}]  # added after the audit
        rows = (*audited, *later)
        extra = [PRIVATE_CURVES] if self.curves else []
        extra += [PRIVATE_PICTURES] if self.private_gallery else []
        return (*rows, *extra)

    @property
    def gallery(self) -> tuple[Thumbnail, ...]:
        released = self.audit.gallery if self.audit is not None else ()
        return (*released, *self.private_gallery)

    @property
    def headline(self) -> Test | None:
        """The test behind the headline bound."""
        return verdict.headline(self.audit) if self.audit is not None else None

    @property
    def headline_confidence(self) -> float | None:
        return verdict.headline_confidence(self.audit) if self.audit is not None else None

    @property
    def within_mechanism(self) -> Test | None:
        """The best bound within DP-SGD of the claimed q and T."""
        return verdict.within_mechanism(self.audit) if self.audit is not None else None


class Gallery(Part):
    """`private/gallery.json`: canary pictures made from real data, shown only with `--show-examples`."""

    thumbnails: tuple[Thumbnail, ...]


def load_runs(
    paths: Sequence[Path], *, include_private: bool = False, show_examples: bool = False
) -> tuple[RunReport, ...]:
    """Read every run's documents; UsageError (one line naming file and field) when one can't be understood."""
    if not paths:
        raise UsageError("RUN: give at least one run folder")
    folders = [release_of(path) for path in paths]
    seen: dict[Path, Path] = {}
    for path, folder in zip(paths, folders, strict=True):
        if folder.resolve() in seen:
            raise UsageError(f"RUN: {path} is given twice (also as {seen[folder.resolve()]})")
        seen[folder.resolve()] = path
    names = distinct([_name(folder) for folder in folders])
    runs = []
    for index, (folder, name) in enumerate(zip(folders, names, strict=True)):
        run = load_release(folder, key=letter(index), name=name)
        private = folder.parent / "private"
        if include_private or show_examples:
            require_plain(private)
        if include_private:
            run = replace(run, curves=_curves(private / "metrics.jsonl"))
        if show_examples:
            run = replace(run, private_gallery=_private_gallery(private / "gallery.json"))
        runs.append(run)
    return tuple(runs)


def release_of(path: Path) -> Path:
    """The release part of a run folder; an auditor who was given `release/` alone may name that."""
    if not path.exists():
        raise UsageError(f"RUN: {path}: no such folder")
    if (path / "release").is_dir():
        return path / "release"
    if path.is_dir() and any((path / name).is_file() for name in ("config.yaml", "claim.json", "audit.json")):
        return path
    raise UsageError(f"RUN: {path}: not a run folder (it has no release/ with config.yaml, claim.json or audit.json)")


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return (folder.parent.name if folder.name == "release" else folder.name) or "run"


def place(path: Path) -> str:
    """A path as an address relative to the working directory; outside of it the name alone (a path tells too much)."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.name


def distinct(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        distinct.append(name if names.count(name) == 1 else f"{name} ({counts[name]})")
    return distinct


def letter(index: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def load_release(folder: Path, *, key: str, name: str) -> RunReport:
    """The release part of a run, in which only ordinary files may lie (dpaudit.folders)."""
    require_plain(folder)
    config = _config(folder / "config.yaml")
    said = _document(AuditDocument, folder / "audit.json")
    claim = _document(ClaimDocument, folder / "claim.json")
    ledger = _document(LedgerDocument, folder / "ledger.json")
    info = RunInfo(
        name=name,
        method=config.method if config is not None else "unknown method",
        config_sha256=config.sha256() if config is not None else "",
        coins_sha256=ledger.coins_sha256 if ledger is not None else None,
    )
    judged = judge(folder, claim=claim, ledger=ledger, audit=said, run=info, config=config)
    if judged.audit is not None:
        for index, summary in enumerate(judged.audit.scores):
            check_summary(folder / "audit.json", f"scores.{index}", summary)
    run = RunReport(
        key=key,
        name=clean(name, 60),
        config=config,
        claim_document=claim,
        ledger_document=ledger,
        audit=judged.audit,
        benchmark=_document(BenchmarkDocument, folder / "benchmark.json"),
        environment=_document(EnvironmentDocument, folder / "environment.json"),
        files=_files(folder),
        games=judged.games,
        place=place(folder / "audit.json"),
    )
    hashes = {file.name: file.sha256 for file in run.files}
    unfit = (*judged.notices, *_contradictions(run, said), *notices(folder, hashes))
    rows = priced(folder, run.claim, config, ledger, judged.games)
    vouched = check(folder, run)
    return replace(run, vouched=vouched, unfit=unfit, notices=(*vouched.notices, *unfit, *map(_sentence, rows)))


def _sentence(row: LedgerRow) -> str:
    return f"{row.explanation} {row.evidence}."


def _config(path: Path) -> RunConfig | None:
    if not path.exists():
        return None
    try:
        return resolve(read_yaml(path))
    except UsageError as error:
        text = str(error).removeprefix(f"--config {path}: ")
        raise UsageError(f"{path}: not a run configuration: {text}") from error


def _document(model: type[AnyDocument], path: Path) -> AnyDocument | None:
    return model.read(path) if path.exists() else None


def check_summary(path: Path, field: str, summary: ScoreSummary) -> None:
    bins = len(summary.edges) - 1
    if bins < 1 or len(summary.counts_in) != bins or len(summary.counts_out) != bins:
        raise UsageError(f"{path}: {field}: edges must be one more than counts_in and counts_out")
    if any(b <= a for a, b in zip(summary.edges, summary.edges[1:], strict=False)):
        raise UsageError(f"{path}: {field}.edges: must rise")
    if any(count < 0 for count in (*summary.counts_in, *summary.counts_out)):
        raise UsageError(f"{path}: {field}: counts must not be negative")
    if any(not (0 <= point.fpr <= 1 and 0 <= point.tpr <= 1) for point in summary.roc):
        raise UsageError(f"{path}: {field}.roc: rates must lie between 0 and 1")


def _files(folder: Path) -> tuple[ReleasedFile, ...]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            digest = untrusted.sha256(path, untrusted.MOST_RELEASED, links=False)
            found.append(ReleasedFile(path.relative_to(folder).as_posix(), digest, path.stat().st_size))
    return tuple(found)


def _contradictions(run: RunReport, audit: AuditDocument | None) -> tuple[str, ...]:
    """Places where the documents of one run don't fit each other: a reader must not take one for the other's.

    audit: audit.json as it is.
    """
    notices = []
    claim = run.claim_document
    if audit is not None and claim is not None and audit.claim != claim.claim:
        notices.append("audit.json was made for another claim than the one in claim.json.")
    made_for = audit.run.config_sha256 if audit is not None and audit.run is not None else None
    if run.config is not None and made_for is not None and made_for != run.config.sha256():
        notices.append("audit.json was made for another configuration than the one in config.yaml.")
    coins = run.ledger_document.coins_sha256 if run.ledger_document is not None else None
    for game in run.games:  # a game on a twin has the twin's coins, which the twin's own ledger hashed
        if game.about == "weights" and None not in (coins, game.coins_sha256) and coins != game.coins_sha256:
            notices.append(f"The coins of game {game.name} are not the ones that the ledger hashed before training.")
    spent = run.ledger_document.spent if run.ledger_document is not None else None
    if spent is not None and spent.epsilon is not None and run.claim is not None and spent.delta == run.claim.delta:
        # The ledger is written in steps of its own; a hundredth covers the rounding of printed values.
        if spent.epsilon > run.claim.epsilon * 1.0001 + 1e-9:
            notices.append("The ledger has spent more eps than the claim states.")
        if spent.steps_started < spent.steps_planned:
            notices.append(
                f"Training has made {spent.steps_started} of {spent.steps_planned} steps; the claim is for all."
            )
    return tuple(notices)


def _curves(path: Path) -> tuple[Curve, ...]:
    """Every number that the private metrics log holds by step, as curves."""
    try:
        lines = untrusted.read_text(path, untrusted.MOST_LOG).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--include-private: {path}: can't be read ({error})") from error
    points: dict[str, list[tuple[float, float]]] = {}
    for row, line in enumerate(lines, start=1):
        try:
            event = untrusted.parse_json(line) if line.strip() else {}
        except ValueError as error:
            raise UsageError(f"--include-private: {path}: row {row}: not JSON") from error
        step = event.get("step") if isinstance(event, dict) else None
        if not isinstance(step, int) or not 0 <= step <= MOST_STEP:
            continue
        for name, value in event.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                if not abs(value) <= MOST_VALUE:  # also where it is an integer that no float holds
                    raise UsageError(f"--include-private: {path}: row {row}: a number beyond {MOST_VALUE:g}")
                points.setdefault(name, []).append((float(step), float(value)))
    return tuple(
        Curve(clean(name, 40), tuple(s for s, _ in pairs), tuple(v for _, v in pairs))
        for name, pairs in sorted(points.items())
        if len(pairs) > 1
    )


def _private_gallery(path: Path) -> tuple[Thumbnail, ...]:
    if not path.exists():
        return ()
    try:
        return Gallery.model_validate_json(untrusted.read_bytes(path, untrusted.MOST_DOCUMENT)).thumbnails
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise UsageError(f"{path}: not a gallery: {where}: {first['msg']}") from error
