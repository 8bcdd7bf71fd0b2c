"""Running a sweep: seed by seed, first all trainings of a round, then their benchmark in as few starts as possible.

A cell is its run folder and nothing else is kept about it, so a sweep that was killed anywhere goes on from the
folders: finished cells are skipped, an interrupted training is resumed. A cell that fails is reported and the others go
on; the next start tries it again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from dpaudit.documents import BenchmarkDocument
from dpaudit.executors import Executor, Outcome
from reports.sweep import jobs
from reports.sweep.board import Board, Entry, locked, tuning
from reports.sweep.document import State, SweepDocument
from reports.sweep.layout import FEATURES, LOGS
from reports.utility import OVERALL
from reports.worker import TASK

ROUND = 24  # cells: a benchmark problem shows after so many trainings at the latest
MakeExecutor = Callable[[Path], Executor]  # folder for the jobs' logs -> executor


class Watcher(Protocol):
    """Told about every change of a cell's state."""

    def __call__(self, board: Board, entry: Entry) -> None: ...


def run_sweep(board: Board, *, executor: MakeExecutor, lanes: int, watch: Watcher) -> SweepDocument:
    """Bring every cell of `board` as far as it gets. lanes: how many jobs the executor runs side by side."""
    with locked(board.out):
        board.write()
        logs = board.out / LOGS
        runner = executor(logs)
        for number, entries in enumerate(_rounds(board.entries), 1):
            unfinished = [entry for entry in entries if entry.state != "finished"]
            if not unfinished:
                continue
            _train(board, [e for e in unfinished if e.state != "trained"], runner, watch, logs)
            _measure(board, [e for e in unfinished if e.state == "trained"], runner, lanes, watch, logs, number)
            board.write()
        row = tuning(board.plan)
        for entry in board.entries:  # cells of an earlier, smaller sweep learn that there are more now
            if entry.state == "finished":
                jobs.declare(entry.run, row)
        return board.write()


def _rounds(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """All cells of a seed together, at most ROUND at a time: after the first round the whole table has values."""
    seeds = dict.fromkeys(entry.cell.seed for entry in entries)
    for seed in seeds:
        same = [entry for entry in entries if entry.cell.seed == seed]
        for start in range(0, len(same), ROUND):
            yield same[start : start + ROUND]


def _train(board: Board, entries: Sequence[Entry], runner: Executor, watch: Watcher, logs: Path) -> None:
    row, features = tuning(board.plan), board.out / FEATURES
    payloads = [jobs.train_payload(e.cell.config, e.run.path, row, board.plan.audits, features) for e in entries]

    def begin(index: int) -> None:
        entries[index].become("training")
        watch(board, entries[index])

    for outcome in runner.run(jobs.TRAIN, payloads, started=begin):
        entry = entries[outcome.index]
        entry.seconds = (entry.seconds or 0.0) + outcome.seconds
        _end(board, entry, outcome, "trained", watch, logs / f"{entry.cell.folder}.log")


def _measure(
    board: Board, entries: Sequence[Entry], runner: Executor, lanes: int, watch: Watcher, logs: Path, number: int
) -> None:
    """Cells dealt to `lanes` jobs; where such a job fails, its cells are tried one by one."""
    shares: list[Sequence[Entry]] = [entries[lane::lanes] for lane in range(min(lanes, len(entries)))]
    broken: list[Sequence[Entry]] = []
    for outcome, share in _measured(board, shares, runner, watch):
        if outcome.error is not None and len(share) > 1:
            broken += [[entry] for entry in share]
        else:
            for entry in share:
                _end(board, entry, outcome, "finished", watch, logs / f"round-{number}-benchmark-{outcome.index}.log")
    for outcome, (entry,) in _measured(board, broken, runner, watch):
        _end(board, entry, outcome, "finished", watch, logs / f"{entry.cell.folder}-benchmark.log")


def _measured(
    board: Board, shares: Sequence[Sequence[Entry]], runner: Executor, watch: Watcher
) -> Iterator[tuple[Outcome, Sequence[Entry]]]:
    def begin(index: int) -> None:
        for entry in shares[index]:
            entry.become("measuring")
            watch(board, entry)

    payloads = [
        {"runs": [str(entry.run.path.resolve()) for entry in share], "device": share[0].cell.config.model.device}
        for share in shares
    ]
    for outcome in runner.run(jobs.MEASURE, payloads, started=begin):
        yield outcome, shares[outcome.index]


def _end(board: Board, entry: Entry, outcome: Outcome, state: State, watch: Watcher, log: Path) -> None:
    """Record how a job ended; its log gets a name that a reader can find."""
    if outcome.log is not None and outcome.log.exists() and outcome.log != log:
        os.replace(outcome.log, log)
    if outcome.error is None:
        if state == "finished":
            entry.value = BenchmarkDocument.read(entry.run.benchmark).tasks[TASK][OVERALL].value
        entry.become(state)
    else:
        entry.become("failed", outcome.error)
    watch(board, entry)
