"""What docs/comparison.md measures: riskcal's readings of a claim, PrivacyGuard's bounds, DP-Auditorium's sample sizes.

None of them is a dependency of dpaudit. In an environment of its own:

    python -m venv peers && peers/bin/pip install . riskcal==1.5.1 privacyguard-platform==0.0.2
    peers/bin/python benchmarks/comparison.py [--out benchmarks/results]

DP-Auditorium is not run (it needs TensorFlow 2.15): its rows are the sample size that its own formula asks for.
Writes comparison.csv.
"""

import argparse
import csv
import functools
import gc
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from privacy_guard.analysis.mia.aggregate_analysis_input import AggregateAnalysisInput, AggregationType
from privacy_guard.analysis.mia.analysis_node import AnalysisNode
from privacy_guard.analysis.mia.fdp_analysis_node import FDPAnalysisNode
from privacy_guard.analysis.mia.mia_results import MIAResults
from riskcal import analysis

import dpaudit
from dpaudit.bounds import mahloujifar

DELTA, LEVEL, NULL, BOOTSTRAPPED = 1e-5, 0.05, 400, 20
GUARD, AUDITORIUM = "privacyguard-platform", "0.0.1 of commit b5b0286"
CLAIMS = ((0.8, 0.04, 60), (1.0, 0.05, 200), (1.198, 0.119, 168))
COUNTS = ((1000, 100, 90), (1000, 300, 230), (2000, 400, 280))  # canaries, guesses, right
Row = dict[str, object]


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """(value, seconds of CPU), with nothing remembered from earlier calls."""
    for memo in [found for found in gc.get_objects() if isinstance(found, functools._lru_cache_wrapper)]:
        if memo.__module__.startswith("dpaudit"):
            memo.cache_clear()
    start = time.process_time()
    value = function()
    return float(value), time.process_time() - start


