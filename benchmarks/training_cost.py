"""What one training step costs: time, peak memory and FLOPs of every method, gradient path and reducer, in one run.

    python benchmarks/training_cost.py                    # compact-width LLaVA, 576 visual tokens, one CPU thread
    python benchmarks/training_cost.py --shape llava-7b   # LLaVA-1.5-7B's shape, random weights, bfloat16; needs CUDA
    python benchmarks/training_cost.py --table            # prints the Markdown tables of docs/cost.md

Each arm runs in a process of its own on the same random weights, pictures and questions; arms differ in what their row
says and in nothing else. Time is the process's CPU time on one thread (so that other work on the machine does not
count), or wall time between synchronisations on CUDA: the fastest of the repeats, over two rounds of all arms. Memory
is the peak above the loaded
model: of the resident set (Linux), or torch's own count on CUDA. FLOPs are those of matrix products, convolutions and
attention, reducer included, as torch's counter sees them. Ratios within one run travel between machines; times don't.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dpaudit import atomic
from dpaudit.config import resolve
from dpaudit.randomness import Key
from trainers.inputs import UnitInputs
from trainers.plan import make_plan
from trainers.records import Dataset, Picture, Question, Unit
from trainers.step import Trainer

ROUNDS = 2
RESULTS = Path(__file__).parent / "results"
QUESTIONS = (
    Question("what digit is this?", "seven", "digit"),
    Question("is the digit even or odd?", "odd", "parity"),
    Question("is the digit greater than 4?", "yes", "compare"),
)


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    method: str = "dp-sgd"
    path: str = "hooks"
    cached: bool = True  # tokens of the frozen tower kept from an earlier step
    reducer: str = "none"
    fusion_noise: str = "none"
    blocks: float = 1.0
    by: str = "magnitude"
    checkpointing: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA: `keep` + `fuse` tokens (CLS counted in `keep` + 1) of 576 are left after reduction."""

    tower: tuple[int, int, int]  # width, layers, heads
    language: tuple[int, int, int, int]  # width, feed-forward width, layers, heads
    rank: int
    units: int
    device: str
    precision: str = "float32"
    image: int = 336
    patch: int = 14
    vocabulary: int | None = None
    keep: int = 53
    fuse: int = 10


# The compact one keeps LLaVA-1.5's proportion of tower to language model at its token count.
SHAPES = {
    "compact-576": Shape(tower=(96, 3, 4), language=(256, 688, 6, 4), rank=16, units=8, device="cpu"),
    "llava-7b": Shape(
        tower=(1024, 24, 16),
        language=(4096, 11008, 32, 32),
        rank=128,
        units=8,
        device="cuda",
        precision="bfloat16",
        vocabulary=32064,
    ),
}

PIECES = {"reducer": "visionzip", "fusion_noise": "mean", "blocks": 0.8}
ARMS = [
    Arm("non-private, full tokens", method="non-private", path="auto"),
    Arm("non-private, full tokens, tower each step", method="non-private", path="auto", cached=False),
    Arm("DP-SGD, full tokens"),
    Arm("DP-SGD, full tokens, tower each step", cached=False),
    Arm("DP-SGD, full tokens, micro-batch", path="micro-batch"),
    Arm("DP-SGD, full tokens, micro-batch, tower each step", path="micro-batch", cached=False),
    Arm("DP-SGD, full tokens, checkpointing", checkpointing=True),
    Arm("DP-SGD, block pruning 0.8", blocks=0.8),
    Arm("DP-SGD, half the blocks by earlier norms", blocks=0.5, by="previous"),
    Arm("DP-SGD, random tokens", reducer="random"),
    Arm("DP-SGD, cls-topk", reducer="cls-topk"),
    Arm("DP-SGD, visionzip", reducer="visionzip"),
    Arm("DP-SGD, visionzip, tower each step", reducer="visionzip", cached=False),
    Arm("DP-SGD, tome, tower each step", reducer="tome", cached=False),
    Arm("DP-SGD, divprune, tower each step", reducer="divprune", cached=False),
    Arm("DP-ZO, full tokens", method="dp-zo", path="auto"),
    Arm("Dual-Priv", method="dual-priv", **PIECES),  # type: ignore[arg-type]
    Arm("Dual-Priv, tower each step", method="dual-priv", cached=False, **PIECES),  # type: ignore[arg-type]
    Arm("Dual-Priv, micro-batch", method="dual-priv", path="micro-batch", **PIECES),  # type: ignore[arg-type]
    Arm("Dual-Priv, micro-batch, tower each step", method="dual-priv", path="micro-batch", cached=False, **PIECES),  # type: ignore[arg-type]
]


