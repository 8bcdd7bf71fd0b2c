"""What does black-box membership inference show: without privacy, and of DP-SGD at eps = 8?

    python benchmarks/attack_black_box.py --seeds 3

Runs of the embedded model on 32 units of the digits and canaries; each is trained by the ordinary trainer, its coins
hashed before the first step. The attacker sees the released model, nothing of the training, and holds the public base
model and the records.

- non-private, 500 canaries, AdamW: of the kinds new-token and mislabelled, where new-token alone is judged (250
  candidates, 100 guesses on each side), of kind rare-answer, and of kind high-perplexity;
- DP-SGD, eps = 8 at 1e-5, 1,000 canaries of four kinds, the recipe of the package (AdamW, q = 0.25);
- the same claim with full batches (q = 1) and plain SGD: one step, and four at two learning rates.

Scores, each named before anything was trained: the loss against the base model (what `dpaudit audit --canaries` uses,
guesses as planned there; it needs losses only), and `unmixed-update` (attacks.membership.gram; it needs the released
adapter), GUESSES of its ranks guessed on each side, a number chosen by simulation from the Gram matrix alone.
Bounds at 95 %: Steinke's, which assumes nothing; f-DP within DP-SGD of this q and T, valid however canaries meet; and
order statistics, which hold for canaries that do not meet and inform only. One row a run in
benchmarks/results/attack_black_box.json as it is done; those that are there are not run again.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attacks.canaries import check_coins
from attacks.games.canaries import play_canaries
from attacks.games.members import view_of
from attacks.membership.records import study_records
from attacks.membership.references import load_study
from attacks.membership.selection import area
from attacks.membership.table import score_all
from attacks.training import start_run
from dpaudit import atomic
from dpaudit.analysis.claim import Game, claimed_event, epsilon_lower
from dpaudit.bounds import steinke
from dpaudit.bounds.guesses import count_correct, rank_guesses
from dpaudit.config import resolve
from dpaudit.documents import ClaimDocument, LedgerDocument
from dpaudit.runs import RunFolder

RESULTS = Path(__file__).parent / "results" / "attack_black_box.json"
ALL_RUNS = ["model.device=cpu", "data.limit=32", "model.lora.rank=16", "model.lora.alpha=32"]
KINDS = "canaries.kinds=[new-token,mislabelled,rare-answer,out-of-distribution]"
MEMORISE = ["method=non-private", "canaries.count=500", "training.epochs=40", "training.batch-size=64"]
PRIVATE = ["method=dp-sgd", "privacy.epsilon=8", "canaries.count=1000", KINDS]
FULL = [*PRIVATE, "training.optimizer=sgd", "training.batch-size=1032", "training.warmup=0"]
ARMS = {
    "non-private, new-token": [*MEMORISE, "canaries.kinds=[new-token,mislabelled]"],
    "non-private, new-token, 80 epochs": [
        *MEMORISE, "canaries.kinds=[new-token,mislabelled]", "training.epochs=80",
    ],
    "non-private, rare-answer": [*MEMORISE, "canaries.kinds=[rare-answer]"],
    "non-private, high-perplexity": [*MEMORISE, "canaries.kinds=[high-perplexity]"],
    "eps = 8, one full batch": [*FULL, "training.steps=1", "training.learning-rate=1"],
    "eps = 8, four full batches, slow": [*FULL, "training.steps=4", "training.learning-rate=0.03"],
    "eps = 8, four full batches, fast": [*FULL, "training.steps=4", "training.learning-rate=0.3"],
    "eps = 8, recipe": [*PRIVATE, "training.epochs=8"],
}  # fmt: skip
GUESSES = 45  # on each side
# Arms whose one named kind is judged, with its guesses on each side.
ALONE = dict.fromkeys(("non-private, new-token", "non-private, new-token, 80 epochs"), ("new-token", 100))
DELTA, CONFIDENCE = 1e-5, 0.95


def bounds(
    run: RunFolder, scores: npt.NDArray[np.float64], frame: pd.DataFrame, seed: int, side: int = GUESSES
) -> dict[str, object]:
    """The same guesses, `side` at each end, under three theories."""
    members = frame["member"].to_numpy(dtype=bool)
    guesses = rank_guesses(scores, side, side, rng=np.random.default_rng([seed]))
    correct, made = count_correct(guesses, members), 2 * side
    counts = Game(len(members), made, correct)
    out: dict[str, object] = {
        "auc": round(area(scores, members), 4),
        "auc_by_kind": {str(kind): round(area(scores[mine], members[mine]), 3) for kind in frame["kind"].unique()
                        for mine in [(frame["kind"] == kind).to_numpy()]},
        "guesses": made,
        "correct": correct,
        "bound": steinke.epsilon_lower(canaries=len(members), guesses=made, correct=correct, delta=DELTA,
                                       confidence=CONFIDENCE),
        "ceiling": steinke.ceiling(canaries=len(members), guesses=made, delta=DELTA, confidence=CONFIDENCE),
    }  # fmt: skip
    claim = ClaimDocument.read(run.claim).claim
    event = claimed_event(claim) if claim is not None else None
    if event is not None:
        for name, separate in (("f_dp_within_dp_sgd", False), ("order_statistics_if_separate", True)):
            reading = counts.read_by(separate=separate)
            out[name] = float(epsilon_lower(event, reading, delta=DELTA, confidence=CONFIDENCE))
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in out.items()}


def row(arm: str, seed: int, settings: Sequence[str], side: int = GUESSES) -> dict[str, object]:
    """Train one run with `settings` and attack it; `side`: guesses at each end."""
    config = resolve({}, [*settings, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        run = start_run(config, Path(folder) / "run")
        trained = time.process_time() - began
        claim = ClaimDocument.read(run.claim).claim
        part = play_canaries(run, claim=claim, delta=DELTA, confidence=CONFIDENCE, alpha=0.001, device="cpu")
        assert part.validity.sound, part.validity
        coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
        view = view_of(run, study_records(run), load_study(run, 0), "cpu", coins.plan.tie_seed)
        members = coins.frame["member"].to_numpy(dtype=bool)
        planned = next(test for test in part.tests if test.bound == "steinke")
        out: dict[str, object] = {
            "arm": arm, "seed": seed, "steps": config.training.steps,
            "claim": None if claim is None else [claim.epsilon, claim.noise_multiplier, claim.sample_rate, claim.steps],
            "loss_before": round(float(view.base.loss.mean()), 3),
            "loss_members": round(float(view.target.loss[members].mean()), 3),
            "loss_others": round(float(view.target.loss[~members].mean()), 3),
            "planned": {"guesses": planned.guesses, "correct": planned.correct, "ceiling": planned.ceiling,
                        "bound": planned.epsilon_lower, "auc": part.scores[0].auc},
        }  # fmt: skip
        names = ["loss-against-base"] if claim is None else ["loss-against-base", "unmixed-update", "first-order-fall"]
        for name, scores in score_all(view, names).items():
            kind, each = ALONE.get(arm, (None, side))
            mine = np.ones(len(members), bool) if kind is None else (coins.frame["kind"] == kind).to_numpy()
            out[name] = bounds(run, scores[mine], coins.frame[mine], coins.plan.tie_seed, each)
    return out | {"cpu_seconds": {"training": round(trained), "all": round(time.process_time() - began)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arms:
            if any((old["arm"], old["seed"]) == (arm, seed) for old in rows):
                continue
            found = row(arm, seed, [*ALL_RUNS, *ARMS[arm]])
            print(json.dumps(found), flush=True)
            rows = [*(json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []), found]
            atomic.write_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
