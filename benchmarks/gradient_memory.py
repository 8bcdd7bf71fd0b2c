"""Memory and time of one clipped sum by each gradient path at LoRA rank 128, and where ghost norms pay.

    python benchmarks/gradient_memory.py --out benchmarks/results/gradient_memory.json      # about ten minutes

Shape: two decoder layers of width 2,048 (feed-forward 5,504), adapters of rank 128 on all seven matrices, 10 million
trained numbers, 64 visual tokens, float32, gradient checkpointing. Each cell is a process of its own on one thread:
peak of the resident set over one clipped sum of so many units in one physical batch, and CPU time of the next. What a
row adds is the difference between the two numbers of rows. Norms: CPU time of one layer's squared norms of 8 units by
pairs of tokens (float64) and directly (float32), and which of them the rule takes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from training_cost import Arm, Memory, Shape, build_model, machine, make_trainer, make_units

from dpaudit import atomic
from trainers import ghost

SHAPE = Shape(tower=(64, 2, 4), language=(2048, 5504, 2, 16), rank=128, units=2, device="cpu")
PATHS, ROWS = ("hooks", "micro-batch", "ghost"), (2, 8)
LAYERS = {"A of an attention matrix": (4096, 128), "B of a feed-forward matrix": (128, 11008)}
TOKENS = (20, 60, 120, 600)


def measure(path: str, rows: int) -> dict[str, float]:
    """One path and one number of rows in this process."""
    from dataclasses import replace

    torch.set_num_threads(1)
    shape = replace(SHAPE, units=rows)
    model, units = build_model(shape), make_units(shape)
    arm = Arm(path, path=path, reducer="visionzip", checkpointing=True)
    trainer = make_trainer(arm, shape, model, units)
    memory = Memory("cpu")
    trainer.clipped_sum(1, range(rows))
    peak = memory.peak()
    began = time.process_time()
    trainer.clipped_sum(2, range(rows))
    seconds = time.process_time() - began
    tokens, trained = trainer.inputs.longest, sum(value.numel() for value in trainer.parameters.values())
    return {"peak_mib": peak / 2**20, "seconds": seconds, "tokens": tokens, "trained": trained}


def norms() -> list[dict[str, Any]]:
    """Seconds of both ways to the norms of a layer, and the choice."""
    torch.set_num_threads(1)
    draw, found = torch.Generator().manual_seed(0), []
    rule = ghost.pairs_pay
    for name, (inputs, outputs) in LAYERS.items():
        for tokens in TOKENS:
            a, b = (torch.randn(8, tokens, width, generator=draw) for width in (inputs, outputs))
            seconds, values = {}, []
            for way, pays in (("pairs", True), ("direct", False)):
                ghost.pairs_pay = lambda *_, pays=pays: pays
                values.append(ghost.squared_norms(a, b))
                taken = []
                for _ in range(3):
                    began = time.process_time()
                    ghost.squared_norms(a, b)
                    taken.append(time.process_time() - began)
                seconds[way] = round(min(taken), 4)
            apart = float((values[0] / values[1] - 1).abs().max())
            chosen = "pairs" if rule(tokens, inputs, outputs) else "direct"
            found.append(
                {"layer": name, "tokens": tokens, "seconds": seconds, "taken": chosen, "apart": f"{apart:.1e}"}
            )
    ghost.pairs_pay = rule
    return found


def main() -> None:
    """All of it, or one cell for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell[0], int(options.cell[1]))))
        return
    found: dict[str, Any] = {"machine": machine(), "paths": {}}
    for path in PATHS:
        cells = {}
        for rows in ROWS:
            command = [sys.executable, __file__, "--cell", path, str(rows)]
            cells[rows] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            print(path, rows, cells[rows], file=sys.stderr, flush=True)
        few, many = (cells[rows] for rows in ROWS)
        found |= {name: int(many[name]) for name in ("tokens", "trained")}
        found["paths"][path] = {
            "peak MiB": {rows: round(cell["peak_mib"]) for rows, cell in cells.items()},
            "MiB that a row adds": round((many["peak_mib"] - few["peak_mib"]) / (ROWS[1] - ROWS[0]), 1),
            "CPU seconds a row": round(many["seconds"] / ROWS[1], 2),
        }
    found["norms of 8 units"] = norms()
    print(json.dumps(found, indent=1))
    if options.out is not None:
        atomic.write_text(options.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
