"""Side by side with opake-auditing's one-run estimate on the same coins and scores, and on scores without a leak.

opake-auditing is no dependency of dpaudit. In an environment of its own:

    python -m venv opake && opake/bin/pip install . opake-auditing==0.16.1
    opake/bin/python benchmarks/bounds_opake.py [--out benchmarks/results]

The coins are Opake's. Members' scores are normal with mean mu, the others' with mean 0. Its threshold is the default,
the one that is best on the same scores; `at 0` fixes it beforehand. Writes bounds_opake.csv.
"""

import argparse
import csv
from importlib.metadata import version
from pathlib import Path

import numpy as np
import opake.auditing as auditing
from opake.random import key

import dpaudit
from dpaudit.bounds import gdp

DELTA, LEVEL, CANARIES, NULL = 1e-5, 0.05, 2000, 200
Row = dict[str, object]


def game(count: int, mu: float, seed: int) -> tuple["auditing.OneRunEstimate", dpaudit.Scores]:
    """Their estimate and our scores of one game."""
    coins = auditing.coin_flip(range(count), num_canaries=count, key=key(seed))
    members = np.isin(np.arange(count), coins.in_indices)
    scores = np.random.default_rng(seed).normal(size=count) + mu * members
    estimate = auditing.one_run(auditing.canary_scores(scores, canary_indices=np.arange(count)), coin_flip=coins)
    return estimate, dpaudit.Scores(scores, members, coins="independent")


def row(kind: str, canaries: int, mu: float, what: str, ours: float, theirs: float, fixed: float) -> Row:
    true = gdp.epsilon_from_mu(mu, DELTA)
    values = {"dpaudit": f"{ours:.4f}", "opake_auditing": f"{theirs:.4f}", "opake_auditing_at_0": f"{fixed:.4f}"}
    return {"kind": kind, "canaries": canaries, "mu": mu, "true_eps": f"{true:.3f}", "what": what, **values}


def compared(mu: float, seed: int) -> list[Row]:
    """Both bounds of one game."""
    estimate, scores = game(CANARIES, mu, seed)
    given = {"delta": DELTA, "significance": LEVEL}
    pairs = (
        ("assumes nothing", scores.epsilon(DELTA).value, estimate.eps_delta()),
        ("Gaussian family", scores.epsilon(DELTA, method="order-statistic").value, estimate.gdp()),
    )
    return [
        row("one game", CANARIES, mu, what, ours, theirs.epsilon_at(**given), theirs.epsilon_at(**given, threshold=0.0))
        for what, ours, theirs in pairs
    ]


def alarms(count: int) -> Row:
    """Shares of games without a leak whose bound is above 0; at most 0.05 is promised."""
    above = np.zeros((NULL, 3), dtype=bool)
    given = {"delta": DELTA, "significance": LEVEL}
    for seed in range(NULL):
        estimate, scores = game(count, 0.0, 1000 + seed)
        theirs = estimate.eps_delta()
        above[seed] = (
            scores.epsilon(DELTA).value > 0,
            theirs.epsilon_at(**given) > 0,
            theirs.epsilon_at(**given, threshold=0.0) > 0,
        )
    shares = above.mean(axis=0)
    return row(f"null, share of {NULL} above 0", count, 0.0, "assumes nothing", *map(float, shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    rows = [line for mu in (1.0, 2.0) for line in compared(mu, seed=7)] + [alarms(1000)]
    with (given.out / "bounds_opake.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        print(*line.values(), sep="  ")
    print(f"opake-auditing {version('opake-auditing')}")


if __name__ == "__main__":
    main()
