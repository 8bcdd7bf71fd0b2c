"""How long short commands take, now and with the sources of `BEFORE`: the fastest of five, wall and CPU seconds.

    python benchmarks/commands.py --out benchmarks/results/commands.json [--model FOLDER]

FOLDER: a checkpoint of a real size, for `train --dry-run` on it (benchmarks/real_language_model.py builds one of 135 M
parameters). The two take turns on the same machine, so that ratios within a run mean something.
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

HERE = Path(__file__).resolve().parents[1]
BEFORE = "78e6767"
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


def timed(words: list[str], folder: Path, tree: Path) -> dict[str, float] | None:
    """Wall and CPU seconds of one call with the sources in `tree`; None where it can't be called so."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call = [sys.executable, "-P", *words]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return None if done.returncode else {"wall": round(wall, 2), "cpu": round(cpu, 2)}


def fastest(words: list[str], folder: Path, trees: dict[str, Path], repeats: int) -> dict[str, dict[str, float] | None]:
    """The fastest of the repeats by sources, taking turns; one that takes long is asked twice."""
    found: dict[str, dict[str, float] | None] = {}
    for turn in range(repeats):
        for label, tree in trees.items():
            kept = found.get(label)
            if turn and (kept is None or (kept["wall"] > 20 and turn > 1)):
                continue
            new = timed(words, folder, tree)
            found[label] = min(
                (item for item in (kept, new) if item is not None), key=lambda item: item["wall"], default=None
            )
    return found


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, old = Path(name), Path(name) / "before"
        old.mkdir()
        archive = subprocess.run(["git", "archive", BEFORE], cwd=HERE, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive, check=True)
        module, file = ["-m", "dpaudit"], ["--delta", "1e-5", "--coins", "independent"]
        bound = ["steinke", "--canaries", "1000", "--guesses", "100", "--correct", "90", "--delta", "1e-5"]
        claim = ["--claim-sigma", "0.9", "--claim-rate", "0.01", "--claim-steps", "500"]
        commands = {
            "import dpaudit": ["-c", "import dpaudit"],
            "dpaudit --help": [*module, "--help"],
            "dpaudit bound steinke": [*module, "bound", *bound],
            "dpaudit scores, 1,000 rows": [*module, "scores", scores(folder, 1000), *file],
            "dpaudit scores, 100,000 rows": [*module, "scores", scores(folder, 100_000), *file],
            "dpaudit plan": [*module, "plan", *claim],
            "dpaudit train --dry-run": [*module, "train", "--dry-run"],
        }
        if options.model is not None:
            words = ["--model", str(options.model.resolve()), "training.batch-size=64"]
            commands["dpaudit train --dry-run --model FOLDER"] = [*module, "train", "--dry-run", *words]
        rows = {}
        for what, words in commands.items():
            rows[what] = fastest(words, folder, {"before": old, "now": HERE}, REPEATS)
            print(what, rows[what], flush=True)
    if options.out is not None:
        document = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "before": BEFORE, "rows": rows}
        atomic.write_text(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
