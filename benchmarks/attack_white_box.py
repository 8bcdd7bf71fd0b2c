"""How tight is the white-box audit, how often is it wrong, and which faults does it find?

    python benchmarks/attack_white_box.py --seeds 50

One short DP-SGD run of the reference model a seed (32 units of the embedded digits, 1,000 gradient canaries, expected
batch 256 of 1,032, 30 steps, claimed eps = 8 at 1e-5), audited by the white-box game. Trainers: correct; 0.7 x the
claimed noise; and one that clips the mean of the batch instead of each unit and adds noise for C / B (the first bug of
"Debugging differential privacy", Tramer et al. 2022). Per seed: the bound within DP-SGD with this q and T
(order statistics, 95 %), the bound that assumes nothing, and the p-value of the claim: twice the smaller of that of all
canaries and that of the half that arrives at 100 C (Bonferroni, as the verdict takes them). Seeds appear in
benchmarks/results/attack_white_box.json as they are done; those that are there are not run again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from attacks.white_box import audit_twin, train_twin
from scipy.stats import binom

import trainers.run
from dpaudit.config import resolve
from trainers.gradients import Gradient, UnitSum
from trainers.run import Trainer, noise_like

RESULTS = Path(__file__).parent / "results" / "attack_white_box.json"
SETTINGS = ["model.device=cpu", "data.limit=32", "training.batch-size=256", "training.steps=30", "privacy.epsilon=8"]
COUNT = 1000
FAULTS = ("correct", "0.7 x noise", "clips the batch mean")


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
        yield ["planted.noise-scale=0.7"] if fault == "0.7 x noise" else []
    finally:
        trainers.run.Trainer = plain  # type: ignore[misc]


def row(fault: str, seed: int) -> dict[str, float]:
    """One run and its audit."""
    with tempfile.TemporaryDirectory() as folder, trainer_of(fault) as extra:
        config = resolve({"method": "dp-sgd"}, [*SETTINGS, f"seed={seed}", *extra])
        twin = train_twin(config, Path(folder) / "twin", count=COUNT)
        part = audit_twin(twin, confidence=0.95, alpha=0.05)
    every, loud = (test for test in part.tests if test.decides and test.p_value is not None)
    family = next(test for test in part.tests if test.bound == "order-statistic" and test.p_value is None)
    free = next(test for test in part.tests if test.bound == "steinke")
    return {
        "seed": seed,
        "correct": int(every.correct or 0),
        "guesses": int(every.guesses or 0),
        "p_value_of_all": float(every.p_value or 0.0),
        "p_value_of_loud": float(loud.p_value or 0.0),
        "p_value": min(1.0, 2 * min(float(every.p_value or 0.0), float(loud.p_value or 0.0))),
        "epsilon_within_dp_sgd": min(1e3, float(family.epsilon_lower or 0.0)),
        "epsilon_free": float(free.epsilon_lower or 0.0),
        "auc": part.scores[0].auc,
    }


def summary(rows: list[dict[str, float]]) -> dict[str, object]:
    """What the table says of one trainer."""
    bounds = np.array([one["epsilon_within_dp_sgd"] for one in rows])
    refuted = int(sum(one["p_value"] <= 0.05 for one in rows))
    return {
        "seeds": len(rows),
        "claimed": 8.0,
        "mean_bound": round(float(bounds.mean()), 3),
        "mean_share_of_claim": round(float(bounds.mean()) / 8.0, 3),
        "standard_error": round(float(bounds.std(ddof=1) / len(bounds) ** 0.5), 3) if len(bounds) > 1 else None,
        "bounds_above_claim": int((bounds > 8.0).sum()),
        "refuted_at_5_percent": refuted,
        "allowed_of_a_correct_one": int(binom.ppf(0.999, len(rows), 0.05)),
        "mean_free_bound": round(float(np.mean([one["epsilon_free"] for one in rows])), 3),
        "largest_p_value": max(one["p_value"] for one in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="of the correct trainer")
    parser.add_argument("--faulty-seeds", type=int, default=10)
    options = parser.parse_args()
    tree = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"settings": SETTINGS, "rows": {}}
    for fault in FAULTS:
        rows = tree["rows"].setdefault(fault, [])
        for seed in range(options.seeds if fault == "correct" else options.faulty_seeds):
            if any(one["seed"] == seed for one in rows):
                continue
            rows.append(row(fault, seed))
            tree["summary"] = {name: summary(found) for name, found in tree["rows"].items() if found}
            print(fault, json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
