"""What do 16 reference models cost, against 16 separate `dpaudit train` calls?

    python benchmarks/membership_references.py --units 300 --steps 60 --trials 16

Both sides train the same number of models on half of the units each, with the q, T, sigma and batch size of all of
them. Separate: one `dpaudit train` after the other, as a user would run them, with torch's own choice of threads.
Study: `train_references`, one process a core. Wall time depends on what else the machine does, so CPU time is given as
well, and the load average at the start. The first trial is also trained by `start_run` with the trial's key and
members: largest difference of a loss, over all candidates. Rows appear in benchmarks/results/membership_references.json
as they are done; a finished side is not measured again.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from attacks.membership.members import member_twin
from attacks.membership.records import study_records
from attacks.membership.references import folder_of, load_study, train_references, trial_of
from attacks.options import MEMBER_TWIN
from attacks.scores import losses
from attacks.training import open_run
from dpaudit.config import resolve
from dpaudit.runs import RunFolder
from trainers.plan import Inserted
from trainers.run import load_model, train

RESULTS = Path(__file__).parent / "results" / "membership_references.json"
BATCH = {"dp-sgd": 64, "non-private": 32}
DPAUDIT = Path(sys.executable).parent / "dpaudit"


def settings(method: str, units: int, steps: int) -> list[str]:
    """The configuration of every training here."""
    return [f"method={method}", "seed=1", "model.device=cpu", f"data.limit={units}", f"training.steps={steps}",
            f"training.batch-size={BATCH[method]}"]  # fmt: skip


def cpu() -> float:
    """CPU seconds of this process and of its ended children."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def separate(method: str, units: int, steps: int, trials: int, folder: Path) -> dict[str, float]:
    """`trials` calls of `dpaudit train`, each on half of the units with the declared size of all."""
    half = settings(method, units // 2, steps)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    began, used = time.perf_counter(), cpu()
    for index in range(trials):
        words = [*half, f"data.public-size={units}", f"seed={index}", "--out", str(folder / f"alone-{index}")]
        subprocess.run([str(DPAUDIT), "train", *words], check=True, capture_output=True, env=environment)
    return {"wall": time.perf_counter() - began, "cpu": cpu() - used}


def study(twin: RunFolder, trials: int) -> dict[str, float]:
    """The same number of models by the study."""
    began, used = time.perf_counter(), cpu()
    train_references(twin, trials, log=lambda line: print(line, file=sys.stderr, flush=True))
    return {"wall": time.perf_counter() - began, "cpu": cpu() - used}


def difference(twin: RunFolder, trials: int, folder: Path) -> dict[str, float]:
    """Trial 0 against the trainer's own run with the same key and members."""
    records = study_records(twin)
    trial, _ = trial_of(records, 0)
    config = records.config
    with open_run(config, folder / "same") as (run, _key, dataset, model):
        members = replace(dataset, train=tuple(records.units[unit] for unit in trial.units))
        train(config, run, key=trial.key, dataset=members, model=model, inserted=Inserted())
    alone = losses(load_model(run, "cpu"), records.candidate_units())
    ours = load_study(twin, trials).losses[0]
    correlation = float(np.corrcoef(alone, ours)[0, 1])
    return {"largest_difference_of_a_loss": float(np.abs(alone - ours).max()), "correlation": correlation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["dp-sgd", "non-private"])
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    for method in options.methods:
        row = {"method": method, "units": options.units, "steps": options.steps, "trials": options.trials}
        if any(row.items() <= old.items() for old in rows):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = resolve({}, settings(method, options.units, options.steps))
            twin = member_twin(config, folder / MEMBER_TWIN)
            result = row | {"cores": os.cpu_count(), "load_before": [round(value, 1) for value in os.getloadavg()]}
            result["study"] = study(twin, options.trials)
            result["separate"] = separate(method, options.units, options.steps, options.trials, folder)
            result |= difference(twin, options.trials, folder)
            shutil.rmtree(folder_of(twin), ignore_errors=True)
        for measure in ("wall", "cpu"):
            result[f"{measure}_ratio"] = round(result["separate"][measure] / result["study"][measure], 2)
        rows.append(result)
        print(json.dumps(result), flush=True)
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
