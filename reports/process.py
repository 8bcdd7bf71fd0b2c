"""Worker processes for lmms-eval: their environment, their progress, and their failures as one line."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpaudit import atomic
from dpaudit.errors import EnvironmentFailure, UsageError
from reports.catalogue import TaskSpec
from reports.text import plural

LOG = "benchmark.log"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to evaluate. On a CPU several processes share the models: small matrices gain little from more threads."""

    batch_size: int
    device: str
    processes: int
    online: bool = False


@dataclass(frozen=True)
class TaskOutcome:
    """What the worker wrote about one task and model. correct: headline result a question, where it is a mean."""

    metrics: Mapping[str, Any]
    gaps: Sequence[Mapping[str, Any]]
    headline: str
    answers: tuple[str, ...]
    correct: tuple[float, ...]
    sha256: str
    prompt: str
    max_new_tokens: int
    pictures: int
    missing: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the worker wrote about one model."""

    tasks: Mapping[str, TaskOutcome]
    prompt: str
    precision: str
    device: str
    lmms_eval_version: str
    seconds: float


def worker_environment(folder: Path, environment: Mapping[str, str], *, online: bool = False) -> dict[str, str]:
    """The worker's environment: offline, every cache inside `folder` but the one with hub checkpoints.

    online: data sets may be fetched, into the user's own caches, where the next call finds them.
    """
    home = Path(environment.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    sets = environment.get("HF_DATASETS_CACHE", str(home / "datasets")) if online else str(folder / "hf" / "datasets")
    token = {"HF_TOKEN_PATH": environment.get("HF_TOKEN_PATH", str(home / "token"))}
    return {
        **{name: value for name, value in environment.items() if name not in OFFLINE},
        "HF_HUB_CACHE": environment.get("HF_HUB_CACHE", str(home / "hub")),
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": sets,
        "HF_MODULES_CACHE": str(folder / "hf" / "modules"),
        "LMMS_EVAL_HOME": str(folder / "lmms"),
        "LMMS_EVAL_DATASETS_CACHE": sets,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LMMS_EVAL_PLUGINS": "",
        **(token if online else dict.fromkeys(OFFLINE, "1")),
    }


def evaluate(
    models: Mapping[str, dict[str, Any]],
    tasks: Sequence[TaskSpec],
    folder: Path,
    *,
    log: Path,
    settings: Settings,
    progress: Progress,
) -> dict[str, Outcome]:
    """Run the workers on all models and read what they wrote."""
    entries = [{**entry, "out": str(folder / f"result-{index}.json")} for index, entry in enumerate(models.values())]
    processes = min(settings.processes, len(entries))
    shared = {
        "tasks": [asdict(task) for task in tasks],
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
    places = []
    for index in range(processes):
        place = folder / f"worker-{index}"  # each has caches of its own: no locks, no races
        place.mkdir()
        (place / "spec.json").write_text(json.dumps({**shared, "models": entries[index::processes]}), encoding="utf-8")
        places.append(place)
    names = tasks[0].name if len(tasks) == 1 else plural(len(tasks), "task")
    progress(f"starting lmms-eval for {plural(len(entries), 'model')}: {names}")
    try:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(lambda place: _run_worker(place, log, processes, settings.online, progress), places))
    finally:
        parts = [place / LOG for place in places]
        text = "".join(part.read_text(encoding="utf-8", errors="replace") for part in parts if part.exists())
        atomic.write_text(log, text)
    return {key: _outcome(entry, log) for key, entry in zip(models, entries, strict=True)}


def _outcome(entry: Mapping[str, Any], log: Path) -> Outcome:
    try:
        raw = json.loads(Path(entry["out"]).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise EnvironmentFailure(f"benchmark: lmms-eval left no result for {entry['name']}; see {log}") from error
    tasks = {
        name: TaskOutcome(**{**task, "answers": tuple(task["answers"]), "correct": tuple(task["correct"])})
        for name, task in raw.pop("tasks").items()
    }
    return Outcome(tasks=tasks, **raw)


def _run_worker(place: Path, log: Path, processes: int, online: bool, progress: Progress) -> None:
    """Start a worker in `place`, pass on its progress, and turn its failure into one line (which names `log`)."""
    environment = worker_environment(place, os.environ, online=online)
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
    if code == EnvironmentFailure.exit_code and last.startswith("dpaudit: "):
        raise EnvironmentFailure(f"{last.removeprefix('dpaudit: ')} (see {log})")
    raise EnvironmentFailure(f"benchmark: the lmms-eval process failed: {last} (see {log})")
