"""What an audit of a large model takes: trials, GPU hours, memory, money. Prints the tables of docs/sizing.md.

    python benchmarks/sizing.py                                   # LLaVA-1.5-7B's shape on one accelerator
    python benchmarks/sizing.py --peak 312e12 --efficiency 0.35 --price 1.5 --units 200000 --epochs 1

FLOPs come from a formula (below), which is first held against what torch counted on the compact model
(benchmarks/results/training_cost_compact-576.json); the extra time of clipping comes from that measurement too. Speed
and price of the accelerator are the reader's own figures: nothing here was measured on a GPU.

One unit is one picture with all its questions in one packed row of T tokens. With low-rank adapters the frozen weights
need a forward pass and the gradient with respect to activations, 2 + 2 FLOP per weight and token; attention needs
4 T^2 d forward and twice that backward. Weights of adapters are about 2 % of that and left out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from dpaudit import accounting
from trainers import ghost

RESULTS = Path(__file__).parent / "results"
MEASURED, STEP = RESULTS / "training_cost_compact-576.json", RESULTS / "step_cost.json"
TEXT_TOKENS = 60  # of a picture's questions, answers and template


@dataclass(frozen=True)
class Language:
    """A decoder: width, width of the feed-forward part, layers, vocabulary; low-rank adapters of rank `rank` on all."""

    width: int
    inner: int
    layers: int
    rank: int

    @property
    def per_layer(self) -> int:
        """Weights of a layer: four attention matrices, three of the feed-forward part."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def adapters(self) -> int:
        """Trained weights."""
        return self.layers * self.rank * (4 * 2 * self.width + 3 * (self.width + self.inner))

    def flop(self, tokens: int, *, backward: bool = True) -> float:
        """FLOP for one row of so many tokens."""
        linear, attention = 2 * self.per_layer * tokens, 4 * tokens**2 * self.width
        return self.layers * ((2 if backward else 1) * linear + (3 if backward else 1) * attention)


LLAVA_7B = Language(4096, 11008, 32, 128)
WEIGHTS_7B = 7.06e9  # with tower and embeddings


def check_formula() -> tuple[float, float, float]:
    """(GFLOP by the formula, GFLOP counted by torch, time of clipping relative to none) of the compact model."""
    found = json.loads(MEASURED.read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    width, inner, layers, _ = found["sizes"]["language"]
    compact = Language(width, inner, layers, found["sizes"]["rank"])
    plain, private = arms["non-private, full tokens"], arms["DP-SGD, full tokens"]
    tokens = 576 + TEXT_TOKENS
    factor = private["seconds_per_unit"] / plain["seconds_per_unit"]
    return compact.flop(tokens) / 1e9, plain["gflops_per_unit"], factor


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=50_000, help="pictures in the training set")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=512, help="expected Poisson batch")
    parser.add_argument("--epsilon", type=float, default=8)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the accelerator (H100 SXM, dense bf16)")
    parser.add_argument("--efficiency", type=float, default=0.35, help="share of the peak that a training reaches")
    parser.add_argument("--price", type=float, default=3.0, help="per hour of one accelerator, in your currency")
    given = parser.parse_args()
    ours, counted, factor = check_formula()
    print(f"formula against torch's count on the compact model: {ours:.1f} and {counted:.1f} GFLOP a unit\n")
    steps = round(given.epochs * given.units / given.batch)
    rate = given.batch / given.units
    sigma = accounting.noise_multiplier_for(epsilon=given.epsilon, delta=1e-5, sample_rate=rate, steps=steps)
    print(f"claim: eps = {given.epsilon:g} at 1e-5, q = {rate:.4g}, T = {steps}, sigma = {sigma:.3f}\n")
    print("| | full tokens (576) | Dual-Priv (64) |\n|---|---|---|")
    rows: list[tuple[str, float, bool]] = [
        ("one training, the product itself", 1.0, True),
        ("white-box twin: one more training", 1.0, True),
        (f"black box: {given.canaries} canaries scored on two models", 2 * given.canaries / given.units, False),
        ("16 reference models for membership inference", 16.0, True),
        ("multi-run audit, 50 runs", 50.0, True),
    ]
    speed = given.peak * given.efficiency
    for label, count, trains in rows:
        cells = []
        for visual in (576, 64):
            flop = LLAVA_7B.flop(visual + TEXT_TOKENS, backward=trains) * (factor if trains else 1.0)
            units = given.units * (given.epochs if trains else 1.0) * count
            hours = flop * units / speed / 3600
            cells.append(f"{hours:.2g} h, {hours * given.price:.2g}")
        print(f"| {label} | {' | '.join(cells)} |")
    adapters = LLAVA_7B.adapters
    print("\nnoise on CPU threads, drawn while the accelerator works:")
    for how, rate in json.loads(STEP.read_text())["million numbers a second"].items():
        print(f"{how}: {adapters / 1e6 / rate:.0f} s a step, {adapters / 1e6 / rate * steps / 3600:.1f} h in all")
    print(f"\ntrained weights: {adapters / 1e6:.0f} M (rank {LLAVA_7B.rank})")
    gib = 2**30
    print("| memory | GiB |\n|---|---|")
    for label, value in (
        ("base model, bfloat16", 2 * WEIGHTS_7B),
        ("adapters, AdamW state and gradient sum, float32", 4 * 4 * adapters),
        ("per-unit gradients, Opacus hooks, each unit of a physical batch", 4 * adapters),
        ("per-unit gradients, micro-batch loop, in all", 4 * adapters),
        ("per-unit gradients, ghost norms: one layer's norms at a time", ghost.AT_ONCE),
        ("orthogonal canary directions, any number (9 bytes a weight, 8 while a step is projected)", 17 * adapters),
        (f"{given.canaries} random canary directions", 4 * adapters * given.canaries),
        (f"{given.canaries} Dirac canaries", 8 * given.canaries),
    ):
        print(f"| {label} | {value / gib:.2g} |")


if __name__ == "__main__":
    main()
