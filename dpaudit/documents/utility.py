"""Accuracy on visual questions, with all that it takes to measure it again."""

from typing import Literal

from pydantic import Field

from dpaudit.documents.base import Document, Part


class Metric(Part):
    """A measured utility with its 95 % interval.

    The interval is a bootstrap over clusters of questions that stand or fall together: privacy units of a run's own
    data, pictures of any other task. Where all answers are right, or all wrong, it is the exact Clopper-Pearson limit
    for that many clusters. Null limits: a single cluster, or a metric that can't be resampled.
    """

    value: float = Field(ge=-1e12, le=1e12)
    low: float | None
    high: float | None
    n: int = Field(description="Questions.")
    pictures: int | None = Field(default=None, description="Clusters behind the interval: units, or pictures.")


class Gap(Part):
    """The largest difference in accuracy between two groups of test questions, on the same model."""

    task: str
    metric: str
    grouping: str = Field(description="'question kind', 'answer kind' or 'unit group'.")
    best: str = Field(description="Group with the highest value.")
    worst: str = Field(description="Group with the lowest value.")
    value: float = Field(description="best minus worst.")
    low: float | None = Field(description="95 %, bootstrap over clusters, of these two groups' difference.")
    high: float | None
    base: float | None = Field(default=None, description="The base model's difference between the same two groups.")


class TaskAbout(Part):
    """Where the numbers of one task come from: all that is needed to measure them again."""

    headline: str = Field(description="The metric that stands for the task.")
    data: str = Field(description="The run's test questions, a local copy, or a set on the hub.")
    scored_by: str = Field(description="Whose metric code it is: lmms-eval's task, or dpaudit's.")
    prompt: str = Field(description="What the model is sent: its own template with the task's words around {question}.")
    max_new_tokens: int
    batch_size: int
    precision: str
    device: str
    lmms_eval_version: str
    questions: int
    pictures: int = Field(description="Different pictures.")
    limit: int | None = Field(default=None, description="Only so many were asked.")
    held_out: str | None = Field(
        default=None, description="Whether the pictures were in train, for a run's own questions; null: not looked at."
    )
    missing: int = Field(
        default=0, description="Questions longer than the model's context: no answer, counted as wrong."
    )


class BenchmarkDocument(Document):
    """`release/benchmark.json`, and what `dpaudit benchmark --json` prints.

    Metric names: METRIC over everything; METRIC/KIND for a question kind, METRIC/answer kind: KIND and METRIC/unit
    group: GROUP for other subgroups. METRIC is `exact_match` for a run's own questions, else what the task calls it.
    Prompt, batch size, precision, device and version beside `tasks` are those of the latest call; `about` has each
    task's own.
    """

    kind: Literal["benchmark"] = "benchmark"
    tasks: dict[str, dict[str, Metric]]
    base: dict[str, dict[str, Metric]] | None = Field(default=None, description="The base model, same tasks.")
    majority: dict[str, Metric] = Field(
        default_factory=dict,
        description="Per task, what the most common answer to each kind of question reaches: that of public synthetic "
        "pictures for the embedded data, of the test questions themselves for any other set.",
    )
    gaps: tuple[Gap, ...] = Field(default=(), description="Between subgroups, the widest of each grouping.")
    about: dict[str, TaskAbout] = Field(default_factory=dict, description="Per task.")
    lmms_eval_version: str
    prompt: str
    batch_size: int
    precision: str
    device: str
    sample_sha256: dict[str, str] = Field(description="Per task: hash over questions, answers and pictures.")
    seconds: float
