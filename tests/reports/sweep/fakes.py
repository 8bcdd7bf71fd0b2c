"""A sweep without training: an executor that leaves the run folders that a real one would."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpaudit import atomic
from dpaudit.config import read_yaml, resolve
from dpaudit.documents import BenchmarkDocument, ClaimDocument, LedgerRow
from dpaudit.executors import Outcome
from dpaudit.ledger import Ledger
from dpaudit.runs import RunFolder
from reports.benchmark import ANSWERS
from reports.metrics import by_kind
from reports.sweep import jobs
from reports.sweep.board import Board
from reports.sweep.document import SweepDocument
from reports.sweep.grid import Grid, make_plan
from reports.sweep.run import run_sweep
from reports.worker import TASK
from tests.reports import fixtures

PICTURES, KINDS = 40, ("digit", "parity")
SHA = "ab" * 32


def correctness(config: Any) -> list[float]:
    """Answers that depend on method, eps and seed: 40 pictures with two questions each."""
    good = {"non-private": 0.95, "dp-sgd": 0.7, "dual-priv": 0.75}.get(config.method, 0.5)
    good += 0.02 * float(config.privacy.epsilon or 0) if config.method != "non-private" else 0.0
    rng = np.random.default_rng([config.seed, round(1000 * good)])
    return [float(value) for value in rng.random(2 * PICTURES) < good]


class FakeExecutor:
    """Runs sweep jobs in this process; `fail(payload)` names an error, `stop` ends everything after that many jobs."""

    def __init__(self, fail: Callable[[str, Mapping[str, Any]], str | None] = lambda f, p: None, stop: int = 10**6):
        self.fail, self.stop = fail, stop
        self.done: list[tuple[str, Any]] = []

    def run(
        self,
        function: str,
        payloads: Sequence[Mapping[str, Any]],
        *,
        started: Callable[[int], None] | None = None,
    ) -> Iterator[Outcome]:
        for index, payload in reversed(list(enumerate(payloads))):  # any order is allowed
            json.dumps(payload)
            if started is not None:
                started(index)
            if len(self.done) >= self.stop:
                raise KeyboardInterrupt
            error = self.fail(function, payload)
            if error is None:
                self.done.append((function, payload))
                {jobs.TRAIN: self._train, jobs.MEASURE: self._measure}[function](payload)
            yield Outcome(index, {} if error is None else None, error, 1.5)

    def _train(self, payload: Mapping[str, Any]) -> None:
        config = resolve(payload["config"])
        run = RunFolder.create(Path(payload["out"]))
        atomic.write_text(run.config, config.to_yaml())
        claim = None if config.method == "non-private" else fixtures.claim(float(config.privacy.epsilon or 0))
        atomic.write_document(run.claim, ClaimDocument(claim=claim))
        Ledger.create(run.ledger, fixtures.ledger_rows(config.method), None, None, None)
        (run.model / "adapter.safetensors").write_bytes(b"weights")
        run.finish_model()
        if payload["row"] is not None:
            jobs.declare(run, LedgerRow.model_validate(payload["row"]))

    def _measure(self, payload: Mapping[str, Any]) -> None:
        kinds = KINDS * PICTURES
        clusters = [f"p{index // 2}" for index in range(2 * PICTURES)]
        for path in payload["runs"]:
            run = RunFolder.open(Path(path))
            correct = correctness(resolve(read_yaml(run.config)))
            metrics = by_kind(correct, kinds, clusters)
            document = fixtures.benchmark(0.8).model_copy(
                update={"tasks": {TASK: metrics}, "sample_sha256": {TASK: SHA}}
            )
            frame = pd.DataFrame({"cluster": clusters, "kind": kinds, "answer": "x", "correct": correct, "sample": SHA})
            atomic.write_frame(run.private / ANSWERS, frame)
            atomic.write_document(run.benchmark, BenchmarkDocument.model_validate(document.model_dump()))


SMALL = Grid.model_validate(
    {
        "name": "small",
        "grid": {"privacy.epsilon": [3, 8]},
        "configurations": [
            {"name": "base model", "train": False},
            {"name": "non-private", "settings": {"method": "non-private"}, "grid": {}},
            {"name": "dp-sgd", "settings": {"method": "dp-sgd"}},
            {"name": "dual-priv", "settings": {"method": "dual-priv"}, "against": "dp-sgd"},
        ],
    }
)


def write_sweep(out: Path, executor: FakeExecutor | None = None, *, seeds: tuple[int, ...] = (0, 1)) -> SweepDocument:
    """A sweep of SMALL in `out` as a real one leaves it."""
    chosen = executor or FakeExecutor()
    board = Board.read(make_plan(SMALL, seeds=seeds), out, grid=SMALL.model_dump(), overrides=(), seeds=seeds)
    return run_sweep(board, executor=lambda logs: chosen, lanes=2, watch=lambda board, entry: None)
