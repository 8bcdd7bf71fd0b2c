"""What the bounds and the claim test find, and what interference does to them, on simulated audits.

    python benchmarks/bounds_power.py [--audits 2000] [--out benchmarks/results]

Writes bounds_recovery.csv (how much of the true eps a bound shows), bounds_claims.csv (how often a wrong sigma is
refuted) and bounds_interference.csv (false refutations of a true claim when canaries meet).
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc

from dpaudit.analysis import simulate
from dpaudit.analysis.plan import bound_guesses, expected_errors
from dpaudit.bounds import dp_sgd, gdp, mahloujifar, order_statistic, pld, steinke
from dpaudit.bounds.profile import DiscreteProfile, GaussianProfile, Profile

DELTA, CONFIDENCE = 1e-5, 0.95
Counts = npt.NDArray[np.intp]
Row = dict[str, object]


def over(right: Counts, function: Callable[[int], float]) -> npt.NDArray[np.float64]:
    """function(v) for every audit, each distinct count once."""
    values, inverse = np.unique(right, return_inverse=True)
    return np.array([function(int(v)) for v in values])[inverse]


def games(audits: int, n: int, mu: float, guesses: int, rng: np.random.Generator) -> Counts:
    """Right guesses of ideal Gaussian canaries, drawn in chunks."""
    parts = []
    for start in range(0, audits, max(1, 4_000_000 // n)):
        count = min(max(1, 4_000_000 // n), audits - start)
        scores, inside = simulate.gaussian(count, n, mu, rng)
        parts.append(simulate.right_guesses(scores, inside, guesses - guesses // 2, guesses // 2, rng))
    return np.concatenate(parts)


def recovery(audits: int) -> list[Row]:
    """Mean bound over true eps, at mu = 1 and 2, for guesses planned from n alone."""
    rows = []
    rng = np.random.default_rng(101)
    bounds: dict[str, Callable[[int, int, int], float]] = {
        "steinke": lambda n, r, v: steinke.epsilon_lower(
            canaries=n, guesses=r, correct=v, delta=DELTA, confidence=CONFIDENCE
        ),
        "mahloujifar": lambda n, r, v: mahloujifar.epsilon_lower(
            canaries=n, guesses=r, correct=v, delta=DELTA, confidence=CONFIDENCE
        ),
        "order-statistic": lambda n, r, v: order_statistic.epsilon_lower(
            canaries=n, guesses=r, errors=r - v, delta=DELTA, confidence=CONFIDENCE
        ),
    }
    for mu in (1.0, 2.0):
        truth = gdp.epsilon_from_mu(mu, DELTA)
        for n in (200, 1000, 10000):
            for method, bound in bounds.items():
                guesses = bound_guesses(method, canaries=n, delta=DELTA, confidence=CONFIDENCE)
                right = games(audits, n, mu, guesses, rng)
                values = over(right, lambda v, n=n, r=guesses, b=bound: b(n, r, v))
                rows.append(
                    {
                        "mu": mu,
                        "true_eps": f"{truth:.3f}",
                        "n": n,
                        "bound": method,
                        "guesses": guesses,
                        "mean_eps_lower": f"{values.mean():.3f}",
                        "recovered": f"{values.mean() / truth:.1%}",
                        "above_truth": f"{np.mean(values > truth):.4f}",
                    }
                )
    return rows


def claims(audits: int) -> list[Row]:
    """How often a claimed sigma is refuted at 0.05 and at 0.001, ideal canaries."""
    rows = []
    rng = np.random.default_rng(102)
    single = GaussianProfile(1.0)
    for n in (1000, 10000):
        for ratio in (1.0, 1.1, 1.2, 1.25, 1 / 0.7, 2.0):
            right = games(audits, n, ratio, n // 2, rng)
            for theory, guesses in (
                ("order-statistic", n // 2),
                ("f-dp", f_dp_guesses(single, GaussianProfile(ratio), n)),
            ):
                seen = right if theory == "order-statistic" else games(audits, n, ratio, guesses, rng)
                rows.append(
                    claim_row("single Gaussian, claimed mu = 1", f"{1 / ratio:.3f}", n, guesses, theory, single, seen)
                )
    claimed = pld.dp_sgd_profile(1.0, 0.05, 200)
    for sigma in (1.0, 0.9, 0.8, 0.7, 0.5):
        truth = pld.dp_sgd_profile(sigma, 0.05, 200)
        assert isinstance(truth, DiscreteProfile)
        scores, inside = simulate.from_profile(audits, 1000, truth, rng)
        for theory, guesses in (("order-statistic", 500), ("f-dp", f_dp_guesses(claimed, truth, 1000))):
            right = simulate.right_guesses(scores, inside, guesses - guesses // 2, guesses // 2, rng)
            rows.append(
                claim_row(
                    "DP-SGD, claimed sigma = 1, q = 0.05, T = 200",
                    f"{sigma:.3f}",
                    1000,
                    guesses,
                    theory,
                    claimed,
                    right,
                )
            )
    return rows


def f_dp_guesses(null: Profile, truth: Profile, n: int) -> int:
    """The share of guesses with the smallest p-value at the expected errors."""
    tried = [round(share * n) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)]

    def p(guesses: int) -> float:
        right = guesses - round(expected_errors(truth, n, guesses))
        return mahloujifar.p_value(null, canaries=n, guesses=guesses, correct=right)

    return min(tried, key=p)


def claim_row(claim: str, sigma: str, n: int, guesses: int, theory: str, null: Profile, right: Counts) -> Row:
    """Shares of audits that refute."""
    values = over(right, lambda v: p_value(theory, null, n, guesses, v))
    return {
        "claim": claim,
        "true_sigma_over_claimed": sigma,
        "n": n,
        "guesses": guesses,
        "theory": theory,
        "audits": right.size,
        "refuted_at_0.05": f"{np.mean(values <= 0.05):.4f}",
        "refuted_at_0.001": f"{np.mean(values <= 0.001):.4f}",
        "median_p": f"{np.median(values):.2g}",
    }


def p_value(theory: str, null: Profile, n: int, guesses: int, right: int) -> float:
    """By either theory."""
    if theory == "f-dp":
        return mahloujifar.p_value(null, canaries=n, guesses=guesses, correct=right)
    return order_statistic.p_value(null, canaries=n, guesses=guesses, errors=guesses - right)


def interference(audits: int) -> list[Row]:
    """False refutations of a true claim: canaries that overlap, share batches and states, or share their fate."""
    rows = []
    rng = np.random.default_rng(103)
    n = 400
    for d, shared in ((400, 0.0), (100, 0.0), (20, 0.0), (3, 0.0), (400, 0.2), (400, 0.8)):
        for sigma in (0.5, 1.0, 3.0, 10.0):
            directions = simulate.unit_rows(n, d, shared, rng)
            scores, inside = simulate.meeting(audits, directions, sigma, rng)
            what = f"one noisy sum, {n} directions in {d} dimensions, shared part {shared:g}, sigma {sigma:g}"
            rows += interference_rows(what, "yes", GaussianProfile(1 / sigma), scores, inside, rng)
    for d, shared, gate in ((100, 0.0, 1.0), (400, 0.5, 1.0), (400, 0.0, 0.5), (20, 0.0, 0.3)):
        directions = simulate.unit_rows(n, d, shared, rng)
        scores, inside = simulate.dp_sgd_sums(audits, directions, sigma=0.8, rate=0.2, steps=20, gate=gate, rng=rng)
        what = (
            f"DP-SGD sigma 0.8, q 0.2, T 20: {d} dimensions, shared part {shared:g}, a step counts with chance {gate:g}"
        )
        rows += interference_rows(what, "yes", pld.dp_sgd_profile(0.8, 0.2, 20), scores, inside, rng)
    gauss = GaussianProfile(1.0)
    top = float(gauss.error_above(np.array([0.9]))[0]) / 0.1
    rest = (float(gauss.error_above(np.zeros(1))[0]) - 0.1 * top) / 0.9
    scores, inside = simulate.common_fate(audits, n, [(0.1, top), (0.9, rest)], rng)
    rows += interference_rows(
        "one hidden die for all canaries (a garbled Gaussian, mu 1)", "yes", gauss, scores, inside, rng
    )
    for rho in (0.5, 0.9):
        inside = simulate.coins(audits, n, rng)
        noise = math.sqrt(rho) * rng.normal(size=(audits, 1)) + math.sqrt(1 - rho) * rng.normal(size=(audits, n))
        what = f"noise shared by all canaries, correlation {rho:g}, claimed sigma 1 as if independent"
        rows += interference_rows(what, "no", gauss, noise + inside, inside, rng)
    return rows


def interference_rows(
    what: str,
    true: str,
    null: Profile,
    scores: npt.NDArray[np.float64],
    inside: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> list[Row]:
    """Both theories with half and with a tenth of the canaries guessed."""
    n = scores.shape[1]
    rows: list[Row] = []
    for theory, guesses in (("order-statistic", n // 2), ("order-statistic", n // 10), ("f-dp", n // 10)):
        right = simulate.right_guesses(scores, inside, guesses // 2, guesses - guesses // 2, rng)
        values = over(right, lambda v, t=theory, g=guesses: p_value(t, null, n, g, v))
        alarms = int(np.sum(values <= 0.05))
        chance = 1.0 if alarms == 0 else float(bdtrc(alarms - 1, values.size, 0.05))
        rows.append(
            {
                "canaries": what,
                "claim_true": true,
                "theory": theory,
                "n": n,
                "guesses": guesses,
                "audits": values.size,
                "refuted_at_0.05": f"{alarms / values.size:.4f}",
                "refuted_at_0.01": f"{np.mean(values <= 0.01):.4f}",
                "beyond_level": "-" if true == "no" else ("YES" if chance < 1e-3 else "no"),
            }
        )
    return rows


def timings() -> list[Row]:
    """Cold and warm CPU times of the main bounds."""
    rows: list[Row] = []

    def timed(name: str, function: Callable[[], object]) -> None:
        start = time.process_time()
        function()
        cold = time.process_time() - start
        start = time.process_time()
        function()
        rows.append({"what": name, "cold_s": f"{cold:.4f}", "warm_s": f"{time.process_time() - start:.6f}"})

    at = {"canaries": 10000, "guesses": 5000, "delta": DELTA, "confidence": CONFIDENCE}
    timed("order-statistic, Gaussian, n = 10,000", lambda: order_statistic.epsilon_lower(errors=1000, **at))  # type: ignore[arg-type]
    timed("steinke, n = 10,000", lambda: steinke.epsilon_lower(correct=4000, **at))  # type: ignore[arg-type]
    timed(
        "mahloujifar, Gaussian, n = 10,000, r = 300",
        lambda: mahloujifar.epsilon_lower(canaries=10000, guesses=300, correct=290, delta=DELTA, confidence=CONFIDENCE),
    )
    game = dp_sgd.Ordered(10000, 5000, 1000)
    timed(
        "order-statistic within DP-SGD(q = 0.05, T = 200), n = 10,000",
        lambda: dp_sgd.epsilon_lower(0.05, 200, game, delta=DELTA, confidence=CONFIDENCE),
    )
    from dpaudit.accounting import DpSgd

    event = DpSgd(1.0, 0.05, 200)
    timed(
        "loss distribution of the claim, from the accountant",
        lambda: pld.claimed_profile(event).error_above(np.zeros(1)),
    )
    timed("loss distribution on the search grid", lambda: pld.dp_sgd_profile(1.001, 0.05, 200).error_above(np.zeros(1)))
    return rows


def write(rows: list[Row], path: Path) -> None:
    """A CSV with the rows' keys as header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    write(timings(), options.out / "bounds_timings.csv")
    for name, make in (("recovery", recovery), ("claims", claims), ("interference", interference)):
        started = time.process_time()
        write(make(options.audits), options.out / f"bounds_{name}.csv")
        print(f"{name}: {time.process_time() - started:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
