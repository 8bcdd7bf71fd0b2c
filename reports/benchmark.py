"""Utility of runs on their own held-out records, through lmms-eval in a process of its own."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpaudit import atomic
from dpaudit.config import RunConfig
from dpaudit.documents import BenchmarkDocument, Metric
from dpaudit.errors import EnvironmentFailure, UsageError, rejected
from dpaudit.runs import RunFolder
from reports.metrics import by_kind, cluster_metric, commonest, constant_answers
from reports.text import plural
from reports.worker import TASK
from trainers.records import Dataset

LOG = "benchmark.log"
ANSWERS = "answers.parquet"
PUBLIC_SAMPLE = 300  # pictures
PROCESSES = 2
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Questions:
    """The held-out questions in evaluation order. `clusters`: the privacy unit that each belongs to."""

    texts: tuple[str, ...]
    targets: tuple[str, ...]
    kinds: tuple[str, ...]
    clusters: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Settings:
    """How to evaluate. On a CPU several processes share the models: small matrices gain little from more threads."""

    batch_size: int
    device: str
    processes: int


@dataclass(frozen=True)
class Outcome:
    """What the worker wrote about one model; `correct` in the order of the questions."""

    correct: tuple[float, ...]
    answers: tuple[str, ...]
    prompt: str
    precision: str
    device: str
    lmms_eval_version: str
    seconds: float


def benchmark(
    run: RunFolder,
    *,
    base: bool = True,
    limit: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    progress: Progress = lambda text: None,
) -> BenchmarkDocument:
    """Measure one run (and its base model) and write `release/benchmark.json`."""
    return benchmark_many([run], base=base, limit=limit, batch_size=batch_size, device=device, progress=progress)[0]


def benchmark_many(
    runs: Sequence[RunFolder],
    *,
    base: bool = True,
    limit: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    processes: int = PROCESSES,
    progress: Progress = lambda text: None,
) -> list[BenchmarkDocument]:
    """Measure several runs and write each one's `release/benchmark.json`; documents in the order given.

    Runs on the same data share one export and, on a CPU, up to `processes` worker processes; a base model is measured
    once. `limit`: the first N held-out units. Every answer is kept in private/answers.parquet. Raises UsageError
    (unfinished run, bad value), EnvironmentFailure (no lmms-eval, a worker that died; its log is
    private/benchmark.log).
    """
    if limit is not None and limit < 2:
        raise rejected("--limit", limit, "a whole number of at least 2")
    if batch_size < 1:
        raise rejected("--batch-size", batch_size, "a whole number of at least 1")
    if importlib.util.find_spec("lmms_eval") is None:
        raise EnvironmentFailure("lmms-eval is not installed; mend it with: pip install --no-deps lmms-eval==0.7.3")
    from trainers.vlm import pick_device

    kind = pick_device(device).type  # a missing device is told at once, not after lmms-eval's slow start
    processes = min(processes, os.cpu_count() or 1) if kind == "cpu" else 1
    for run in runs:
        run.require_finished()
    configs = [run.read_config() for run in runs]
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(config.data.model_dump_json(), []).append(index)
    documents: dict[int, BenchmarkDocument] = {}
    for members in groups.values():
        own = [(runs[index], configs[index]) for index in members]
        settings = Settings(batch_size=batch_size, device=device, processes=processes)
        made = _group(own, base=base, limit=limit, settings=settings, progress=progress)
        documents.update(zip(members, made, strict=True))
    return [documents[index] for index in range(len(runs))]


def _group(
    runs: Sequence[tuple[RunFolder, RunConfig]],
    *,
    base: bool,
    limit: int | None,
    settings: Settings,
    progress: Progress,
) -> list[BenchmarkDocument]:
    """Runs that share a data set."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for run, _ in runs:
            stack.enter_context(run.lock())
        folder = stack.enter_context(_workplace(runs[0][0]))
        progress("preparing the held-out questions")
        dataset = _load(runs[0][1], folder)
        questions = export(dataset, folder / "test.parquet", limit=limit)
        models: dict[str, dict[str, Any]] = {}
        if base:
            for _, config in runs:
                models.setdefault(
                    _base_key(config),
                    {
                        "name": "base model",
                        "run": None,
                        "base": _local(config.model.path),
                        "precision": config.model.precision,
                    },
                )
        for run, _ in runs:
            models[str(run.path)] = {"name": run.path.name, "run": str(run.path.resolve()), "base": None}
        log = runs[0][0].private / LOG
        outcomes = _evaluate(models, questions, folder, log=log, settings=settings, progress=progress)
        majority = _majority(dataset, questions)
        documents = []
        for run, config in runs:
            document = _document(
                outcomes[str(run.path)],
                outcomes.get(_base_key(config)),
                questions,
                majority,
                batch_size=settings.batch_size,
                seconds=time.perf_counter() - began,
            )
            save_answers(run, questions, outcomes[str(run.path)])
            run.write(document)
            documents.append(document)
    return documents


