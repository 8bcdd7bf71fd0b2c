"""The process in which lmms-eval runs: `python -m reports.worker SPEC.json`.

lmms-eval reseeds random, numpy and torch, patches other libraries and writes caches, so it never shares a process with
noise generators. It also returns success on failure from its command line; here its Python API is called and what it
returns is checked. Standard output carries one JSON line per finished model; results go to the files named in the spec.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpaudit import printable
from dpaudit.errors import DpauditError, EnvironmentFailure, UsageError, rejected
from reports import catalogue, evaluate
from reports.catalogue import TaskSpec

TASK = catalogue.HELD_OUT


def work(spec: dict[str, Any]) -> None:
    """Evaluate every model of the spec on every task.

    spec: {"tasks": [fields of TaskSpec], "batch_size": int, "device": str, "models": [{"name", "run": path or null,
    "base": path or null, "out": path}]}. Each `out` receives {"prompt", "precision", "device", "lmms_eval_version",
    "seconds", "tasks": {NAME: {"metrics", "gaps", "headline", "answers", "correct", "sha256", "prompt",
    "max_new_tokens", "pictures"}}}, per-question lists in the order of the questions.
    """
    import torch

    from reports.lmms import DpauditModel

    manager, tasks = _tasks([TaskSpec(**task) for task in spec["tasks"]])
    for entry in spec["models"]:
        began = time.perf_counter()
        model = _load(entry, spec["device"])
        wrapped = DpauditModel(model=model, batch_size=spec["batch_size"])
        with torch.inference_mode():
            measured = {task.name: _measure(task, made, manager, wrapped) for task, made in tasks}
        outcome = {
            "tasks": measured,
            "prompt": model.prompter.template,
            "precision": model.precision,
            "device": str(model.device),
            "lmms_eval_version": version("lmms-eval"),  # its own result file says "unknown@unknown"
            "seconds": time.perf_counter() - began,
        }
        Path(entry["out"]).write_text(json.dumps(outcome), encoding="utf-8")
        sys.stdout.write(json.dumps({"done": entry["name"]}) + "\n")
        sys.stdout.flush()


def _load(entry: dict[str, Any], device: str) -> Any:
    from dpaudit.runs import RunFolder
    from trainers.run import load_model
    from trainers.vlm import VisionLanguageModel

    if entry["run"] is not None:
        return load_model(RunFolder.open(Path(entry["run"])), device)
    return VisionLanguageModel.load(entry["base"], device=device, precision=entry["precision"])


# -- tasks -----------------------------------------------------------------------------------------------------------


def _tasks(specs: list[TaskSpec]) -> tuple[Any, list[tuple[TaskSpec, Any]]]:
    """lmms-eval's index and task objects, made once for all models: making one reads its data."""
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.tasks import TaskManager
    from tenacity import stop_after_attempt

    for method in (ConfigurableTask.download, ConfigurableTask.process_results):
        method.retry.stop = stop_after_attempt(1)  # five tries hide an error for eight seconds and then its cause
    folders = sorted({spec.folder for spec in specs if spec.folder is not None})
    every = any(spec.folder is None for spec in specs)
    manager = TaskManager("ERROR", include_path=folders, include_defaults=every, model_name="dpaudit")
    return manager, [(spec, _task(spec, manager)) for spec in specs]


def _task(spec: TaskSpec, manager: Any) -> Any:
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import load_yaml_config
    from tenacity import RetryError

    known = manager.task_index.get(spec.task, {})
    if known.get("type") != "task":
        kind = f"a {known['type'].replace('_', ' ')}: name its members" if known else repr(spec.task)
        raise rejected("--tasks", kind if known else spec.task, catalogue.accepted())
    config = load_yaml_config(yaml_path=known["yaml_path"], mode="full")
    config |= _override(spec, config)
    if config.get("output_type", "generate_until") != "generate_until":
        raise rejected(f"task {spec.name}, output_type", config["output_type"], "generate_until")
    # Submissions are files for a challenge's server, not numbers.
    config["metric_list"] = [m for m in config.get("metric_list", []) if "submission" not in str(m["metric"])]
    if not config["metric_list"]:
        raise UsageError(f"task {spec.name}: has no metric that is computed here (its answers go to a server)")
    try:
        return ConfigurableTask(config={**config, "task": spec.name}, model_name="dpaudit")
    except RetryError as error:
        cause = error.last_attempt.exception()
        why = f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}"
    if spec.data.startswith("hub"):
        raise EnvironmentFailure(
            f"task {spec.name}: its data can't be fetched from the {spec.data} ({why}); "
            f"without a network, give a local copy with --data {spec.name}=PATH"
        )
    raise UsageError(f"--data {spec.name}: lmms-eval can't read this copy ({why})")


