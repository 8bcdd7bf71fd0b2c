"""What became of each cell of a sweep: read from the run folders, kept while it runs, written as sweep.json."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpaudit import atomic, folders
from dpaudit.documents import AuditDocument, BenchmarkDocument, ClaimDocument, LedgerRow, Metric
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.ledger import tuning_row
from dpaudit.runs import RunFolder
from dpaudit.verdict import headline
from reports import groups
from reports.benchmark import ANSWERS
from reports.sweep import table
from reports.sweep.document import Averaged, State, SweepCell, SweepDocument, SweepRow
from reports.sweep.grid import Cell, Plan, Point
from reports.sweep.layout import RUNS, require_plain
from reports.utility import OVERALL
from reports.worker import TASK

NAME = "sweep.json"


@dataclass
class Entry:
    """A cell and how far it is. `began`: when its present work started (monotonic seconds)."""

    cell: Cell
    run: RunFolder
    state: State = "waiting"
    error: str | None = None
    seconds: float | None = None
    began: float = 0.0
    value: float | None = None

    def become(self, state: State, error: str | None = None) -> None:
        self.state, self.error, self.began = state, error, time.monotonic()


@dataclass
class Board:
    """All cells of a sweep in `out`."""

    plan: Plan
    out: Path
    grid: Mapping[str, Any]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def read(
        cls, plan: Plan, out: Path, *, grid: Mapping[str, Any], overrides: Sequence[str], seeds: Sequence[int]
    ) -> "Board":
        """States as the folders have them; UsageError when a folder holds another run than the grid says."""
        board = cls(plan, out, grid, tuple(overrides), tuple(seeds))
        require_plain(out)
        earlier = {}
        if (out / NAME).exists():
            earlier = {cell.folder: cell.seconds for cell in SweepDocument.read(out / NAME).cells}
        for cell in plan.cells:
            run = RunFolder(out / RUNS / cell.folder)
            entry = Entry(cell, run, seconds=earlier.get(cell.folder))
            entry.become(_state(cell, run, plan.audits))
            board.entries.append(entry)
        return board

    def write(self) -> SweepDocument:
        """Write `sweep.json` and return it."""
        document = summarise(self)
        atomic.write_document(self.out / NAME, document)
        return document


def _state(cell: Cell, run: RunFolder, audits: Sequence[str]) -> State:
    if not run.config.is_file():
        return "waiting"
    if run.read_config().sha256() != cell.config.sha256():
        raise UsageError(
            f"{run.path}: holds another configuration than the grid says; delete it or choose another --out"
        )
    if not run.finished or (audits and not run.audit.is_file()):
        return "waiting"
    return "finished" if run.benchmark.is_file() and (run.private / ANSWERS).is_file() else "trained"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a sweep's folder alone; the operating system drops the lock with the process, also after kill -9."""
    folders.require_outside_runs("--out", out)
    atomic.make_folder(out)
    try:
        descriptor = atomic.open_own(out / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise atomic.failure(out / "lock", error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise EnvironmentFailure(f"--out {out}: in use by another sweep; wait for it") from error
    try:
        yield
    finally:
        os.close(descriptor)


def summarise(board: Board) -> SweepDocument:
    """The document of a board as it is."""
    answers = {e.cell.folder: _answers(e.run) for e in board.entries if e.state == "finished"}
    benchmarks = {f: BenchmarkDocument.read(board.out / RUNS / f / "release" / "benchmark.json") for f in answers}
    hashes = {part.sample_sha256 for part in answers.values()}
    rows = [_row(point, board, answers, benchmarks) for point in board.plan.points]
    return SweepDocument(
        name=board.plan.name,
        finished=all(entry.state == "finished" for entry in board.entries),
        grid=dict(board.grid),
        overrides=board.overrides,
        seeds=board.seeds,
        rows=tuple(rows),
        cells=tuple(_cell(entry, benchmarks.get(entry.cell.folder)) for entry in board.entries),
        majority=next((document.majority[TASK] for document in benchmarks.values()), None),
        sample_sha256=hashes.pop() if len(hashes) == 1 else None,
        ledger=tuple(row for row in [tuning(board.plan)] if row is not None),
    )


def tuning(plan: Plan) -> LedgerRow | None:
    """What choosing between the cells costs: a row for the sweep's document and for the ledger of every cell."""
    if len(plan.cells) < 2:
        return None
    return tuning_row(len(plan.cells), what=f"one or more of the runs of the sweep {plan.name}")


def _answers(run: RunFolder) -> table.Answers:
    frame = atomic.read_frame(run.private / ANSWERS)
    return table.Answers(
        frame["correct"].to_numpy(dtype="float64"),
        tuple(frame["cluster"].astype(str)),
        tuple(frame["kind"].astype(str)),
        str(frame["sample"].iloc[0]),
    )


def _cell(entry: Entry, benchmark: BenchmarkDocument | None) -> SweepCell:
    claim = ClaimDocument.read(entry.run.claim).claim if entry.run.claim.is_file() else None
    audit = AuditDocument.read(entry.run.audit) if entry.run.audit.is_file() else None
    best = headline(audit) if audit is not None else None
    metric = benchmark.tasks[TASK][OVERALL] if benchmark is not None else None
    entry.value = metric.value if metric is not None else None
    return SweepCell(
        folder=entry.cell.folder,
        configuration=entry.cell.point.name,
        seed=entry.cell.seed,
        config_sha256=entry.cell.config.sha256(),
        state=entry.state,
        error=entry.error,
        seconds=entry.seconds,
        exact_match=metric,
        epsilon=claim.epsilon if claim is not None else None,
        delta=claim.delta if claim is not None else None,
        epsilon_lower=best.epsilon_lower if best is not None else None,
        ceiling=best.ceiling if best is not None else None,
        verdict=audit.verdict if audit is not None else None,
    )


def _row(
    point: Point,
    board: Board,
    answers: Mapping[str, table.Answers],
    benchmarks: Mapping[str, BenchmarkDocument],
) -> SweepRow:
    if not point.trained:
        return _base_row(point, benchmarks)
    mine = {e.cell.seed: e for e in board.entries if e.cell.point.name == point.name}
    done = {seed: answers[entry.cell.folder] for seed, entry in mine.items() if entry.cell.folder in answers}
    same = len({part.sample_sha256 for part in done.values()}) == 1
    config = next(iter(mine.values())).cell.config
    claim = next((ClaimDocument.read(e.run.claim).claim for e in mine.values() if e.run.claim.is_file()), None)
    return SweepRow(
        configuration=point.name,
        series=point.series,
        method=config.method,
        swept=dict(point.swept),
        epsilon=claim.epsilon if claim is not None else None,
        delta=claim.delta if claim is not None else None,
        seeds=tuple(done),
        failed=sum(entry.state == "failed" for entry in mine.values()),
        exact_match=table.averaged(list(done.values())) if same else None,
        by_kind=table.by_kind(list(done.values())) if same else {},
        against=point.against,
        difference=_difference(point, board, done, answers),
    )


def _difference(
    point: Point, board: Board, done: Mapping[int, table.Answers], answers: Mapping[str, table.Answers]
) -> Averaged | None:
    """Against the other configuration, over the seeds that both have finished on the same questions."""
    other = {
        e.cell.seed: answers[e.cell.folder]
        for e in board.entries
        if e.cell.point.name == point.against and e.cell.folder in answers
    }
    both = [seed for seed in done if seed in other]
    hashes = {part.sample_sha256 for seed in both for part in (done[seed], other[seed])}
    if not both or len(hashes) != 1:
        return None
    return table.difference([done[seed] for seed in both], [other[seed] for seed in both])


def _base_row(point: Point, benchmarks: Mapping[str, BenchmarkDocument]) -> SweepRow:
    found = next((d.base[TASK] for d in benchmarks.values() if d.base is not None and TASK in d.base), {})
    kinds = {kind: _untrained(metric) for kind, metric in groups.of(OVERALL, groups.QUESTION, found).items()}
    return SweepRow(
        configuration=point.name,
        series=point.series,
        method=None,
        swept={},
        epsilon=None,
        delta=None,
        seeds=(),
        exact_match=_untrained(found[OVERALL]) if OVERALL in found else None,
        by_kind=kinds,
    )


def _untrained(metric: Metric) -> Averaged:
    return Averaged(
        value=metric.value,
        low=metric.low,
        high=metric.high,
        seeds=0,
        pictures=metric.pictures or 0,
        n=metric.n,
        covers="none" if metric.low is None else "pictures",
    )
