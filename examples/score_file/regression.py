"""DP-SGD in another framework (here: plain numpy), audited through nothing but a file of scores.

    python regression.py scores.csv          # trains, writes scores.csv, and prints the dpaudit command for it
    python regression.py scores.csv --bug half-noise      # a mistake on purpose: refuted

dpaudit is not imported. What makes the file auditable: every canary has a fair coin of its own, drawn and written down
before the first step; heads are trained on; every canary gets one score afterwards, higher = "was in training".
"""

import argparse
import csv
import hashlib
import io
import math
import secrets
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

# Public numbers: C, sigma / C, expected batch size, declared number of records, steps.
CLIP, SIGMA, BATCH, PUBLIC_SIZE, STEPS = 1.0, 1.0, 50, 1000, 200
RATE = BATCH / PUBLIC_SIZE
CANARIES = 500
BUGS = ("none", "no-noise", "half-noise", "batch-clip")


def records() -> tuple[np.ndarray, np.ndarray]:
    """(n, 64 + CANARIES) features and (n,) labels -1 or 1: is it a digit above four?

    The last columns are features that no real record uses (like words that occur nowhere): one for each canary, so that
    canaries act on separate directions of the noise.
    """
    pictures, digits = load_digits(return_X_y=True)
    rows = np.pad(pictures[:PUBLIC_SIZE] / 16.0, ((0, 0), (0, CANARIES)))
    return rows, np.where(digits[:PUBLIC_SIZE] > 4, 1.0, -1.0)


def canaries(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each uses its own feature alone, strongly, with a label drawn at random."""
    return np.pad(20.0 * np.eye(CANARIES), ((0, 0), (64, 0))), rng.choice([-1.0, 1.0], CANARIES)


def gradients(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, d) gradient of each record's logistic loss."""
    margin = np.clip(y * (x @ weights), -50, 50)
    return -(y / (1 + np.exp(margin)))[:, None] * x


def train(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, bug: str) -> np.ndarray:
    """DP-SGD with Poisson sampling; returns the final weights."""
    weights = np.zeros(x.shape[1])
    scale = {"no-noise": 0.0, "half-noise": 0.5}.get(bug, 1.0) * SIGMA * CLIP
    for _ in range(STEPS):
        chosen = rng.random(len(x)) < RATE
        each = gradients(weights, x[chosen], y[chosen])
        if bug == "batch-clip":  # the mean is clipped instead of every record
            mean = each.sum(axis=0) / BATCH
            total = BATCH * mean * min(1.0, CLIP / max(float(np.linalg.norm(mean)), 1e-12))
        else:
            norms = np.linalg.norm(each, axis=1, keepdims=True)
            total = (each * np.minimum(1.0, CLIP / np.maximum(norms, 1e-12))).sum(axis=0)
        weights -= 0.1 * (total + rng.normal(0.0, scale, size=len(weights)) if scale else total) / BATCH
    return weights


def table(columns: dict[str, np.ndarray]) -> str:
    """CSV text."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write a score file.")
    parser.add_argument("scores", type=Path)
    parser.add_argument("--bug", choices=BUGS, default="none", help="a mistake on purpose")
    parser.add_argument(
        "--control", type=Path, help="scores of a game with a known leak, for the command that is printed"
    )
    parser.add_argument("--seed", type=int, default=None, help="repeatable (default: from the operating system)")
    given = parser.parse_args()
    rng = np.random.default_rng(secrets.randbits(128) if given.seed is None else given.seed)

    # The coins come first, and their hash is proof that they did.
    members = rng.random(CANARIES) < 0.5
    ids = np.array([f"canary-{index:03d}" for index in range(CANARIES)])
    coins = table({"id": ids, "member": members.astype(int)})
    given.scores.with_suffix(".coins.csv").write_text(coins)
    print(f"coins: SHA-256 {hashlib.sha256(coins.encode()).hexdigest()}")

    (x, y), (cx, cy) = records(), canaries(rng)
    weights = train(np.vstack([x, cx[members]]), np.concatenate([y, cy[members]]), rng, given.bug)
    print(f"training accuracy {np.mean(np.sign(x @ weights) == y):.1%}")

    # Minus the loss of each canary; a larger margin means a smaller loss.
    margin = cy * (cx @ weights)
    score = [-math.log1p(math.exp(-value)) if value > -50 else value for value in margin]
    given.scores.write_text(table({"id": ids, "member": members.astype(int), "score": np.array(score)}))
    claim = f"--claim-sigma {SIGMA} --claim-rate {RATE} --claim-steps {STEPS}"
    control = f"--control {given.control}" if given.control is not None else ""
    print(f"dpaudit scores {given.scores} --delta 1e-5 --coins independent --separate {claim} {control}".rstrip())


if __name__ == "__main__":
    main()
