"""Utility of runs through lmms-eval, in a process of its own: held-out records, lmms-eval's tasks, local sets."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dpaudit import atomic, extras
from dpaudit.config import RunConfig
from dpaudit.documents import BenchmarkDocument, Gap, Metric, TaskAbout
from dpaudit.errors import EnvironmentFailure, UsageError, rejected
from dpaudit.runs import RunFolder
from reports import card, catalogue, groups, heldout, process
from reports.catalogue import HELD_OUT, OWN_TASKS, TaskSpec
from reports.heldout import Questions
from reports.process import LOG, Outcome, Progress, Settings, TaskOutcome
from trainers.records import Dataset

ANSWERS = "answers.parquet"
PROCESSES = 2


@dataclass(frozen=True)
class Asked:
    """What to measure. tasks: names; data: local copies by task; group: a column of the run's test file."""

    base: bool = True
    limit: int | None = None
    tasks: tuple[str, ...] = (HELD_OUT,)
    data: Mapping[str, Path] = field(default_factory=dict)
    group: str | None = None


def benchmark(run: RunFolder, **options: Any) -> BenchmarkDocument:
    """Measure one run (and its base model) and write `release/benchmark.json`; options as `benchmark_many`."""
    return benchmark_many([run], **options)[0]


def benchmark_many(
    runs: Sequence[RunFolder],
    *,
    base: bool = True,
    limit: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    processes: int = PROCESSES,
    tasks: Sequence[str] = (),
    data: Mapping[str, Path] | None = None,
    online: bool = False,
    group: str | None = None,
    progress: Progress = lambda text: None,
) -> list[BenchmarkDocument]:
    """Measure several runs and write each one's `release/benchmark.json`; documents in the order given.

    Runs on the same data share one export and, on a CPU, up to `processes` worker processes; a base model is measured
    once. `limit`: the first N held-out units, or questions of another task. tasks: by name (`catalogue.accepted`),
    default the run's own held-out questions; data: local copies by task; online: other data may come from the hub;
    group: a column of the run's local test file, for accuracy by group of units. What an earlier call measured on other
    tasks stays in the document. Every held-out answer is kept in private/answers.parquet. Raises UsageError (unfinished
    run, bad value, bad copy), EnvironmentFailure (no lmms-eval, no data, a worker that died; its log is
    private/benchmark.log).
    """
    if limit is not None and limit < 2:
        raise rejected("--limit", limit, "a whole number of at least 2")
    if batch_size < 1:
        raise rejected("--batch-size", batch_size, "a whole number of at least 1")
    names = catalogue.choose(tasks, data or {})
    if group is not None and HELD_OUT not in names:
        raise rejected("--group", group, f"a call that measures {HELD_OUT}; other sets carry a column 'group'")
    extras.require_lmms_eval("benchmark")
    from trainers.vlm import pick_device

    for run in runs:
        run.require_finished()
    kind = pick_device(device).type  # a missing device is told at once, not after lmms-eval's slow start
    processes = min(processes, os.cpu_count() or 1) if kind == "cpu" else 1
    asked = Asked(base, limit, names, data or {}, group)
    settings = Settings(batch_size, device, processes, online)
    configs = [run.read_config() for run in runs]
    sharing: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        sharing.setdefault(config.data.model_dump_json(), []).append(index)
    documents: dict[int, BenchmarkDocument] = {}
    for members in sharing.values():
        own = [(runs[index], configs[index]) for index in members]
        made = _group(own, asked, settings, progress)
        documents.update(zip(members, made, strict=True))
    for run in runs:
        card.renew(run.path, progress)
    return [documents[index] for index in range(len(runs))]


