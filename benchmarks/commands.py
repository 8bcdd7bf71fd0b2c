"""How long short commands take: from Enter to the prompt, the fastest of five, wall and CPU seconds.

    python benchmarks/commands.py --out benchmarks/results/commands.json [--model FOLDER]

FOLDER: a checkpoint of a real size, for `train --dry-run` on it (benchmarks/real_language_model.py builds one of 135 M
parameters). Times are those of this machine; the goals are docs/cost.md's.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dpaudit import atomic

DPAUDIT = Path(sys.executable).parent / "dpaudit"
REPEATS = 5


def scores(folder: Path, count: int) -> str:
    """A file of scores."""
    rng = np.random.default_rng(1)
    member = rng.random(count) < 0.5
    values = rng.standard_normal(count) + member
    lines = [f"{index},{int(one)},{value:.6f}" for index, (one, value) in enumerate(zip(member, values, strict=True))]
    path = folder / f"scores-{count}.csv"
    path.write_text("id,member,score\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def timed(words: list[str], folder: Path, repeats: int = REPEATS) -> dict[str, float]:
    """Wall and CPU seconds of the fastest call."""
    found = []
    for _ in range(repeats):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{words}: {done.stderr[-500:]}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append({"wall": round(wall, 2), "cpu": round(cpu, 2)})
    return min(found, key=lambda item: item["wall"])


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = ["--delta", "1e-5", "--coins", "independent"]
        commands = {
            "import dpaudit": [sys.executable, "-c", "import dpaudit"],
            "dpaudit --help": [str(DPAUDIT), "--help"],
            "dpaudit bound steinke": [str(DPAUDIT), "bound", "steinke", "--canaries", "1000", "--guesses", "100",
                                      "--correct", "90", "--delta", "1e-5"],
            "dpaudit scores, 1,000 rows": [str(DPAUDIT), "scores", scores(folder, 1000), *file],
            "dpaudit scores, 100,000 rows": [str(DPAUDIT), "scores", scores(folder, 100_000), *file],
            "dpaudit plan": [str(DPAUDIT), "plan", "--claim-sigma", "0.9", "--claim-rate", "0.01", "--claim-steps",
                             "500"],
            "dpaudit train --dry-run": [str(DPAUDIT), "train", "--dry-run"],
        }  # fmt: skip
        rows = {}
        for what, words in commands.items():
            rows[what] = timed(words, folder)
            print(what, rows[what], flush=True)
        if options.model is not None:
            words = [
                str(DPAUDIT),
                "train",
                "--dry-run",
                "--model",
                str(options.model.resolve()),
                "training.batch-size=64",
            ]
            rows[f"dpaudit train --dry-run --model {options.model.name}"] = timed(words, folder, 2)
            print(rows)
    if options.out is not None:
        document = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}
        atomic.write_text(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
