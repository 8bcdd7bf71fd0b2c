"""How cost grows: time and memory against canaries, steps, units, reference models and pages of runs.

    python benchmarks/growth.py --out benchmarks/results/growth.json      # ten minutes on one core
    python benchmarks/growth.py --table                                   # the table of docs/cost.md

Every cell runs in a process of its own: CPU seconds of the work (with its children), and the peak of the resident set
above what libraries and model take. Called again, it measures again and keeps the faster time of each cell. The
exponent of a series is log(t2 / t1) / log(n2 / n1) of its two largest sizes, where what does not depend on the size
weighs least.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "growth.json"
Work = Callable[[], object]


def cpu() -> float:
    """CPU seconds of this process and of its ended children."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def one_run(size: int, folder: Path) -> Work:
    """All bounds of a file of scores, with the coins' bounds and the claim's test."""
    import pandas as pd

    import dpaudit

    def work(count: int = size) -> object:
        rng = np.random.default_rng(1)
        member = rng.random(count) < 0.5
        frame = pd.DataFrame({"id": [str(i) for i in range(count)], "member": member})
        frame["score"] = rng.standard_normal(count) + 0.5 * member
        scores = dpaudit.Scores(frame, coins="independent", separate=True)
        return scores.bounds(delta=1e-5), scores.test(sigma=1.0, rate=0.05, steps=200)

    work(100)
    return work


def evidence(canaries: int, steps: int) -> Work:
    """The exact likelihood of a white-box game: channel, posteriors and the evidence of the coins."""
    from dpaudit.evidence.channel import Channel, simulate
    from dpaudit.evidence.coins import Posteriors
    from dpaudit.evidence.game import SPARE, Rule
    from dpaudit.evidence.noise import NoiseLevel

    channel = Channel(1.0, 0.05, steps)
    seen, coins = simulate(channel, canaries, np.random.default_rng(1))

    def work() -> object:
        rule = Rule(np.arange(canaries) % 2 == 1, SPARE)
        count = SPARE * steps
        return rule.log_e(Posteriors.of(seen, channel), coins, NoiseLevel(float(count), count))

    return work


def white_box_canaries(size: int, folder: Path) -> Work:
    """100 steps."""
    return evidence(size, 100)


def white_box_steps(size: int, folder: Path) -> Work:
    """1,000 canaries."""
    return evidence(1000, size)


def accountant(size: int, folder: Path) -> Work:
    """eps of DP-SGD with q = 0.01, at a sigma for which eps stays of order one."""
    from dpaudit import accounting

    accounting.epsilon(accounting.DpSgd(1.0, 0.01, 10), 1e-5)
    event = accounting.DpSgd(max(0.6, 0.01 * math.sqrt(size)), 0.01, size)
    return lambda: accounting.epsilon(event, 1e-5)


def training(units: int, steps: int, folder: Path) -> Work:
    """dp-sgd of the reference model on synthetic pictures, expected batch 64."""
    from attacks.training import start_run
    from dpaudit.config import resolve
    from trainers.public.synthetic import synthetic_vqa
    from trainers.vlm import VisionLanguageModel

    dataset = synthetic_vqa("shifted", units, seed=1)
    VisionLanguageModel.load(None, device="cpu")
    words = ["seed=1", "model.device=cpu", "training.batch-size=64", f"training.steps={steps}", "privacy.delta=1e-6"]
    return lambda: start_run(resolve({}, words), folder / "run", dataset=dataset)


def training_units(size: int, folder: Path) -> Work:
    """10 steps: what a unit costs that is not trained on."""
    return training(size, 10, folder)


def training_steps(size: int, folder: Path) -> Work:
    """500 units."""
    return training(500, size, folder)


