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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpaudit.errors import DpauditError, EnvironmentFailure

TASK = "dpaudit_vqa"
TASKS = Path(__file__).parent / "tasks"


def work(spec: dict[str, Any]) -> None:
    """Evaluate every model of the spec on the exported questions.

    spec: {"parquet": path, "batch_size": int, "device": str, "models": [{"name", "run": path or null, "base": path or
    null, "out": path}]}. Each `out` receives {"correct": [...], "answers": [...], "prompt", "precision", "device",
    "lmms_eval_version", "seconds"}, in the order of the questions.
    """
    import torch
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from reports.lmms import DpauditModel

    manager = TaskManager("WARNING", include_path=str(TASKS), include_defaults=False)
    for entry in spec["models"]:
        began = time.perf_counter()
        model = _load(entry, spec["device"])
        with torch.inference_mode():
            results = evaluator.simple_evaluate(
                model=DpauditModel(model=model, batch_size=spec["batch_size"]),
                # A new one each time: lmms-eval takes the override apart while it reads it.
                tasks=[{"task": TASK, "dataset_kwargs": {"data_files": {"test": spec["parquet"]}}}],
                task_manager=manager,
                batch_size=spec["batch_size"],
                bootstrap_iters=0,
                log_samples=True,
                process_docs_parallel=1,
                datetime_str="",
            )
        outcome = {
            **_per_question(results),
            "prompt": model.prompter.template,
            "precision": str(next(model.core.parameters()).dtype).removeprefix("torch."),
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


def _per_question(results: dict[str, Any] | None) -> dict[str, Any]:
    """Correctness and answer of each question, in order, checked against lmms-eval's own aggregate."""
    if results is None or TASK not in results.get("samples", {}):
        raise EnvironmentFailure(f"lmms-eval returned no samples of task {TASK}")
    samples = sorted(results["samples"][TASK], key=lambda sample: int(sample["doc_id"]))
    if [int(sample["doc_id"]) for sample in samples] != list(range(len(samples))):
        raise EnvironmentFailure(f"lmms-eval left out questions of task {TASK}")
    correct = [float(sample["exact_match"]) for sample in samples]
    mean = float(results["results"][TASK]["exact_match,none"])
    if abs(mean - sum(correct) / len(correct)) > 1e-9:
        raise EnvironmentFailure(f"lmms-eval's mean {mean} is not the mean of its samples")
    return {"correct": correct, "answers": [_text(sample["filtered_resps"]) for sample in samples]}


def _text(responses: Any) -> str:
    while isinstance(responses, list | tuple):
        responses = responses[0] if responses else ""
    return str(responses)


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
        sys.stderr.write(f"dpaudit: {' '.join(str(error).split())}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk. Tearing down torch and lmms-eval takes seconds, and was seen to crash.
    os._exit(code)