def _base_key(config: RunConfig) -> str:
    """Runs with equal keys have the same base model."""
    return f"base {_local(config.model.path)} in {config.model.precision}"


def _local(path: str | None) -> str | None:
    """A model folder by its full path (the worker runs elsewhere); a hub id stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _load(config: RunConfig, folder: Path) -> Dataset:
    from trainers.data import load

    return load(config.data, cache=folder / "data")


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


def export(dataset: Dataset, path: Path, *, limit: int | None = None) -> Questions:
    """Write the test units (the first `limit`) as Parquet with a Hugging Face `Image` column; return what it holds."""
    units = dataset.test[:limit]
    rows: dict[str, list[Any]] = {name: [] for name in ("question_id", "question", "answer", "kind", "unit", "image")}
    digest = hashlib.sha256()
    for unit in units:
        for picture in unit.pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture.pixels).save(buffer, "PNG")  # lossless: the model sees the very pixels
            digest.update(repr(picture.pixels.shape).encode() + picture.pixels.tobytes())
            for question in picture.questions:
                digest.update(json.dumps([question.text, question.answer, question.kind]).encode())
                rows["question_id"].append(len(rows["question_id"]))
                rows["question"].append(question.text)
                rows["answer"].append(question.answer)
                rows["kind"].append(question.kind)
                rows["unit"].append(unit.id)
                rows["image"].append({"bytes": buffer.getvalue(), "path": None})
    if not rows["question"]:
        raise UsageError(f"data.test: {dataset.name} has no held-out questions to measure utility on")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"question_id": pa.int64(), "image": image}
    features = {"image": {"_type": "Image"}} | {
        name: {"dtype": "int64" if name == "question_id" else "string", "_type": "Value"}
        for name in rows
        if name != "image"
    }
    schema = pa.schema(
        [(name, types.get(name, pa.string())) for name in rows],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    pq.write_table(pa.table(rows, schema=schema), path)
    return Questions(
        tuple(rows["question"]), tuple(rows["answer"]), tuple(rows["kind"]), tuple(rows["unit"]), digest.hexdigest()
    )


def save_answers(run: RunFolder, questions: Questions, outcome: Outcome) -> None:
    """Write `private/answers.parquet`: every held-out question's cluster, kind, answer and correctness, in order."""
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


