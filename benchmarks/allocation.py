"""Random allocation against Poisson sampling and shuffling: what it costs, what it learns, and whether its games alarm.

    python benchmarks/allocation.py noise games              # about 5 minutes
    python benchmarks/allocation.py accuracy --seeds 3       # six trainings on digits, about 15 minutes on a quiet core
    python benchmarks/allocation.py real --seeds 10          # white-box audits of real trainings

noise: the noise multiplier that eps takes, by scheme, with PLD_accounting's bounds on the eps of the allocated one.
games: SEEDS white-box games of a correct claim, simulated at full count, and games of a claim with 10 % too much sigma.
real: whole white-box audits of correct trainings on digits, a seed each. Parts that were not asked for are kept.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from utility_gain import correct, load

from attacks.games.twins import play_white_box
from attacks.training import start_run
from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.accounting.reference import reference_range
from dpaudit.config import resolve
from dpaudit.documents import ClaimDocument
from dpaudit.evidence.channel import Channel, simulate
from dpaudit.evidence.coins import Posteriors
from dpaudit.evidence.game import SPARE, Rule
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.verdict import refutes
from trainers.progress import Live
from trainers.run import load_model
from trainers.vlm import VisionLanguageModel

OUT = Path(__file__).parent / "results" / "allocation.json"
DELTA, ALPHA = 1e-5, 0.001
TARGETS = ((8.0, 0.1, 200), (2.0, 0.1, 200), (8.0, 0.02, 1000), (8.0, 0.25, 40), (1.0, 0.01, 3000))  # eps, q, T
CHANNELS = ((1.07, 0.1, 200, 10), (0.7, 0.2, 60, 5), (1.0, 0.2, 100, 10), (0.6, 0.02, 150, 50))  # sigma, q, T, t
CANARIES = 1000


def noise() -> list[dict[str, Any]]:
    """sigma by scheme, and the reference's bounds on eps at allocation's sigma."""
    rows = []
    for epsilon, rate, steps in TARGETS:
        row: dict[str, Any] = {"epsilon": epsilon, "q": rate, "T": steps}
        for scheme in ("poisson", "shuffle", "allocation"):
            began = time.monotonic()
            words = {"epsilon": epsilon, "delta": DELTA, "sample_rate": rate, "steps": steps}
            row[scheme] = accounting.noise_multiplier_for(**words, sampling=scheme)  # type: ignore[arg-type]
            row[f"{scheme} seconds"] = round(time.monotonic() - began, 2)
        event = DpSgd(row["allocation"], rate, steps, sampling="allocation")
        found = accounting.epsilon(event, DELTA)
        row |= {"epsilon of allocation": found, "PLD_accounting": reference_range(event, DELTA, found)}
        rows.append(row)
        print(row, flush=True)
    return rows


def games(seeds: int, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Refutations of a correct claim, of one whose true noise is 0.9 times the claimed, and the largest evidence."""
    rule = Rule(np.arange(CANARIES) % 2 == 1, SPARE)
    rows: list[dict[str, Any]] = [dict(zip(("sigma", "q", "T", "t"), setting, strict=True)) for setting in CHANNELS]
    for scale, count in ((1.0, seeds), (0.9, seeds // 5), (1.3, seeds // 5)):
        for number, row in enumerate(rows):
            channel, logs = Channel(*CHANNELS[number]), []
            for seed in range(count):
                rng = np.random.default_rng([number, round(1000 * scale), seed])
                seen, coins = simulate(channel, CANARIES, rng, scale=scale)
                spare = SPARE * channel.steps
                level = NoiseLevel(float(scale**2 * rng.chisquare(spare)), spare)
                logs.append(rule.log_e(Posteriors.of(seen, channel), coins, level))
            row[f"games at {scale:g} x sigma"] = count
            row[f"refuted at {scale:g} x sigma"] = int(sum(refutes(log, ALPHA) for log in logs))
            row[f"largest log evidence at {scale:g} x sigma"] = round(max(logs), 2)
            print(row, flush=True)
            save(rows)
    return rows


def accuracy(seeds: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Held-out exact match of dp-sgd on digits at eps = 8 and `dpaudit train`'s other defaults, by scheme and seed."""
    dataset = load("digits")
    found: dict[str, Any] = {"base": float(correct(VisionLanguageModel.load(device="cpu"), dataset.test).mean())}
    for scheme in ("allocation", "poisson"):
        for seed in range(1, seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                text = [f"seed={seed}", "model.device=cpu", "privacy.epsilon=8", f"training.sampling={scheme}"]
                began = time.monotonic()
                reporter = Live(f"{scheme} seed {seed}")
                run = start_run(resolve({}, text), Path(folder) / "run", dataset=dataset, reporter=reporter)
                right = float(correct(load_model(run, "cpu"), dataset.test).mean())
                claim = ClaimDocument.read(run.claim).claim
            assert claim is not None
            row = found.setdefault(scheme, {"exact_match": [], "seconds": []})
            row["exact_match"].append(right)
            row["seconds"].append(round(time.monotonic() - began, 1))
            row |= {"sigma": claim.noise_multiplier, "q": claim.sample_rate, "T": claim.steps, "t": claim.epoch_steps}
            print(scheme, seed, row, flush=True)
            save(found)
    return found


def real(seeds: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """White-box audits of real trainings: 100 canaries, 120 digits, epochs of 5 steps, every second one cut short."""
    rows = []
    for seed in range(seeds):
        text = [
            f"seed={seed}", "model.device=cpu", "training.sampling=allocation", "training.batch-size=44",
            f"training.steps={10 if seed % 2 else 8}", "data.limit=120", "privacy.epsilon=8",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            played, claim = play_white_box(
                resolve({}, text), Path(folder) / "twin", count=100, confidence=0.95, alpha=ALPHA
            )
            tests = {test.name: test for test in played.tests if test.decides and test.e_value is not None}
            evidence = played.kept + sum((test.share or 0.0) * float(test.e_value) for test in tests.values())  # type: ignore[arg-type]
        rows.append(
            {
                "seed": seed,
                "sound": played.validity.sound,
                "controls": {item.name: item.outcome for item in played.controls},
                "log evidence": round(float(np.log(evidence)), 3),
                "p": {name: test.p_value for name, test in tests.items()},
                "power": [test.power for test in played.tests if test.power is not None],
                "T": claim.steps,
                "t": claim.epoch_steps,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        print(rows[-1], flush=True)
        found = {
            "audits": len(rows),
            "sound": sum(row["sound"] for row in rows),
            "refuted": sum(refutes(row["log evidence"], ALPHA) for row in rows),
            "rows": rows,
        }
        save(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("noise", "games", "accuracy", "real"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()

    def save(part: str, made: Any) -> None:
        document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        document["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        document[part] = made
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    for part in options.parts:
        made = {
            "noise": noise,
            "games": partial(games, options.seeds, partial(save, "games")),
            "accuracy": partial(accuracy, options.seeds, partial(save, "accuracy")),
            "real": partial(real, options.seeds, partial(save, "real")),
        }[part]()
        save(part, made)


if __name__ == "__main__":
    main()
