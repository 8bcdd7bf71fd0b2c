"""What a step costs beside forward and backward: drawing noise, and the memory of a large logical batch.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json      # about two minutes, nothing beside it

Noise: standard normals for an adapter of 16 matrices of a million numbers, by one thread and by two, and secure ones;
the fastest of five. Ahead: a step that multiplies matrices on one thread for as long as the noise takes, with the
noise drawn after it and drawn ahead. Memory: growth of the process over one clipped sum of B units, one unit a physical
batch, at LoRA rank 256; each B in a process of its own.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dpaudit import atomic
from dpaudit.config import resolve
from dpaudit.randomness import Key
from trainers.adapters.vlm import synthetic_units
from trainers.noise import Noise
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

BATCHES = (8, 32, 128)
LIKE = {f"layer-{index}": torch.zeros(1000, 1000) for index in range(16)}
SHAPES = {name: tuple(value.shape) for name, value in LIKE.items()}
NUMBERS = sum(value.numel() for value in LIKE.values())


def fastest(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def speed(threads: int, secure: bool) -> float:
    """Million numbers a second."""
    source = Noise(Key.from_seed(0), secure=secure, threads=threads)
    seconds = fastest(lambda: source.of(LIKE, step=1, std=1.0))
    source.close()
    return NUMBERS / seconds / 1e6


def ahead() -> dict[str, float]:
    """Seconds of a step whose computation takes one thread about as long as the noise."""
    torch.set_num_threads(1)
    source, matrix = Noise(Key.from_seed(0), threads=1), torch.randn(1000, 1000)
    noise = fastest(lambda: source.of(LIKE, step=1, std=1.0))
    once = fastest(lambda: matrix @ matrix)
    repeats = max(1, round(noise / once))

    def compute() -> None:
        for _ in range(repeats):
            matrix @ matrix

    def after() -> None:
        compute()
        source.of(LIKE, step=1, std=1.0)

    def before() -> None:
        source.draw_ahead(SHAPES, step=1, std=1.0)
        compute()
        source.of(LIKE, step=1, std=1.0)

    found = {"noise": noise, "computation": fastest(compute), "one after the other": fastest(after)}
    found["drawn ahead"] = fastest(before)
    source.close()
    return {name: round(value, 3) for name, value in found.items()}


def growth(batch: int) -> float:
    """MiB that the process grows over one clipped sum of `batch` units."""
    settings = ["model.device=cpu", "model.lora.rank=256", "training.rows-at-once=1", "training.steps=2"]
    config = resolve({"method": "dp-sgd"}, [*settings, f"training.batch-size={batch}"])
    units = synthetic_units(max(BATCHES), seed=1)
    plan = make_plan(config, Dataset("synthetic", "image", units, units[:1]), 0)
    model = VisionLanguageModel.load(config.model.path, device="cpu", precision="float32")
    trainer = Trainer.build(config, plan, Key.from_seed(0), model, units)
    trainer.clipped_sum(1, range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.clipped_sum(2, range(batch))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """All of it, or one batch size for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--growth", type=int, help="measure one batch size in this process")
    options = parser.parse_args()
    if options.growth is not None:
        print(growth(options.growth))
        return
    found: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, 2 cores", "numbers": NUMBERS}
    found["million numbers a second"] = {
        f"{threads} threads{', secure' if secure else ''}": round(speed(threads, secure), 1)
        for secure in (False, True)
        for threads in (1, 2)
    }
    found["seconds of a step"] = ahead()
    found["MiB that one clipped sum adds"] = {
        batch: round(float(subprocess.check_output([sys.executable, __file__, "--growth", str(batch)], text=True)), 1)
        for batch in BATCHES
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        atomic.write_text(options.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
