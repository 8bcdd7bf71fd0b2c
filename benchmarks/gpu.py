"""One command for a CUDA machine: the tests that need it, and what a step costs at LLaVA-1.5-7B's shape.

    make gpu                                      # python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny               # the same on a CPU, with a tiny shape

Prints one JSON. Tests: `pytest -m gpu` (gradient paths and reducers on the device, bfloat16, noise, resume). Shape:
random weights in bfloat16, LoRA of rank 128, 576 visual tokens (64 after reduction), 64 units a logical batch. Each arm
runs in a process of its own, so that a peak of memory is its own: seconds of noise (drawn when needed, not ahead), of
forward and backward with clipping, and of the update, each the fastest of the repeats; memory as torch counts it, over
one step, with the model and without it. An arm that runs out of memory or time says so. The relative memory of
Dual-Priv stands beside the figures that its paper states (arXiv 2506.07077: 14.34 % less than DP-SGD, 1.74 % more than
zeroth order).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training_cost import SHAPES, Arm, Memory, Shape, build_model, machine, make_trainer, make_units

from dpaudit import atomic

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
TESTS = "tests/gpu"
CLAIMED = {"Dual-Priv": -0.1434, "Dual-Priv against DP-ZO": 0.0174}  # memory, as the paper states it
PIECES: dict[str, Any] = {"method": "dual-priv", "reducer": "visionzip", "fusion_noise": "mean", "blocks": 0.8}
# (arm, units of a physical batch): hooks keep a gradient of the whole adapter for each unit of it, ghost norms none.
ARMS: tuple[tuple[Arm, int], ...] = (
    (Arm("non-private", method="non-private", path="auto"), 4),
    (Arm("DP-SGD, hooks"), 4),
    (Arm("DP-SGD, micro-batch", path="micro-batch"), 1),
    (Arm("DP-SGD, ghost", path="ghost"), 8),
    (Arm("DP-ZO", method="dp-zo", path="auto"), 4),
    (Arm("Dual-Priv, hooks", **PIECES), 4),
    (Arm("Dual-Priv, micro-batch", path="micro-batch", **PIECES), 1),
    (Arm("Dual-Priv, ghost", path="ghost", **PIECES), 32),
)
TINY = Shape(
    tower=(32, 3, 4), language=(32, 64, 2, 4), rank=4, units=4, device="cpu", image=56, patch=14, keep=4, fuse=2
)


def chosen_shape(tiny: bool) -> Shape:
    """LLaVA-1.5-7B's, or one that a CPU steps through in a moment."""
    return TINY if tiny else replace(SHAPES["llava-7b"], units=64)


def fastest(work: Callable[[int], object], device: str, repeats: int) -> float:
    """Seconds of wall time, the fastest of the repeats, between synchronisations."""
    taken = []
    for index in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work(index)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measure(arm: Arm, physical: int, shape: Shape, repeats: int) -> dict[str, Any]:
    """One arm in this process."""
    model, units = build_model(shape), make_units(shape)
    parameters = sum(value.numel() for value in model.hf.parameters())
    trainer = make_trainer(arm, replace(shape, units=physical), model, units)
    everyone = list(range(len(units)))
    memory = Memory(shape.device)
    total = trainer.clipped_sum(1, everyone)
    trainer.update(1, trainer.noisy_mean(1, total))
    peak = memory.peak()
    found = {
        "parameters": parameters,
        "trained": sum(value.numel() for value in trainer.parameters.values()),
        "units": len(units),
        "physical": physical,
        "seconds": {
            "forward, backward, clipping": fastest(
                lambda index: trainer.clipped_sum(index + 2, everyone), shape.device, repeats
            ),
            "noise and mean": fastest(lambda index: trainer.noisy_mean(index + 2, total), shape.device, repeats),
        },
        "peak_mib_above_the_model": peak / 2**20,
    }
    noisy = trainer.noisy_mean(2, total)
    found["seconds"]["pruning and update"] = fastest(
        lambda index: trainer.update(index + 2, noisy), shape.device, repeats
    )
    if shape.device == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def run_arm(arm: Arm, physical: int, *, tiny: bool, repeats: int, seconds: float) -> dict[str, Any]:
    """One arm in a process of its own; its last line where it fails."""
    command = [sys.executable, __file__, "--arm", arm.name, "--repeats", str(repeats), *(["--tiny"] if tiny else [])]
    if seconds < 20:
        return {"not measured": "no time left"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"not measured": f"took longer than the {seconds:.0f} s that were left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"not measured": lines[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """Counts of the tests that are marked `gpu`, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", TESTS, "-m", "gpu", "-q", f"--junitxml={report}"]
        environment = {**os.environ, "DPAUDIT_TEST_DEVICE": device}
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=sys.stderr, timeout=max(1.0, seconds)
            )
        except subprocess.TimeoutExpired:
            return {"not measured": f"took longer than {seconds:.0f} s"}
        if not report.is_file():
            return {"not measured": "pytest ended without a report"}
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
    skipped = sum("skipped" in {child.tag for child in case} for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def relative_memory(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Peak memory of Dual-Priv over that of DP-SGD and DP-ZO, minus 1, with the model and without it."""
    out: dict[str, Any] = {"stated by the paper": CLAIMED}
    pairs = (
        ("Dual-Priv, hooks", "DP-SGD, hooks"),
        ("Dual-Priv, micro-batch", "DP-SGD, micro-batch"),
        ("Dual-Priv, micro-batch", "DP-ZO"),
    )
    for one, two in pairs:
        for name in ("peak_mib", "peak_mib_above_the_model"):
            mine, other = arms.get(one, {}).get(name), arms.get(two, {}).get(name)
            if mine and other:
                out.setdefault(f"{one} against {two}", {})[name] = round(mine / other - 1, 4)
    return out


def main(words: Sequence[str] | None = None) -> None:
    """All of it, or one arm for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; what does not fit is left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help="internal: measure one arm in this process")
    options = parser.parse_args(words)
    shape = chosen_shape(options.tiny)
    if options.arm:
        arm, physical = next(pair for pair in ARMS if pair[0].name == options.arm)
        print(json.dumps(measure(arm, physical, shape, options.repeats)))
        return
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: no CUDA device; --tiny plays it on a CPU")
    ends = time.monotonic() + 60 * options.minutes
    tests = run_tests(shape.device, ends - time.monotonic())
    arms = {}
    for arm, physical in ARMS:
        left = ends - time.monotonic()
        arms[arm.name] = run_arm(arm, physical, tiny=options.tiny, repeats=options.repeats, seconds=left)
        print(arm.name, arms[arm.name], file=sys.stderr, flush=True)
    document = {
        "machine": machine(),
        "shape": {**shape.__dict__},
        "tests": tests,
        "arms": arms,
        "relative memory": relative_memory(arms),
    }
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if options.out is not None:
        atomic.write_text(options.out, text)
    if tests.get("failed") or "not measured" in tests:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