def _group(
    runs: Sequence[tuple[RunFolder, RunConfig]], asked: Asked, settings: Settings, progress: Progress
) -> list[BenchmarkDocument]:
    """Runs that share a data set."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for run, _ in runs:
            stack.enter_context(run.lock())
        folder = stack.enter_context(_workplace(runs[0][0]))
        copies = folder / "copies"
        copies.mkdir()
        specs = catalogue.specify(
            asked.tasks, asked.data, online=settings.online, limit=asked.limit, workplace=copies
        )  # first, since a bad copy is told before anything slow
        held = None
        if HELD_OUT in asked.tasks:
            progress("preparing the test questions")
            held = _held_out(runs[0][1], folder, asked)
            specs = [_own_spec(folder), *specs]
        models = _models(runs, asked.base)
        outcomes = process.evaluate(
            models, specs, folder, log=runs[0][0].private / LOG, settings=settings, progress=progress
        )
        documents = []
        for run, config in runs:
            own, base = outcomes[str(run.path)], outcomes.get(_base_key(config))
            made = _document(own, base, specs, held, asked, settings.batch_size, time.perf_counter() - began)
            document = _with_earlier(run, made)
            if held is not None:
                save_answers(run, held[1], own.tasks[HELD_OUT])
            run.write(document)
            documents.append(document)
    return documents


def _held_out(config: RunConfig, folder: Path, asked: Asked) -> tuple[Dataset, Questions]:
    from trainers.data import load

    dataset = load(config.data)
    found = heldout.unit_groups(config.data, dataset, asked.group) if asked.group is not None else None
    return dataset, heldout.export(dataset, folder / "test.parquet", limit=asked.limit, unit_groups=found)


def _own_spec(folder: Path) -> TaskSpec:
    files = {"test": str(folder / "test.parquet")}
    words = "the run's test questions"
    return TaskSpec(
        HELD_OUT, HELD_OUT, str(OWN_TASKS), words, own=True, override={"dataset_kwargs": {"data_files": files}}
    )


def _models(runs: Sequence[tuple[RunFolder, RunConfig]], base: bool) -> dict[str, dict[str, Any]]:
    """What the workers load: each different base model once, then the runs."""
    models: dict[str, dict[str, Any]] = {}
    for _, config in runs if base else ():
        entry = {
            "name": "base model",
            "run": None,
            "base": _local(config.model.path),
            "precision": config.model.precision,
        }
        models.setdefault(_base_key(config), entry)
    for run, _ in runs:
        models[str(run.path)] = {"name": run.path.name, "run": str(run.path.resolve()), "base": None}
    return models


def _base_key(config: RunConfig) -> str:
    """Runs with equal keys have the same base model."""
    return f"base {_local(config.model.path)} in {config.model.precision}"


def _local(path: str | None) -> str | None:
    """A model folder by its full path (the worker runs elsewhere); a hub id stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


@contextlib.contextmanager
def _workplace(run: RunFolder) -> Iterator[Path]:
    """A folder in the run's private part for everything temporary: export, caches, results. The caller holds the lock.

    Leftovers of a killed benchmark are removed first.
    """
    for old in run.private.glob("benchmark-*"):
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
    try:
        folder = tempfile.TemporaryDirectory(prefix="benchmark-", dir=run.private, ignore_cleanup_errors=True)
    except OSError as error:
        raise atomic.failure(run.private, error) from error
    with folder as name:
        yield Path(name).resolve()


def save_answers(run: RunFolder, questions: Questions, outcome: TaskOutcome) -> None:
    """Write `private/answers.parquet`: every held-out question's cluster, kind, answer and correctness, in order."""
    if len(outcome.correct) != len(questions.texts):
        raise EnvironmentFailure(
            f"benchmark: lmms-eval answered {len(outcome.correct)} of {len(questions.texts)} questions"
        )
    frame = pd.DataFrame(
        {
            "cluster": questions.clusters,
            "kind": questions.kinds,
            "answer": outcome.answers,
            "correct": outcome.correct,
            "sample": questions.sha256,
        }
    )
    atomic.write_frame(run.private / ANSWERS, frame, mode=0o600)


# -- the document ----------------------------------------------------------------------------------------------------


