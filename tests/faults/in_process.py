"""Jobs of an executor in the process that is watched, so that their writes are counted and can fail like all others.

How jobs die with the process that started them, and what of them is left, is tested with real processes:
tests/dpaudit/test_executors.py, tests/reports/sweep/test_run.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpaudit import atomic
from dpaudit.documents import BenchmarkDocument
from dpaudit.errors import DpauditError
from dpaudit.executors import LocalExecutor, Outcome, load_function
from dpaudit.runs import RunFolder


def patch(measured: Path | None = None) -> Callable[[], None]:
    """Call in the process that runs the command. measured: a finished sweep from which measurements are taken.

    Reference models are trained one by one: how many a stack takes is decided by a clock. Returns what undoes it.
    """
    from attacks.membership import references

    before = LocalExecutor.run, references.best_stack

    def run(
        self: LocalExecutor,
        function: str,
        payloads: Sequence[Mapping[str, Any]],
        *,
        started: Callable[[int], None] | None = None,
    ) -> Iterator[Outcome]:
        for index, payload in enumerate(payloads):
            if started is not None:
                started(index)
            copied = json.loads(json.dumps(dict(payload)))
            try:
                measure = measured is not None and function.endswith(":measure")
                result = take(measured, copied) if measure else load_function(function)(copied)
            except DpauditError as failure:
                yield Outcome(index, None, " ".join(str(failure).split()), 0.0, code=failure.exit_code)
                continue
            yield Outcome(index, result, None, 0.0)

    LocalExecutor.run = run  # type: ignore[method-assign]
    references.best_stack = lambda *_, **__: 1  # type: ignore[assignment]

    def undo() -> None:
        LocalExecutor.run, references.best_stack = before  # type: ignore[method-assign]

    return undo


def take(measured: Path | None, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What lmms-eval measured of the same cells in a finished sweep.

    The writes of a benchmark itself are those of the scenario `benchmark`.
    """
    assert measured is not None
    for name in payload["runs"]:
        run = RunFolder(Path(name))
        whole = RunFolder(measured / "runs" / run.path.name)
        for path in sorted(path for path in whole.private.rglob("*") if path.is_file()):
            target = run.private / path.relative_to(whole.private)
            if not target.exists() and path.suffix == ".parquet":
                atomic.write_bytes(target, path.read_bytes(), mode=0o600)
        with run.lock():
            run.write(BenchmarkDocument.read(whole.benchmark))
    return {}
