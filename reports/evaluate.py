"""One task, one model: lmms-eval's numbers, with intervals and subgroups around them.

The value of a metric is what lmms-eval's own aggregation of that task says; here it is taken again of the same
per-question results, must agree, and is then taken of resamples and of subgroups. Nothing here imports lmms-eval.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpaudit.documents import Gap, Metric
from dpaudit.errors import EnvironmentFailure, UsageError
from reports import groups
from reports.metrics import cluster_metric, difference_of_means, resampled

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Aggregate:
    """How a task makes a metric of per-question results. mean: it is their plain mean."""

    function: Callable[[list[Any]], float]
    mean: bool


@dataclass(frozen=True)
class Results:
    """Per-question results of a task, in order. clusters: what each question stands or falls with."""

    name: str
    docs: tuple[Mapping[str, Any], ...]
    answers: tuple[str, ...]
    values: Mapping[str, Sequence[Any]]  # metric -> one result a question
    clusters: tuple[str, ...]
    sha256: str


def read(name: str, raw: Mapping[str, Any] | None, metrics: Sequence[str], pictures: Mapping[int, str]) -> Results:
    """The samples of lmms-eval in order. pictures: the hash of each question's picture."""
    if raw is None or name not in raw.get("samples", {}):
        raise EnvironmentFailure(f"lmms-eval returned no samples of task {name}")
    samples = sorted(raw["samples"][name], key=lambda sample: int(sample["doc_id"]))
    if [int(sample["doc_id"]) for sample in samples] != list(range(len(samples))):
        raise EnvironmentFailure(f"lmms-eval left out questions of task {name}")
    docs = tuple(sample["doc"] for sample in samples)
    digest = hashlib.sha256()
    for index, doc in enumerate(docs):
        said = json.dumps([pictures[index], doc], sort_keys=True, default=str)
        digest.update(said.encode())
    return Results(
        name=name,
        docs=docs,
        answers=tuple(_text(sample["filtered_resps"]) for sample in samples),
        values={metric: [sample[metric] for sample in samples] for metric in metrics if metric in samples[0]},
        clusters=tuple(str(doc["unit"]) if doc.get("unit") else pictures[index] for index, doc in enumerate(docs)),
        sha256=digest.hexdigest(),
    )


def _text(responses: Any) -> str:
    while isinstance(responses, list | tuple):
        responses = responses[0] if responses else ""
    return str(responses)


def measure(
    results: Results, aggregates: Mapping[str, Aggregate], official: Mapping[str, Any]
) -> tuple[dict[str, Metric], list[Gap], str]:
    """(metrics, gaps without the base model, headline). official: lmms-eval's own aggregates by `METRIC,FILTER`.

    Raises EnvironmentFailure where the two ways to the same number differ, UsageError for a task without a number.
    """
    metrics: dict[str, Metric] = {}
    for name, items in results.values.items():
        aggregate = aggregates[name]
        value = float(aggregate.function(list(items)))
        _agree(results.name, name, value, official)
        if math.isnan(value):
            continue  # nothing to measure it on: precision without a "yes", open questions in a closed set
        seen = _seen(name, items)
        if seen:
            metrics[name] = _metric(aggregate, items, results.clusters, value, seen)
    if not metrics:
        raise UsageError(f"task {results.name}: lmms-eval gives no number for it that can be resampled")
    headline = next(iter(metrics))
    gaps = []
    for grouping, found in groups.groupings(results.docs, [groups.target(doc) for doc in results.docs]).items():
        metrics |= _subgroups(results, headline, aggregates[headline], grouping, found)
        gap = _gap(results, headline, aggregates[headline], grouping, found, metrics)
        gaps += [gap] if gap is not None else []
    return metrics, gaps, headline


def _agree(task: str, metric: str, value: float, official: Mapping[str, Any]) -> None:
    stated = next((official[key] for key in official if key.partition(",")[0] == metric), None)
    if not isinstance(stated, int | float):
        raise EnvironmentFailure(f"task {task}: lmms-eval states no number for {metric}")
    if not (math.isnan(value) and math.isnan(stated)) and abs(float(stated) - value) > TOLERANCE:
        raise EnvironmentFailure(f"task {task}: lmms-eval's {metric} is {stated}, its own samples give {value}")


def _seen(metric: str, items: Sequence[Any]) -> int:
    """Questions behind a metric. SLAKE's own code scores a modality that a set does not have as 0: it is none."""
    if not metric.startswith("slake_") or metric == "slake_accuracy" or not isinstance(items[0], Mapping):
        return len(items)
    wanted = {"xray": "x-ray"}.get(part := metric.removeprefix("slake_").removesuffix("_accuracy"), part)
    return sum(wanted in (item["answer_type"], item["modality"], item["content_type"]) for item in items)


def _metric(aggregate: Aggregate, items: Sequence[Any], clusters: Sequence[str], value: float, n: int) -> Metric:
    if aggregate.mean:
        return cluster_metric([float(item) for item in items], clusters).model_copy(update={"value": value})
    low, high = resampled(aggregate.function, items, clusters) or (None, None)
    return Metric(value=value, low=low, high=high, n=n, pictures=len(set(clusters)))


def _subgroups(
    results: Results, headline: str, aggregate: Aggregate, grouping: str, found: Sequence[str | None]
) -> dict[str, Metric]:
    made = {}
    for group in sorted({name for name in found if name is not None}):
        chosen = [index for index, name in enumerate(found) if name == group]
        items = [results.values[headline][index] for index in chosen]
        clusters = [results.clusters[index] for index in chosen]
        value = float(aggregate.function(list(items)))
        if not math.isnan(value):
            made[groups.key(headline, grouping, group)] = _metric(aggregate, items, clusters, value, len(items))
    return made


def _gap(
    results: Results,
    headline: str,
    aggregate: Aggregate,
    grouping: str,
    found: Sequence[str | None],
    metrics: Mapping[str, Metric],
) -> Gap | None:
    """Between the best and the worst group with enough pictures; its interval is of these two, chosen by looking."""
    own = {
        name: metric
        for name, metric in groups.of(headline, grouping, metrics).items()
        if (metric.pictures or 0) >= groups.FEWEST_PICTURES
    }
    if len(own) < 2:
        return None
    best, worst = max(own, key=lambda name: own[name].value), min(own, key=lambda name: own[name].value)
    items = results.values[headline]
    if aggregate.mean:
        first, second = ([name == group for name in found] for group in (best, worst))
        limits = difference_of_means([float(item) for item in items], first, second, results.clusters)
    else:
        function = aggregate.function

        def difference(pairs: list[Any]) -> float:
            parts = [[item for item, name in pairs if name == group] for group in (best, worst)]
            return float(function(parts[0])) - float(function(parts[1])) if all(parts) else math.nan

        limits = resampled(difference, list(zip(items, found, strict=True)), results.clusters)
    return Gap(
        task=results.name,
        metric=headline,
        grouping=grouping,
        best=best,
        worst=worst,
        value=own[best].value - own[worst].value,
        low=limits[0] if limits is not None else None,
        high=limits[1] if limits is not None else None,
    )
