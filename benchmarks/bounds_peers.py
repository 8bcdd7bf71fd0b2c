"""Side by side with jax-privacy's auditor on the same score arrays: equal where the method is the same, and times.

jax-privacy is no dependency of dpaudit. In an environment of its own:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install jax-privacy pydantic
    PYTHONPATH=. /tmp/peer/bin/python benchmarks/bounds_peers.py [--out benchmarks/results]

Writes bounds_peers.csv. "same" rows fix the threshold beforehand in both; "best" rows let each tool use what it has.
"""

import argparse
import csv
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax_privacy import auditing

from dpaudit.analysis.plan import bound_guesses
from dpaudit.bounds import bands, bayes, clopper_pearson, gdp, mahloujifar, order_statistic, roc, selection, steinke
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.guesses import count_correct, rank_guesses

DELTA, LEVEL = 1e-5, 0.05
Row = dict[str, object]
MEMOISED = (
    steinke.epsilon_lower,
    mahloujifar.mu_lower,
    order_statistic.mu_lower,
    order_statistic._cut,
    bayes.epsilon_lower,
    bands._band,
)


def timed(function: Callable[[], float], repeats: int = 3) -> tuple[float, float]:
    """(value, median seconds of CPU), with our memory of counts emptied before each call."""
    times = []
    for _ in range(repeats):
        for memo in MEMOISED:
            memo.cache_clear()
        start = time.process_time()
        value = function()
        times.append(time.process_time() - start)
    return float(value), float(np.median(times))


def same(n: int, mu: float, rng: np.random.Generator) -> list[Row]:
    """One threshold, fixed at the value that is best for this mu, in both tools."""
    inside, outside = rng.normal(size=n) + mu, rng.normal(size=n)
    threshold = mu / 2 + 1.0
    fixed = auditing.Explicit(threshold)

    # Both start from the score arrays: counting here, building the ROC there.
    def counted() -> tuple[int, int]:
        right = int((inside >= threshold).sum())
        return right + int((outside >= threshold).sum()), right

    def ours(bound: Callable[..., float]) -> float:
        guesses, right = counted()
        return bound(canaries=2 * n, guesses=guesses, correct=right, delta=DELTA, confidence=1 - LEVEL)

    def ours_runs() -> float:
        guesses, right = counted()
        counts = Counts(right, n - right, guesses - right, n - guesses + right)
        return clopper_pearson.epsilon_lower(counts, delta=DELTA, confidence=1 - LEVEL)

    def peer() -> auditing.CanaryScoreAuditor:
        return auditing.CanaryScoreAuditor(inside, outside)

    cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "Clopper-Pearson": (
            ours_runs,
            lambda: peer().epsilon_clopper_pearson(LEVEL, DELTA, one_sided=False, threshold_strategy=fixed),
        ),
        "one run, Steinke, k- = 0": (
            lambda: ours(steinke.epsilon_lower),
            lambda: peer().epsilon_one_run(LEVEL, DELTA, threshold_strategy=fixed),
        ),
        "one run, f-DP (Gaussian), k- = 0": (
            lambda: ours(mahloujifar.epsilon_lower),
            lambda: peer().epsilon_one_run_fdp(LEVEL, DELTA, threshold_strategy=fixed),
        ),
    }
    return [row("same", n, mu, name, *cases[name]) for name in cases]