def build_model(shape: Shape) -> Any:
    """Random weights in LLaVA's architecture with the reference tokenizer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from trainers.public.model import TEMPLATE
    from trainers.tokenizer import BOS, EOS, IMAGE, PAD, build_tokenizer
    from trainers.vlm import VisionLanguageModel

    tokenizer = build_tokenizer()
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in (PAD, BOS, EOS, IMAGE)}
    width, layers, heads = shape.tower
    vision = CLIPVisionConfig(
        image_size=shape.image,
        patch_size=shape.patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    width, inner, layers, heads = shape.language
    text = LlamaConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.dpaudit_template = TEMPLATE
    torch.manual_seed(0)
    device = torch.device(shape.device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.precision))
    try:
        with device:
            hf: Any = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return VisionLanguageModel(hf, tokenizer, device=device, source="random")


def make_units(shape: Shape) -> tuple[Unit, ...]:
    """Noise pictures with three questions each."""
    rng = np.random.default_rng(0)
    size = (shape.image, shape.image, 3)
    return tuple(
        Unit(str(index), (Picture(str(index), rng.integers(0, 256, size, dtype=np.uint8), QUESTIONS),))
        for index in range(shape.units)
    )


def make_trainer(arm: Arm, shape: Shape, model: Any, units: tuple[Unit, ...]) -> Trainer:
    """The arm's trainer; the claim's sigma is fixed, since only cost matters here."""
    privacy = {} if arm.method == "non-private" else {"epsilon": None, "noise-multiplier": 1.0, "delta": 1e-2}
    training: dict[str, Any] = {"batch-size": shape.units, "steps": 50, "gradient-path": arm.path}
    if arm.checkpointing:
        training["gradient-checkpointing"] = "auto"
    if shape.precision != "float32":
        settings: dict[str, Any] = {"precision": shape.precision}
    else:
        settings = {}
    config = resolve(
        {
            "method": arm.method,
            "model": {"lora": {"rank": shape.rank}, "device": shape.device, **settings},
            "reducer": {
                "name": arm.reducer,
                "noise": arm.fusion_noise,
                "keep": shape.keep,
                "fuse": shape.fuse,
            },
            "pruning": {"keep": arm.blocks, "by": arm.by},
            "privacy": privacy,
            "training": {**training, "rows-at-once": shape.units},
        }
    )
    dataset = Dataset(name="noise", train=units, test=units[:1], unit="image")
    plan = make_plan(config, dataset, 0)
    return Trainer.build(config, plan, Key.from_seed(0), model, list(units))


def resident(field: str) -> int:
    """A memory figure of this process in bytes: VmRSS now, VmHWM peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Memory:
    """Peak bytes above the level at creation."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.base = resident("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.base


def flop_counter() -> FlopCounterMode:
    """torch's counter, which leaves out the CPU's own attention kernel, with it."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    aten = torch.ops.aten
    extra = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=extra)


def timed(step: Callable[[int], None], device: str, repeats: int) -> float:
    """Fastest of the repeats in seconds, CPU time, or wall time on CUDA: disturbance only adds."""
    seconds = []
    for index in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(index + 3)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        else:
            began = time.process_time()
            step(index + 3)
            seconds.append(time.process_time() - began)
    return min(seconds)