def _document(
    own: Outcome,
    base: Outcome | None,
    specs: Sequence[TaskSpec],
    held: tuple[Dataset, Questions] | None,
    asked: Asked,
    batch_size: int,
    seconds: float,
) -> BenchmarkDocument:
    samples = {spec.name: own.tasks[spec.name].sha256 for spec in specs}
    if held is not None:
        samples[HELD_OUT] = held[1].sha256
    return BenchmarkDocument(
        tasks={spec.name: _metrics(own.tasks[spec.name]) for spec in specs},
        base={spec.name: _metrics(base.tasks[spec.name]) for spec in specs} if base is not None else None,
        majority={HELD_OUT: heldout.majority(*held)} if held is not None else {},
        gaps=tuple(
            gap for spec in specs for gap in _gaps(own.tasks[spec.name], base.tasks[spec.name] if base else None)
        ),
        about={spec.name: _about(spec, own, asked.limit, batch_size, held) for spec in specs},
        lmms_eval_version=own.lmms_eval_version,
        prompt=own.prompt,
        batch_size=batch_size,
        precision=own.precision,
        device=own.device,
        sample_sha256=samples,
        seconds=seconds,
    )


def _metrics(outcome: TaskOutcome) -> dict[str, Metric]:
    return {name: Metric.model_validate(metric) for name, metric in outcome.metrics.items()}


def _gaps(own: TaskOutcome, base: TaskOutcome | None) -> Iterator[Gap]:
    """The gaps of a run with the base model's difference between the same two groups beside each."""
    for raw in own.gaps:
        gap = Gap.model_validate(raw)
        pair: list[Any] = [None, None]
        if base is not None:
            names = (groups.key(gap.metric, gap.grouping, group) for group in (gap.best, gap.worst))
            pair = [base.metrics.get(name) for name in names]
        before = None if None in pair else pair[0]["value"] - pair[1]["value"]
        yield gap.model_copy(update={"base": before})


def _about(
    spec: TaskSpec, own: Outcome, limit: int | None, batch_size: int, held: tuple[Dataset, Questions] | None
) -> TaskAbout:
    outcome = own.tasks[spec.name]
    facts = held[0].facts if held is not None and spec.name == HELD_OUT else None
    # The embedded pictures are disjoint by construction; of other sets only what was looked at is said.
    embedded = held is not None and spec.name == HELD_OUT and held[0].source == "embedded"
    return TaskAbout(
        headline=outcome.headline,
        data=spec.data,
        scored_by=f"dpaudit, task {spec.task}" if spec.own else f"lmms-eval, task {spec.task}",
        prompt=outcome.prompt,
        max_new_tokens=outcome.max_new_tokens,
        batch_size=batch_size,
        precision=own.precision,
        device=own.device,
        lmms_eval_version=own.lmms_eval_version,
        questions=len(outcome.answers),
        pictures=outcome.pictures,
        limit=limit,
        held_out=facts.held_out if facts is not None else "yes" if embedded else None,
        missing=outcome.missing,
    )


def _with_earlier(run: RunFolder, made: BenchmarkDocument) -> BenchmarkDocument:
    """What was measured on other tasks before stays; what is measured again is replaced, its base included."""
    try:
        old = BenchmarkDocument.read(run.benchmark) if run.benchmark.is_file() else None
    except UsageError:
        old = None  # damaged, or of another version: it is written anew
    if old is None:
        return made
    kept = [name for name in old.tasks if name not in made.tasks]
    order = sorted([*kept, *made.tasks], key=lambda name: name != HELD_OUT)

    def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        both = {**{name: before[name] for name in kept if name in before}, **now}
        return {name: both[name] for name in order if name in both}

    return made.model_copy(
        update={
            "tasks": merged(old.tasks, made.tasks),
            "base": merged(old.base or {}, made.base or {}) or None,
            "majority": merged(old.majority, made.majority),
            "gaps": (*(gap for gap in old.gaps if gap.task in kept), *made.gaps),
            "about": merged(old.about, made.about),
            "sample_sha256": merged(old.sample_sha256, made.sample_sha256),
        }
    )