def row(peer: str, setting: str, what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> Row:
    """One comparison, with the CPU seconds of both."""
    value, seconds = timed(ours)
    other, other_seconds = timed(theirs)
    return {
        "peer": f"{peer} {version(peer)}",
        "setting": setting,
        "what": what,
        "dpaudit": f"{value:.5f}",
        "theirs": f"{other:.5f}",
        "dpaudit_s": f"{seconds:.2f}",
        "theirs_s": f"{other_seconds:.2f}",
    }


def losses(sigma: float, rate: float, steps: int) -> PrivacyLossDistribution:
    """The claim's privacy losses, built as riskcal's own page does."""
    return from_gaussian_mechanism(sigma, sampling_prob=rate, use_connect_dots=True).self_compose(steps)


def readings() -> list[Row]:
    """Advantage, and TPR at two FPRs, of DP-SGD; both tools start from sigma, q and T each time."""
    rows = []
    for sigma, rate, steps in CLAIMS:
        curve = partial(dpaudit.tradeoff, sigma=sigma, rate=rate, steps=steps, delta=DELTA)
        peer = partial(losses, sigma, rate, steps)
        setting = f"sigma {sigma:g}, q {rate:g}, T {steps}, eps {float(curve().claim.epsilon):.2f}"
        readers: list[tuple[str, Callable[[], float], Callable[[], float]]] = [
            ("advantage", lambda c=curve: c().advantage(), lambda p=peer: analysis.get_advantage_from_pld(p())),
        ]
        readers += [
            (
                f"TPR at FPR {fpr:g}",
                lambda c=curve, f=fpr: c().tpr(f),
                lambda p=peer, f=fpr: 1 - analysis.get_beta_from_pld(p(), alpha=f),
            )
            for fpr in (0.01, 0.001)
        ]
        rows += [row("riskcal", setting, what, ours, theirs) for what, ours, theirs in readers]
    return rows


def same_counts() -> list[Row]:
    """The f-DP bound (Gaussian family) of the same counts: one method, two implementations."""
    rows = []
    for canaries, guesses, right in COUNTS:
        node = partial(FDPAnalysisNode, m=canaries, c=right, c_cap=guesses, threshold=LEVEL, delta=DELTA)
        ours = partial(mahloujifar.epsilon_lower, canaries=canaries, guesses=guesses, correct=right, delta=DELTA)
        setting = f"{canaries} canaries, {right} of {guesses} right"
        what = "one run, f-DP (Gaussian)"
        rows.append(
            row(GUARD, setting, what, partial(ours, confidence=1 - LEVEL), lambda n=node: n().run_analysis().eps)
        )
    return rows


def game(seed: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and fair, independent coins; shapes (1000,)."""
    rng = np.random.default_rng(seed)
    members = rng.random(1000) < 0.5
    return rng.normal(size=1000) + mu * members, members


def swept(scores: np.ndarray, members: np.ndarray) -> float:
    """PrivacyGuard's `eps_cp`: Clopper-Pearson at every threshold, and the best of them."""
    results = MIAResults(torch.tensor(scores[members]), torch.tensor(scores[~members]))
    return float(results.compute_acc_auc_ci_epsilon(DELTA)[2])


def headline(scores: np.ndarray, members: np.ndarray) -> float:
    """PrivacyGuard's `eps`: the upper end of a bootstrap interval at TPR 1 %, with its defaults."""
    np.random.seed(0)  # the package draws from the global generator
    frames = [
        pd.DataFrame({"user_id": range(len(part)), "score": part}) for part in (scores[members], scores[~members])
    ]
    given = AggregateAnalysisInput(AggregationType.NONE, *frames, user_id_key="user_id")
    return float(AnalysisNode(given, delta=DELTA, n_users_for_eval=1000).run_analysis().eps)


def alarms() -> list[Row]:
    """Share of games without a leak whose figure is above 0; a bound at 95 % promises at most 0.05."""

    def share(figure: Callable[[np.ndarray, np.ndarray], float], games: int) -> float:
        return float(np.mean([figure(*game(1000 + seed, 0.0)) > 0 for seed in range(games)]))

    def ours(scores: np.ndarray, members: np.ndarray) -> float:
        return dpaudit.Scores(scores, members, coins="independent").epsilon(DELTA).value

    return [
        row(
            GUARD,
            f"1000 records, share of {games} above 0",
            what,
            partial(share, ours, games),
            partial(share, f, games),
        )
        for what, f, games in (("eps_cp", swept, NULL), ("eps", headline, BOOTSTRAPPED))
    ]


def one_leak() -> list[Row]:
    """The same records with a leak: mu = 1, whose eps at delta is 4.38."""
    scores, members = game(7, 1.0)
    found = dpaudit.Scores(scores, members, coins="independent")
    return [
        row(
            GUARD,
            "1000 records, mu 1, true eps 4.38",
            what,
            lambda: found.epsilon(DELTA).value,
            partial(f, scores, members),
        )
        for what, f in (("eps_cp", swept), ("eps", headline))
    ]


def least_outputs() -> list[Row]:
    """Outputs per data set below which DP-Auditorium's hockey-stick tester can't reject, even with every guess right.

    Its bound on the divergence is a (1 + e^eps) - e^eps with a = accuracy - sqrt(ln(1 / p) / (2 n)), on the half of the
    outputs that its classifier has not seen (hockey_stick_tester.py, property_tester_utils.py); accuracy is at most 1.
    """
    rows = []
    for eps in (0.5, 1.0, 3.0, 8.0):
        tested = math.log(1 / LEVEL) / 2 * ((1 + math.exp(eps)) / (1 - DELTA)) ** 2
        named = {"peer": f"DP-Auditorium {AUDITORIUM}", "setting": f"claim eps {eps:g}, delta {DELTA:g}"}
        rows.append(
            {**named, "what": "outputs per data set that the tester needs", "theirs": f"{2 * math.ceil(tested)}"}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    rows = readings() + same_counts() + one_leak() + alarms() + least_outputs()
    with (given.out / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        print(*line.values(), sep="  ")


if __name__ == "__main__":
    main()