def worker_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: offline, every cache inside `folder` but the one with hub checkpoints."""
    home = Path(environment.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return {
        **environment,
        "HF_HUB_CACHE": environment.get("HF_HUB_CACHE", str(home / "hub")),
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"),
        "HF_MODULES_CACHE": str(folder / "hf" / "modules"),
        "LMMS_EVAL_HOME": str(folder / "lmms"),
        "LMMS_EVAL_DATASETS_CACHE": str(folder / "hf" / "datasets"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LMMS_EVAL_PLUGINS": "",
    }


def _evaluate(
    models: Mapping[str, dict[str, Any]],
    questions: Questions,
    folder: Path,
    *,
    log: Path,
    settings: Settings,
    progress: Progress,
) -> dict[str, Outcome]:
    """Run the workers on all models and read what they wrote."""
    entries = [{**entry, "out": str(folder / f"result-{index}.json")} for index, entry in enumerate(models.values())]
    processes = min(settings.processes, len(entries))
    shared = {"parquet": str(folder / "test.parquet"), "batch_size": settings.batch_size, "device": settings.device}
    places = []
    for index in range(processes):
        place = folder / f"worker-{index}"  # each has caches of its own: no locks, no races
        place.mkdir()
        (place / "spec.json").write_text(json.dumps({**shared, "models": entries[index::processes]}), encoding="utf-8")
        places.append(place)
    progress(f"starting lmms-eval for {plural(len(entries), 'model')}, {len(questions.texts):,} questions each")
    try:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(lambda place: _run_worker(place, log, processes, progress), places))
    finally:
        parts = [place / LOG for place in places]
        text = "".join(part.read_text(encoding="utf-8", errors="replace") for part in parts if part.exists())
        atomic.write_text(log, text)
    outcomes = {}
    for key, entry in zip(models, entries, strict=True):
        try:
            raw = json.loads(Path(entry["out"]).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise EnvironmentFailure(f"benchmark: lmms-eval left no result for {entry['name']}; see {log}") from error
        outcome = Outcome(**{**raw, "correct": tuple(raw["correct"]), "answers": tuple(raw["answers"])})
        if len(outcome.correct) != len(questions.texts):
            raise EnvironmentFailure(
                f"benchmark: lmms-eval answered {len(outcome.correct)} of {len(questions.texts)} questions; see {log}"
            )
        outcomes[key] = outcome
    return outcomes


def _run_worker(place: Path, log: Path, processes: int, progress: Progress) -> None:
    """Start a worker in `place`, pass on its progress, and turn its failure into one line (which names `log`)."""
    environment = worker_environment(place, os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    own = place / LOG
    with own.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "reports.worker", str(place / "spec.json")],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,  # nothing is sent: its end tells the worker that this process is gone
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):  # lmms-eval prints there as well
                    progress(f"measured {json.loads(line)['done']}")
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code == 0:
        return
    lines = [line.strip() for line in own.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    if code == UsageError.exit_code and last.startswith("dpaudit: "):
        raise UsageError(last.removeprefix("dpaudit: "))
    raise EnvironmentFailure(f"benchmark: the lmms-eval process failed: {last.removeprefix('dpaudit: ')} (see {log})")


def _majority(dataset: Dataset, questions: Questions) -> Metric:
    """What a constant answer per question kind reaches, without any picture.

    Embedded data: the commonest answers of *public synthetic* pictures with the same questions. Other sets: the
    commonest answers of the held-out questions themselves, the best constant there is; no training row is read.
    """
    if dataset.source == "embedded":
        from trainers.public.synthetic import synthetic_pictures

        pictures = synthetic_pictures("base", PUBLIC_SAMPLE, np.random.default_rng(0))
        pairs = [(question.kind, question.answer) for picture in pictures for question in picture.questions]
    else:
        pairs = list(zip(questions.kinds, questions.targets, strict=True))
    correct = constant_answers(questions.targets, questions.kinds, commonest(pairs))
    return cluster_metric(correct, questions.clusters)


def _document(
    outcome: Outcome,
    base: Outcome | None,
    questions: Questions,
    majority: Metric,
    *,
    batch_size: int,
    seconds: float,
) -> BenchmarkDocument:
    return BenchmarkDocument(
        tasks={TASK: by_kind(outcome.correct, questions.kinds, questions.clusters)},
        base={TASK: by_kind(base.correct, questions.kinds, questions.clusters)} if base is not None else None,
        majority={TASK: majority},
        lmms_eval_version=outcome.lmms_eval_version,
        prompt=outcome.prompt,
        batch_size=batch_size,
        precision=outcome.precision,
        device=outcome.device,
        sample_sha256={TASK: questions.sha256},
        seconds=seconds,
    )
