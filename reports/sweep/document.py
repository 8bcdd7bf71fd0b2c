"""`sweep.json`: the grid, what became of each cell, and one line per configuration."""

from typing import Any, Literal

from pydantic import Field

from dpaudit.documents import Document, LedgerRow, Metric, Number, Part, Verdict

State = Literal["waiting", "training", "trained", "measuring", "finished", "failed"]
Sources = Literal["seeds and pictures", "pictures", "none"]


MOST_ROWS, MOST_CELLS = 500, 10_000  # of a sweep; each row may have a run of its own described
MOST_VALUE = 1e12


class Averaged(Part):
    """A mean over seeds with a 95 % interval; `covers` says what varied behind it (see reports.sweep.table)."""

    value: float = Field(ge=-MOST_VALUE, le=MOST_VALUE)
    low: float | None
    high: float | None
    seeds: int = Field(description="Trainings behind the mean.")
    pictures: int = Field(description="Independent clusters of test questions, the same for all seeds.")
    n: int = Field(description="Held-out questions.")
    covers: Sources


class SweepCell(Part):
    """One run of the sweep; its folder is runs/`folder`."""

    folder: str = Field(max_length=255)
    configuration: str
    seed: int
    config_sha256: str
    state: State
    error: str | None = None
    seconds: float | None = Field(default=None, description="Wall time of the training job, start-up included.")
    exact_match: Metric | None = Field(default=None, description="Interval over pictures only: one training.")
    epsilon: Number | None = Field(default=None, description="Claimed; null without a claim.")
    delta: float | None = None
    epsilon_lower: Number | None = Field(default=None, description="Headline bound of its audit.")
    ceiling: Number | None = None
    verdict: Verdict | None = None


class SweepRow(Part):
    """One configuration at one point of the grid."""

    configuration: str
    series: str = Field(
        description="Its name without the values of the grid: lines that differ in those alone share it."
    )
    method: str | None = Field(description="null: the base model, not trained.")
    swept: dict[str, Any]
    epsilon: Number | None
    delta: float | None
    seeds: tuple[int, ...] = Field(description="Of its finished cells.")
    failed: int = 0
    exact_match: Averaged | None
    by_kind: dict[str, Averaged] = Field(default_factory=dict, description="exact_match by question kind.")
    against: str | None = None
    difference: Averaged | None = Field(
        default=None, description="exact_match minus that of `against`, over the same seeds and pictures."
    )


class SweepDocument(Document):
    """`OUT/sweep.json`, and what `dpaudit sweep --json` prints."""

    kind: Literal["sweep"] = "sweep"
    name: str
    finished: bool = Field(description="Every cell is finished; false while it runs or when one has failed.")
    grid: dict[str, Any] = Field(description="The grid as it was given; `dpaudit sweep --resume` reads it.")
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...]
    rows: tuple[SweepRow, ...] = Field(max_length=MOST_ROWS)
    cells: tuple[SweepCell, ...] = Field(max_length=MOST_CELLS)
    majority: Metric | None = Field(default=None, description="Always giving the most common answer.")
    sample_sha256: str | None = Field(description="The test questions; null: not measured, or cells differ.")
    ledger: tuple[LedgerRow, ...] = Field(description="What choosing between the cells costs.")