def best(n: int, mu: float, rng: np.random.Generator) -> list[Row]:
    """Each tool as it is meant to be used, on scores whose coins are fair."""
    members = rng.random(2 * n) < 0.5
    scores = rng.normal(size=2 * n) + mu * members
    inside, outside = scores[members], scores[~members]

    def peer() -> auditing.CanaryScoreAuditor:
        return auditing.CanaryScoreAuditor(inside, outside)

    def one_run(method: str) -> float:
        guesses = bound_guesses(method, canaries=2 * n, delta=DELTA, confidence=1 - LEVEL)
        drawn = rank_guesses(scores, guesses - guesses // 2, guesses // 2, rng=np.random.default_rng(0))
        right = count_correct(drawn, members)
        at = {"canaries": 2 * n, "guesses": guesses, "delta": DELTA, "confidence": 1 - LEVEL}
        if method == "steinke":
            return steinke.epsilon_lower(correct=right, **at)
        if method == "mahloujifar":
            return mahloujifar.epsilon_lower(correct=right, **at)
        return order_statistic.epsilon_lower(errors=guesses - right, **at)

    def runs(bound: selection.RateBound) -> float:
        rule = selection.OrderStatisticBand()
        return selection.runs_lower(inside, outside, bound, rule=rule, delta=DELTA, confidence=1 - LEVEL).epsilon_lower

    cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "Clopper-Pearson, threshold by the tool's rule": (
            lambda: runs(selection.epsilon_of),
            lambda: peer().epsilon_clopper_pearson(LEVEL, DELTA, one_sided=False),
        ),
        "GDP, threshold by the tool's rule": (
            lambda: runs(selection.gaussian_epsilon_of),
            lambda: peer().epsilon_from_gdp(LEVEL, DELTA),
        ),
        "one run, assumes nothing": (lambda: one_run("steinke"), lambda: peer().epsilon_one_run(LEVEL, DELTA)),
        "one run, Gaussian family": (
            lambda: one_run("order-statistic"),
            lambda: peer().epsilon_one_run_fdp(LEVEL, DELTA),
        ),
        "AUC": (lambda: roc.auc(*roc.curve(scores, members)), lambda: float(peer().attack_auroc())),
    }
    return [row("best", n, mu, name, *cases[name]) for name in cases]


def row(kind: str, n: int, mu: float, what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> Row:
    """One comparison."""
    value, seconds = timed(ours)
    peer, peer_seconds = timed(theirs)
    return {
        "kind": kind,
        "per_side": n,
        "mu": mu,
        "true_eps": f"{gdp.epsilon_from_mu(mu, DELTA):.3f}",
        "what": what,
        "dpaudit": f"{value:.4f}",
        "jax_privacy": f"{peer:.4f}",
        "dpaudit_s": f"{seconds:.5f}",
        "jax_privacy_s": f"{peer_seconds:.5f}",
        "times_faster": f"{peer_seconds / max(seconds, 1e-7):.1f}",
    }


def null_alarms(runs: int, n: int, rng: np.random.Generator) -> list[Row]:
    """Share of leak-free score sets on which a bound is above 0."""
    hits = {"GDP": [0, 0], "one run, assumes nothing": [0, 0], "AUC above 1/2 by": [0.0, 0.0]}
    band = selection.OrderStatisticBand()
    for _ in range(runs):
        members = rng.random(2 * n) < 0.5
        scores = rng.normal(size=2 * n)
        inside, outside = scores[members], scores[~members]
        peer = auditing.CanaryScoreAuditor(inside, outside)
        ours = selection.runs_lower(
            inside, outside, selection.gaussian_epsilon_of, rule=band, delta=DELTA, confidence=1 - LEVEL
        )
        guesses = bound_guesses("steinke", canaries=2 * n, delta=DELTA, confidence=1 - LEVEL)
        drawn = rank_guesses(scores, guesses - guesses // 2, guesses // 2, rng=rng)
        one_run = steinke.epsilon_lower(
            canaries=2 * n,
            guesses=guesses,
            correct=count_correct(drawn, members),
            delta=DELTA,
            confidence=1 - LEVEL,
        )
        pairs = {
            "GDP": (ours.epsilon_lower > 0, peer.epsilon_from_gdp(LEVEL, DELTA) > 0),
            "one run, assumes nothing": (one_run > 0, peer.epsilon_one_run(LEVEL, DELTA) > 0),
            "AUC above 1/2 by": (roc.auc(*roc.curve(scores, members)) - 0.5, float(peer.attack_auroc()) - 0.5),
        }
        for name, (a, b) in pairs.items():
            hits[name][0] += a
            hits[name][1] += b
    return [
        {
            "kind": f"null, mean over {runs}",
            "per_side": n,
            "mu": 0.0,
            "true_eps": "0.000",
            "what": name,
            "dpaudit": f"{a / runs:.4f}",
            "jax_privacy": f"{b / runs:.4f}",
        }
        for name, (a, b) in hits.items()
    ]


def main() -> None:
    """Compare and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rng = np.random.default_rng(77)
    rows: list[Row] = []
    for n in (100, 1000, 10000):
        for mu in (0.0, 1.0, 2.0) if n < 10000 else (1.0,):
            rows += same(n, mu, rng) + best(n, mu, rng)
    rows += null_alarms(100, 100, rng)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "bounds_peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"jax-privacy {importlib.metadata.version('jax-privacy')}: {len(rows)} rows")


if __name__ == "__main__":
    main()
