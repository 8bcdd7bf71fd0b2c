"""The ledger of a run: every place where private data is touched, and the budget spent.

The budget of a step is on disk *before* its noisy gradient is used, so a crash can only overstate it. A step that a
resumed run repeats uses the same batch and the same noise, releases nothing new and is therefore not counted twice.
No timestamps: a resumed run ends with the same bytes as an uninterrupted one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpaudit import atomic
from dpaudit.documents import LedgerDocument, LedgerRow, Spent
from dpaudit.errors import UsageError

if TYPE_CHECKING:
    from dpaudit.accounting import TunedEpsilon


class Ledger:
    """`release/ledger.json`; every change is on disk when the method returns."""

    def __init__(self, path: Path, document: LedgerDocument) -> None:
        self._path = path
        self._document = document

    @classmethod
    def create(
        cls,
        path: Path,
        rows: Sequence[LedgerRow],
        coins_sha256: str | None,
        planned: int | None,
        delta: float | None,
        config_sha256: str | None = None,
    ) -> "Ledger":
        """A new ledger with nothing spent; `planned` and `delta` None: a run that makes no claim spends no budget.

        config_sha256: of the configuration file that the run starts from. UsageError when `path` exists: spent budget
        is never erased.
        """
        if path.exists():
            raise UsageError(f"{path}: a ledger exists already; spent budget is never erased")
        spent = None
        if planned is not None and delta is not None:
            spent = Spent(steps_started=0, steps_planned=planned, epsilon=0.0, delta=delta)
        document = LedgerDocument(coins_sha256=coins_sha256, rows=tuple(rows), spent=spent, config_sha256=config_sha256)
        ledger = cls(path, document)
        ledger._save(document)
        return ledger

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """The ledger on disk; UsageError with one line when it is missing or damaged."""
        return cls(path, LedgerDocument.read(path))

    @property
    def document(self) -> LedgerDocument:
        return self._document

    @property
    def rows(self) -> tuple[LedgerRow, ...]:
        return self._document.rows

    @property
    def spent(self) -> Spent | None:
        return self._document.spent

    @property
    def steps_started(self) -> int:
        return self._document.spent.steps_started if self._document.spent else 0

    def start_step(self, step: int, epsilon: float | None) -> None:
        """Record, before its noisy gradient is used, that step number `step` (1-based) starts.

        step: exactly the next one, or one already recorded, which a resumed run repeats with the same batch and
        noise: then nothing changes on disk. epsilon: spent including this step (None: not known); never decreases.
        Raises ValueError for a step that would leave a gap or lie beyond the plan, for a falling eps, and for a
        repeated step whose eps is not the recorded one (then it is not the same run).
        """
        spent = self._document.spent
        if spent is None:
            raise ValueError("this run has no budget: it makes no claim")
        if 1 <= step <= spent.steps_started:
            _check_repeat(step, epsilon, spent)
            return
        if step != spent.steps_started + 1:
            raise ValueError(f"step {step} can't start: {spent.steps_started} steps are recorded")
        if step > spent.steps_planned:
            raise ValueError(f"step {step} lies beyond the plan of {spent.steps_planned}")
        if epsilon is not None and (math.isnan(epsilon) or (spent.epsilon is not None and epsilon < spent.epsilon)):
            raise ValueError(f"spent eps can't go from {spent.epsilon} to {epsilon}")
        after = spent.model_copy(update={"steps_started": step, "epsilon": epsilon})
        self._save(self._document.model_copy(update={"spent": after}))

    def add_row(self, row: LedgerRow) -> None:
        """Add a row; the same row again (a resumed run) changes nothing. ValueError: `path` has another row."""
        for old in self.rows:
            if old.path == row.path:
                if old == row:
                    return
                raise ValueError(f"the ledger has a row {row.path!r} already; use replace_row")
        self._save(self._document.model_copy(update={"rows": (*self.rows, row)}))

    def replace_row(self, row: LedgerRow) -> None:
        """Replace the row of the same `path`; KeyError when there is none."""
        if all(old.path != row.path for old in self.rows):
            raise KeyError(row.path)
        rows = tuple(row if old.path == row.path else old for old in self.rows)
        self._save(self._document.model_copy(update={"rows": rows}))

    def _save(self, document: LedgerDocument) -> None:
        sealed = document.sealed()
        atomic.write_document(self._path, sealed)
        self._document = sealed


def _check_repeat(step: int, epsilon: float | None, spent: Spent) -> None:
    """The last step must cost what is recorded, an earlier one no more (up to rounding between machines)."""
    if epsilon is None or spent.epsilon is None:
        return
    last = step == spent.steps_started
    same = math.isclose(epsilon, spent.epsilon, rel_tol=1e-9)
    if not same and (last or epsilon > spent.epsilon):
        raise ValueError(f"step {step} repeated with eps {epsilon}; {spent.epsilon} is recorded: not the same run")


def tuning_row(
    runs: int, *, what: str = "the best of several settings", accounted: "TunedEpsilon | None" = None
) -> LedgerRow:
    """The row for settings that were chosen by looking at private data.

    runs: how many runs were done. `accounted`: what `dpaudit.accounting.tuning` says, when the number of runs was drawn
    as it demands, only the best run leaves and it was chosen by a published or accounted score; otherwise the choice
    is declared UNACCOUNTED: each run's own eps does not cover it. One run alone chooses nothing, so `runs` < 2 without
    `accounted` is a ValueError.
    """
    if accounted is None and runs < 2:
        raise ValueError(f"{runs} runs choose nothing: no row is needed")
    if accounted is not None:
        return LedgerRow(
            path="hyper-parameter tuning",
            stage="tuning",
            status="accounted",
            explanation=f"Published is {what}, compared on private data. The number of runs was drawn at random "
            "beforehand and only the best run leaves, which costs what is stated instead of the eps of a single run.",
            evidence=accounted.sentence(),
        )
    return LedgerRow(
        path="hyper-parameter tuning",
        stage="tuning",
        status="UNACCOUNTED",
        explanation=f"Published is {what}, compared on private data. The choice itself depends on that data, and no "
        "single run's eps covers it.",
        evidence=f"{runs} runs compared; accounted only if their number is drawn at random beforehand and only the "
        "best is published (Papernot and Steinke 2022)",
    )