def references(size: int, folder: Path) -> Work:
    """Reference models of dp-sgd, 120 units and 20 steps each, with their losses."""
    from attacks.membership.members import member_twin
    from attacks.membership.references import train_references
    from attacks.options import MEMBER_TWIN
    from dpaudit.config import resolve

    words = [
        "method=dp-sgd",
        "seed=1",
        "model.device=cpu",
        "data.limit=120",
        "training.steps=20",
        "training.batch-size=32",
    ]
    twin = member_twin(resolve({}, words), folder / MEMBER_TWIN)
    return lambda: train_references(twin, size, log=lambda line: None)


def pages(size: int, folder: Path) -> Work:
    """A report of audited and benchmarked runs."""
    from reports.html import render
    from reports.subjects import load_page
    from tests.reports.fixtures import canary_game, token_game, white_box_game, write_audit, write_run

    runs = [write_run(folder, "dual-priv", name=f"run-{index}") for index in range(size)]
    for run in runs:
        write_audit(run, "dual-priv", [canary_game("dual-priv"), token_game(), white_box_game()])
    render(load_page(runs[:1]), title="T")
    return lambda: render(load_page(runs), title="T")


SERIES: dict[str, tuple[Callable[[int, Path], Work], tuple[int, ...], str]] = {
    "bounds of one file of scores": (one_run, (1000, 10_000, 30_000, 100_000), "canaries"),
    "white-box evidence, 100 steps": (white_box_canaries, (300, 1000, 3000, 10_000), "canaries"),
    "white-box evidence, 1,000 canaries": (white_box_steps, (30, 100, 300, 1000), "steps"),
    "accountant, q = 0.01": (accountant, (100, 1000, 10_000, 100_000, 1_000_000), "steps"),
    "training, 10 steps": (training_units, (500, 1000, 2000, 4000), "units"),
    "training, 500 units": (training_steps, (10, 20, 40, 80), "steps"),
    "reference models": (references, (2, 4, 8, 16), "models"),
    "report": (pages, (1, 3, 6, 12), "runs"),
}


def child(name: str, size: int) -> dict[str, float]:
    """One cell, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        work = SERIES[name][0](size, Path(folder))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, began = resident("VmRSS"), cpu()
        work()
        return {"size": size, "seconds": round(cpu() - began, 3), "mib": round((resident("VmHWM") - before) / 2**20, 1)}


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def exponent(rows: list[dict[str, float]], what: str) -> float | None:
    """Of the two largest sizes; None where the smaller one is too small to be measured."""
    one, two = rows[-2:]
    if one[what] <= 0.01 or two[what] <= 0.01:
        return None
    return round(math.log(two[what] / one[what]) / math.log(two["size"] / one["size"]), 2)


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | against | sizes | CPU seconds | exponent | MiB | exponent |", "|---|---|---|---|---|---|---|"]
    for name, series in document["series"].items():
        rows = series["rows"]
        cells = [", ".join(f"{row[key]:,g}" for row in rows) for key in ("size", "seconds", "mib")]
        powers = ["–" if series[key] is None else f"{series[key]:.2f}" for key in ("time_exponent", "memory_exponent")]
        lines.append(
            f"| {name} | {series['against']} | {cells[0]} | {cells[1]} | {powers[0]} | {cells[2]} | {powers[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """All cells that are missing in the results, one process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(SERIES))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]))))
        return
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"series": {}}
    if options.table:
        print(table(document))
        return
    document["machine"] = f"{platform.machine()}, one thread a process"
    for name in options.only:
        _, sizes, against = SERIES[name]
        old = {row["size"]: row for row in document["series"].get(name, {"rows": []})["rows"]}
        rows = []
        for size in sizes:
            command = [sys.executable, str(HERE), "--child", name, str(size)]
            environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}, {size}: {done.stderr[-2000:]}")
            new = json.loads(done.stdout.splitlines()[-1])
            rows.append(min((row for row in (old.get(size), new) if row), key=lambda row: row["seconds"]))
            print(name, rows[-1], flush=True)
        powers = {"time_exponent": exponent(rows, "seconds"), "memory_exponent": exponent(rows, "mib")}
        document["series"][name] = {"against": against, "rows": rows, **powers}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
