"""How much of a unit's step is matrix products, and how fast they could be alone.

    python benchmarks/matmul_share.py --out benchmarks/results/matmul_share.json      # two minutes on one core

A unit's step (forward, backward, clipping, accumulation) on the compact LLaVA of training_cost.py at 576 and at 63
visual tokens, and on the reference model: by the micro-batch path, and by the path "rows", all units at a time. Every
matrix product that the step makes is recorded with its shapes and layout, and then each of them is timed by itself on
fresh operands. The share is the GFLOP/s of the step over those of plain products of the same shapes. Beside it the
operators that take the most time, as torch.profiler sees them. CPU time of one thread, the fastest of the repeats.
"""

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training_cost import SHAPES, Arm, build_model, flop_counter, make_trainer, make_units

from dpaudit import atomic
from trainers.vlm import VisionLanguageModel

PRODUCTS = {"aten.mm.default": torch.mm, "aten.bmm.default": torch.bmm, "aten.addmm.default": torch.addmm}
REPEATS = 7
Signature = tuple[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]  # operator; (size, stride) of each operand


class Products(TorchDispatchMode):
    """Counts the matrix products that are made, by operator and layout of the operands."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[Signature] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in PRODUCTS:
            operands = tuple(
                (tuple(item.shape), tuple(item.stride())) for item in args if isinstance(item, torch.Tensor)
            )
            self.made[(str(func), operands)] += 1
        return func(*args, **(kwargs or {}))


def fastest(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """CPU seconds of the fastest call."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def alone(signature: Signature) -> float:
    """CPU seconds of one product of these shapes and strides on operands of its own."""
    name, operands = signature

    def operand(size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        room = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        return torch.randn(room).as_strided(size, stride)

    made = [operand(*item) for item in operands]
    times = max(1, int(2e7 / max(1, _work(signature))))  # clocks are too coarse for the small ones
    product = PRODUCTS[name]

    def many() -> None:
        for _ in range(times):
            product(*made)

    return fastest(many) / times


def _work(signature: Signature) -> float:
    """Multiplications of a product."""
    name, operands = signature
    first, second = operands[-2][0], operands[-1][0]
    batch = first[0] if name == "aten.bmm.default" else 1
    return float(batch * first[-2] * first[-1] * second[-1])


def measure(kind: str, path: str) -> dict[str, Any]:
    """One model by one gradient path."""
    shape = SHAPES["compact-576"]
    units = make_units(shape)
    if kind == "reference":
        from trainers.public.synthetic import synthetic_vqa

        model: Any = VisionLanguageModel.load(None, device="cpu")
        units = tuple(synthetic_vqa("shifted", 8, seed=1).train[: shape.units])
        arm = Arm(kind, path=path, reducer="visionzip")
    else:
        model = build_model(shape)
        arm = Arm(kind, path=path, reducer="visionzip" if kind == "63 tokens" else "none")
    trainer = make_trainer(arm, shape, model, units)
    everyone = list(range(len(units)))

    def step() -> None:
        trainer.clipped_sum(1, everyone)

    step()
    with flop_counter() as counter:
        step()
    with Products() as products:
        step()
    seconds, in_products = fastest(step), sum(count * alone(item) for item, count in products.made.items())
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    flops = counter.get_total_flops()
    counted = 2 * sum(count * _work(item) for item, count in products.made.items())
    return {
        "model": kind,
        "path": path,
        "units": len(units),
        "ms_per_unit": round(1000 * seconds / len(units), 2),
        "gflop_per_unit": round(flops / 1e9 / len(units), 3),
        "gflop_of_recorded_products": round(counted / 1e9 / len(units), 3),
        "gflops_of_the_step": round(flops / 1e9 / seconds, 1),
        "gflops_of_the_products_alone": round(counted / 1e9 / in_products, 1),
        "share": round((flops / seconds) / (counted / in_products), 3),
        "products": sum(products.made.values()),
        "operators": {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:10]},
    }


def main() -> None:
    """All three, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in ("576 tokens", "63 tokens", "reference"):
        for path in ("micro-batch", "rows"):
            rows.append(measure(kind, path))
            print(json.dumps(rows[-1], indent=1), flush=True)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    if options.out is not None:
        document = {"machine": cpu, "torch": torch.__version__, "threads": 1, "rows": rows}
        atomic.write_text(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