def measure(arm: Arm, shape: Shape, repeats: int) -> dict[str, Any]:
    """One arm, in this process."""
    torch.set_num_threads(1)
    model, units = build_model(shape), make_units(shape)
    trainer = make_trainer(arm, shape, model, units)
    everyone = list(range(len(units)))

    def step(index: int) -> None:
        if not arm.cached:
            trainer.inputs = UnitInputs(model, units)
        total = trainer.clipped_sum(index, everyone)
        trainer.update(index, trainer.noisy_mean(index, total))

    memory = Memory(shape.device)  # the first step: nothing is left over from an earlier one that it could reuse
    step(1)
    peak = memory.peak()
    with flop_counter() as counter:
        step(2)
    return {
        "seconds_per_unit": timed(step, shape.device, repeats) / len(units),
        "peak_mib": peak / 2**20,
        "gflops_per_unit": counter.get_total_flops() / 1e9 / len(units),
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {"cpu": cpu, "gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def run_all(name: str, repeats: int, only: str | None) -> None:
    """Every arm in a process of its own, one after the other; a failing arm is recorded with its last line."""
    rows: dict[str, dict[str, Any]] = {}
    chosen = [arm for arm in ARMS if only is None or only in arm.name]
    for arm in chosen * ROUNDS:
        command = [
            sys.executable,
            __file__,
            "--shape",
            name,
            "--repeats",
            str(repeats),
            "--arm",
            json.dumps(asdict(arm)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            row: dict[str, Any] = {"error": done.stderr.strip().splitlines()[-1][:300]}
        else:
            row = json.loads(done.stdout)
        old = rows.get(arm.name, row)
        if "error" not in row and "error" not in old:
            row["seconds_per_unit"] = min(row["seconds_per_unit"], old["seconds_per_unit"])
        rows[arm.name] = {**asdict(arm), **row}
        print(arm.name, row, file=sys.stderr, flush=True)
    if only is None:
        document = {
            "shape": name,
            "sizes": asdict(SHAPES[name]),
            "repeats": repeats,
            "machine": machine(),
            "arms": list(rows.values()),
        }
        path = RESULTS / f"training_cost_{name}.json"
        atomic.write_text(path, json.dumps(document, indent=2) + "\n")


def table(name: str) -> str:
    """Markdown: each arm beside non-private and DP-SGD on full tokens, in the same cache state."""
    document = json.loads((RESULTS / f"training_cost_{name}.json").read_text())
    rows = {row["name"]: row for row in document["arms"] if "error" not in row}
    out = [
        "| arm | ms per unit | peak MiB above the model | GFLOP per unit | time / non-private | time / DP-SGD "
        "| memory / DP-SGD |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        suffix = "" if row["cached"] else ", tower each step"
        plain, private = rows[f"non-private, full tokens{suffix}"], rows[f"DP-SGD, full tokens{suffix}"]
        seconds, peak = row["seconds_per_unit"], row["peak_mib"]
        out.append(
            f"| {row['name']} | {1000 * seconds:.1f} | {peak:.0f} | {row['gflops_per_unit']:.2f} | "
            f"{seconds / plain['seconds_per_unit']:.2f} | {seconds / private['seconds_per_unit']:.2f} | "
            f"{peak / private['peak_mib']:.2f} |"
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="compact-576")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arm", help="internal: measure one arm in this process")
    parser.add_argument("--only", help="arms whose name contains this; prints, writes nothing")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.shape))
    elif arguments.arm:
        print(json.dumps(measure(Arm(**json.loads(arguments.arm)), SHAPES[arguments.shape], arguments.repeats)))
    else:
        run_all(arguments.shape, arguments.repeats, arguments.only)


if __name__ == "__main__":
    main()