def _override(spec: TaskSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    override = dict(spec.override)
    kwargs = dict(override.get("dataset_kwargs", config.get("dataset_kwargs") or {}))
    files = kwargs.get("data_files", {})
    if "*" in files:  # a task outside the catalogue: its own split's name
        kwargs["data_files"] = {config.get("test_split") or config.get("validation_split"): files["*"]}
    if kwargs.get("token") and not _signed_in():
        del kwargs["token"]  # the sets are public; asking for a token that nobody has is an error
    if spec.image_column_of is not None:
        kwargs["features"] = _with_picture(spec.image_column_of)
    return {**override, "dataset_kwargs": kwargs}


def _signed_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _with_picture(file: str) -> Any:
    import datasets
    import pyarrow.parquet as pq

    features = datasets.Features.from_arrow_schema(pq.read_schema(file))
    features["image"] = datasets.Image()
    return features


# -- numbers ---------------------------------------------------------------------------------------------------------


def _measure(spec: TaskSpec, task: Any, manager: Any, model: Any) -> dict[str, Any]:
    from lmms_eval import evaluator
    from lmms_eval.api.registry import get_aggregation
    from loguru import logger

    model.pictures.clear()
    model.missing.clear()
    raw = evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        batch_size=model.batch_size,
        limit=spec.limit,
        bootstrap_iters=0,
        log_samples=True,
        process_docs_parallel=1,
        datetime_str="",
    )
    logger.disable("lmms_eval")  # SLAKE's code logs a table each time it is called; it is called 1,000 times
    mean = get_aggregation("mean")
    aggregates = {name: evaluate.Aggregate(function, function is mean) for name, function in task.aggregation().items()}
    pictures = {doc: digest for (name, doc), digest in model.pictures.items() if name == spec.name}
    results = evaluate.read(spec.name, raw, list(aggregates), pictures)
    metrics, gaps, headline = evaluate.measure(results, aggregates, (raw or {})["results"][spec.name])
    logger.enable("lmms_eval")
    first = results.values[headline]
    return {
        "metrics": {name: metric.model_dump() for name, metric in metrics.items()},
        "gaps": [gap.model_dump() for gap in gaps],
        "headline": headline,
        "answers": results.answers,
        "correct": [float(value) for value in first] if aggregates[headline].mean else [],
        "sha256": results.sha256,
        "prompt": _prompt(task, model),
        "max_new_tokens": model.new_tokens(task.config.generation_kwargs or {}),
        "pictures": len(set(pictures.values())),
        "missing": sum(name == spec.name for name, _ in model.missing),
    }


def _prompt(task: Any, model: Any) -> str:
    words = task.lmms_eval_specific_kwargs or {}
    question = f"{words.get('pre_prompt', '')}{{question}}{words.get('post_prompt', '')}"
    return str(model.model.prompter.template.replace("{question}", question))


def _end_with_parent() -> None:
    """A parent that was killed closes the pipe; nobody waits for the result then."""
    sys.stdin.buffer.read()
    os._exit(EnvironmentFailure.exit_code)


def main() -> int:
    """Run one spec; an expected failure is one line on standard error, with its exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except DpauditError as error:
        sys.stderr.write(f"dpaudit: {printable.field(str(error), printable.MOST)}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk. Tearing down torch and lmms-eval takes seconds, and was seen to crash.
    os._exit(code)
