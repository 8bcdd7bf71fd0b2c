"""Lines of glue beside an unchanged training loop in each example, and the seconds from there to a verdict.

    python benchmarks/glue_lines.py                                   # count the lines; seconds
    python benchmarks/glue_lines.py --run [--only NAME …] [--seed 1]   # and run `check` and `audit-trainer --white-box`

With --run each example is tried as it is, with half of the noise (BUG=half-noise) and, for Opacus, in ghost mode. Times
are those of the command on the clock and on the processor (one thread), so that a busy machine shows.
Writes benchmarks/results/glue_lines.csv.
"""

import argparse
import ast
import csv
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES, RESULTS = ROOT / "examples", ROOT / "benchmarks" / "results" / "glue_lines.csv"
GOALS = {"opacus_digits": 10, "sft_lora": 12, "by_hand": 10, "jax_digits": 12}
SECONDS = 60
SEEN = ("verdict   ", "audited:factory: ", "validity  not applicable: white-box", "dpaudit: ")
FIELDS = ["example", "variant", "glue lines", "at most", "command", "exit code", "seconds", "processor seconds", "said"]
Row = dict[str, object]


def glue(example: str) -> int:
    """Lines of statements in audited.py: no comments, no blank lines."""
    tree = ast.parse((EXAMPLES / example / "audited.py").read_text(encoding="utf-8"))
    return len({line for node in tree.body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)})


def text_model_glue() -> int:
    """Lines of the finished text model's script that name dpaudit in code: a finished model needs none."""
    tree = ast.parse((EXAMPLES / "finished_model" / "finetune_text.py").read_text(encoding="utf-8"))
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return sum("dpaudit" in name for name in names)


def run(example: str, variant: str, seed: int) -> list[Row]:
    """`check` and the white-box game of one variant."""
    changes = {"half-noise": {"BUG": "half-noise"}, "ghost": {"MODE": "ghost"}}.get(variant, {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        game = ["audit-trainer", "audited:factory", "--white-box", "--seed", str(seed), "--out", f"{folder}/audit"]
        for words in (["check", "audited:factory"], game):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(
                [str(Path(sys.executable).parent / "dpaudit"), *words, "--time-limit", "200"],
                cwd=EXAMPLES / example,
                env=environment,
                capture_output=True,
                text=True,
            )
            spent, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(SEEN)]
            said = " | ".join(" ".join(line.split())[:200] for line in lines[:2])
            counted = {"example": example, "variant": variant, "glue lines": glue(example), "at most": GOALS[example]}
            measured = {"seconds": round(spent, 1), "processor seconds": round(used, 1), "said": said}
            rows.append({**counted, "command": words[0], "exit code": done.returncode, **measured})
            print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for example, most in GOALS.items():
        print(f"{example}: {glue(example)} lines of glue (at most {most})")
    print(f"finished text model: {text_model_glue()} lines of glue (at most 0)")
    if not given.run:
        return
    rows: list[Row] = []
    if RESULTS.exists():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            rows = [dict(row) for row in csv.DictReader(file) if row["example"] not in given.only]
    for example in given.only:
        if example == "jax_digits" and importlib.util.find_spec("jax") is None:
            print("jax_digits: jax is not installed here; not run")
            continue
        for variant in ("correct", "half-noise", *(["ghost"] if example == "opacus_digits" else [])):
            rows += run(example, variant, given.seed)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
