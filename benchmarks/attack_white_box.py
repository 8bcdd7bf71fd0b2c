"""How tight is the white-box audit on real trainings, how often is it wrong, and which faults does it find?

    python benchmarks/attack_white_box.py --seeds 20

One short DP-SGD run of the reference model a seed (32 units of the embedded digits, 1,000 gradient canaries, expected
batch 256 of 1,032, 30 steps, claimed eps = 8 at 1e-5), audited by the white-box game. Trainers: correct; 0.95, 0.9 and
0.7 times the claimed noise; and one that clips the mean of the batch instead of each unit and adds noise for C / B (the
first bug of "Debugging differential privacy", Tramer et al. 2022). Per seed: the log evidence of the game as it is
judged (refuted at 0.001 from 6.9 on) and of all canaries alone, the better bound within DP-SGD (99.2 %
each, what the first audit of a run gets), the bound that assumes nothing, and what the controls showed. Seeds appear in
the results as they are done; those that are there are not run again. benchmarks/white_box_evidence.py has the same,
simulated.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binom

import trainers.run
from attacks.games.played import Games
from attacks.games.twins import play_white_box
from dpaudit import verdict
from dpaudit.config import resolve
from trainers.gradients import Gradient, UnitSum
from trainers.noise import noise_like
from trainers.step import Trainer

RESULTS = Path(__file__).parent / "results"
SETTINGS = ["model.device=cpu", "data.limit=32", "training.batch-size=256", "training.steps=30", "privacy.epsilon=8"]
COUNT = 1000
NOISE = {"0.95 x noise": 0.95, "0.9 x noise": 0.9, "0.7 x noise": 0.7}
FAULTS = ("correct", *NOISE, "clips the batch mean")
ALPHA = 0.001


class MeanClipping(Trainer):
    """Adds raw gradients, clips their mean to C, and adds noise of sigma C / B, as if one unit moved it by C / B."""

    def clipped_sum(self, step: int, units: object) -> UnitSum:
        """What the claim says: the auditor's own sum of clipped gradients; the raw one is kept for the step."""
        honest = super().clipped_sum(step, units)  # type: ignore[arg-type]
        plan = self.plan
        self.plan = plan.__class__(**{**plan.__dict__, "max_grad_norm": 1e9})
        self.raw = super().clipped_sum(step, units)  # type: ignore[arg-type]
        self.plan = plan
        return honest

    def with_injected(self, known: UnitSum, canaries: npt.NDArray[np.int64]) -> UnitSum:
        """Raw gradients of units and canaries."""
        assert self.injected is not None
        flat, at, total = self.injected[torch.from_numpy(canaries)].sum(dim=0), 0, {}
        for name in sorted(self.parameters):
            value = self.raw.gradient[name]
            total[name] = value + flat[at : at + value.numel()].view_as(value)
            at += value.numel()
        return UnitSum(total, known.norms, known.losses)

    def noisy_mean(self, step: int, total: UnitSum) -> Gradient:
        """clip(mean, C) + N(0, (sigma C / B)^2)."""
        plan = self.plan
        mean = {name: value / plan.expected_batch_size for name, value in total.gradient.items()}
        norm = float(torch.stack([value.square().sum() for value in mean.values()]).sum().sqrt())
        factor = min(1.0, plan.max_grad_norm / norm) if norm else 1.0
        std = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
        noise = noise_like(self.key, mean, step=step, std=std)
        return {name: factor * value + noise[name] for name, value in mean.items()}


@contextmanager
def trainer_of(fault: str) -> Iterator[list[str]]:
    """The faulty trainer in place of ours, and the settings that go with it."""
    plain = trainers.run.Trainer
    try:
        if fault == "clips the batch mean":
            trainers.run.Trainer = MeanClipping  # type: ignore[misc]
        yield [f"planted.noise-scale={NOISE[fault]}"] if fault in NOISE else []
    finally:
        trainers.run.Trainer = plain  # type: ignore[misc]


def row(fault: str, seed: int, count: int) -> dict[str, object]:
    """One run and its audit."""
    with tempfile.TemporaryDirectory() as folder, trainer_of(fault) as extra:
        config = resolve({"method": "dp-sgd"}, [*SETTINGS, f"seed={seed}", *extra])
        confidence = verdict.confidence_of(1, 0.95)
        part, claim = play_white_box(config, Path(folder) / "twin", count=count, confidence=confidence, alpha=ALPHA)
    games = Games(None, ALPHA, None)
    games.keep("white-box", part, about="procedure", claim=claim)
    (game,) = games.documents
    found, _ = verdict.decide(claim=claim, alpha=ALPHA, games=[game])
    tests = {test.bound: test for test in reversed(part.tests) if test.decides}  # of two, the first: all canaries
    bounds = [test for test in part.tests if test.assumes == "dp-sgd(q,T)"]
    within = max(bounds, key=lambda test: float(test.epsilon_lower or 0.0), default=None)
    coins = tests.get("exact likelihood")
    return {
        "seed": seed,
        "verdict": found,
        "log_evidence": round(verdict.evidence([game]).best, 3),
        "p_value_of_all": None if coins is None else coins.p_value,
        "power": None if coins is None else coins.power,
        "epsilon_within_dp_sgd": None if within is None else min(1e3, float(within.epsilon_lower or 0.0)),
        "epsilon_by_coins": next((float(t.epsilon_lower or 0) for t in bounds if t.bound == "exact likelihood"), None),
        "epsilon_free": float(tests["steinke"].epsilon_lower or 0.0) if "steinke" in tests else None,
        "controls": {control.name: control.outcome for control in part.controls},
    }


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """What the table says of one trainer."""
    bounds = np.array([one["epsilon_within_dp_sgd"] for one in rows if one["epsilon_within_dp_sgd"] is not None], float)
    return {
        "seeds": len(rows),
        "verdicts": dict(Counter(str(one["verdict"]) for one in rows)),
        "claimed": 8.0,
        "mean_bound": round(float(bounds.mean()), 3) if bounds.size else None,
        "mean_share_of_claim": round(float(bounds.mean()) / 8.0, 3) if bounds.size else None,
        "bounds_above_claim": int((bounds > 8.0).sum()),
        "allowed_of_a_correct_one": int(binom.ppf(0.999, len(rows), 0.025)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="of the correct trainer and of missing noise")
    parser.add_argument("--faulty-seeds", type=int, default=5, help="of the other faults")
    parser.add_argument("--count", type=int, default=COUNT, help="gradient canaries")
    options = parser.parse_args()
    place = RESULTS / ("attack_white_box.json" if options.count == COUNT else f"attack_white_box_{options.count}.json")
    empty = {"settings": SETTINGS, "canaries": options.count, "rows": {}}
    tree = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else empty
    for fault in FAULTS:
        rows = tree["rows"].setdefault(fault, [])
        many = fault in ("correct", "0.95 x noise", "0.9 x noise")
        for seed in range(options.seeds if many else options.faulty_seeds):
            if any(one["seed"] == seed for one in rows):
                continue
            rows.append(row(fault, seed, options.count))
            tree["summary"] = {name: summary(found) for name, found in tree["rows"].items() if found}
            print(fault, json.dumps(rows[-1]), flush=True)
            place.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
