"""Coverage of every bound under every selection rule, on simulated audits with a known truth.

    python benchmarks/bounds_coverage.py [--audits 2000] [--sizes 200,1000,10000] [--out benchmarks/results]

Writes bounds_coverage.csv. A row fails when its violations exceed the nominal rate beyond Monte-Carlo error (one-sided
binomial, p < 0.001) although the bound's assumption holds. Bounds are memoised on counts; all games of a row are drawn
at once.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bounds_runs import CONFIDENCE, DELTA, runs_rows
from scipy.special import bdtrc

from dpaudit.analysis import simulate
from dpaudit.analysis.plan import bound_guesses
from dpaudit.bounds import dp_sgd, gdp, mahloujifar, order_statistic, pld, steinke
from dpaudit.bounds.profile import epsilon_delta, laplace
from dpaudit.bounds.selection import MonteCarlo, _critical, _smallest_tail, shares_to_guesses

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Draw = Callable[[int, int, np.random.Generator], tuple[Floats, Coins]]

# Shares that data-driven rules choose from; a long recursion makes the f-DP bound slow at many guesses.
SHARES = {"default": (0.02, 0.1, 0.3, 0.5, 1.0), "mahloujifar": (0.01, 0.03, 0.1, 0.2)}


@dataclass(frozen=True)
class Mechanism:
    """truth: eps at DELTA; pure: eps at delta 0 (inf if none); family: the assumptions that hold for it."""

    name: str
    draw: Draw
    truth: float
    pure: float
    family: frozenset[str]


def mechanisms() -> list[Mechanism]:
    """Gaussian (null, 1, 2), tied null, Laplace, randomised response, DP-SGD."""
    both = frozenset({"none", "gaussian", "dp-sgd(q,T)"})
    plain = frozenset({"none"})

    def tied(audits: int, n: int, rng: np.random.Generator) -> tuple[Floats, Coins]:
        return rng.integers(0, 4, (audits, n)).astype(np.float64), simulate.coins(audits, n, rng)

    found = [Mechanism("null, tied scores", tied, 0.0, 0.0, both)]
    for mu in (0.0, 1.0, 2.0):
        found.append(
            Mechanism(
                f"gaussian mu={mu:g}",
                lambda audits, n, rng, mu=mu: simulate.gaussian(audits, n, mu, rng),
                gdp.epsilon_from_mu(mu, DELTA),
                0.0 if mu == 0 else math.inf,
                frozenset({"none", "gaussian"}),
            )
        )
    response, double = epsilon_delta(1.0, 0.0), laplace(1.0)
    sgd = pld.dp_sgd_profile(1.0, 0.05, 200)
    found += [
        Mechanism(
            "laplace eps=1",
            lambda audits, n, rng: simulate.from_profile(audits, n, double, rng),
            1.0 + 2 * math.log1p(-DELTA),
            1.0,
            plain,
        ),
        Mechanism(
            "randomised response eps=1",
            lambda audits, n, rng: simulate.from_profile(audits, n, response, rng),
            math.log(math.e - DELTA * (1 + math.e)),
            1.0,
            plain,
        ),
        Mechanism(
            "dp-sgd sigma=1 q=0.05 T=200",
            lambda audits, n, rng: simulate.from_profile(audits, n, sgd, rng),
            pld.dp_sgd_epsilon(1.0, 0.05, 200, DELTA),
            math.inf,
            frozenset({"none", "dp-sgd(q,T)"}),
        ),
    ]
    return found


# (canaries, guesses, right, confidence) -> eps; each is memoised on counts by its module.
def _ordered(m: int, r: int, v: int, confidence: float) -> float:
    return order_statistic.epsilon_lower(canaries=m, guesses=r, errors=r - v, delta=DELTA, confidence=confidence)


def _sampled(m: int, r: int, v: int, confidence: float) -> float:
    return dp_sgd.epsilon_lower(0.05, 200, dp_sgd.Ordered(m, r, r - v), delta=DELTA, confidence=confidence)


def _one_run(module: str) -> Callable[[int, int, int, float], float]:
    functions = {
        "steinke": steinke.epsilon_lower,
        "f-dp (eps, delta)": mahloujifar.epsilon_lower_any,
        "mahloujifar": mahloujifar.epsilon_lower,
    }
    function = functions[module]

    def bound(m: int, r: int, v: int, confidence: float) -> float:
        return function(canaries=m, guesses=r, correct=v, delta=DELTA, confidence=confidence)

    return bound


ONE_RUN: dict[str, tuple[str, Callable[[int, int, int, float], float]]] = {
    "steinke": ("none", _one_run("steinke")),
    "f-dp (eps, delta)": ("none", _one_run("f-dp (eps, delta)")),
    "mahloujifar": ("gaussian", _one_run("mahloujifar")),
    "order-statistic": ("gaussian", _ordered),
    "order-statistic, dp-sgd": ("dp-sgd(q,T)", _sampled),
}


@dataclass
class Ranked:
    """Right guesses of many games at any number of guesses; found, cleared: (audits, n + 1) running sums."""

    found: npt.NDArray[np.int32]
    cleared: npt.NDArray[np.int32]

    @classmethod
    def of(cls, scores: Floats, inside: Coins, rng: np.random.Generator) -> "Ranked":
        columns = rng.permutation(scores.shape[1])
        order = np.argsort(scores[:, columns], axis=1, kind="stable")
        ranked = np.take_along_axis(inside[:, columns], order, axis=1)
        zero = np.zeros((scores.shape[0], 1), dtype=np.int32)
        found = np.hstack([zero, np.cumsum(ranked[:, ::-1], axis=1, dtype=np.int32)])
        return cls(found, np.hstack([zero, np.cumsum(~ranked, axis=1, dtype=np.int32)]))

    @property
    def n(self) -> int:
        return self.found.shape[1] - 1

    def right(self, top: int, bottom: int) -> npt.NDArray[np.int32]:
        return self.found[:, top] + self.cleared[:, bottom]


def over_counts(bound: Callable[[int], float], right: npt.NDArray[np.int32]) -> Floats:
    """bound(v) for every audit, each distinct count once."""
    values, inverse = np.unique(right, return_inverse=True)
    return np.array([bound(int(v)) for v in values])[inverse]


def one_run_rows(ranked: Ranked, first: Ranked, rest: Ranked, method: str) -> Iterator[tuple[str, Floats]]:
    """(rule, bounds of all audits) for fixed guesses, split and Bonferroni."""
    _, bound = ONE_RUN[method]
    planned = method if method in ("steinke", "mahloujifar") else "order-statistic"
    planned = "steinke" if method.startswith("f-dp") else planned
    n = ranked.n
    guesses = bound_guesses(planned, canaries=n, delta=DELTA, confidence=CONFIDENCE)
    right = ranked.right(guesses - guesses // 2, guesses // 2)
    yield "fixed by plan", over_counts(lambda v: bound(n, guesses, v, CONFIDENCE), right)
    if method.endswith("dp-sgd"):
        return
    shares = SHARES["mahloujifar" if method in ("mahloujifar", "f-dp (eps, delta)") else "default"]
    pairs = shares_to_guesses(n, shares)
    sure = 1 - (1 - CONFIDENCE) / len(pairs)
    each = [over_counts(lambda v, p=pair: bound(n, sum(p), v, sure), ranked.right(*pair)) for pair in pairs]
    yield "bonferroni", np.max(each, axis=0)
    half, other = first.n, rest.n
    choices, reports = [], []
    for top, bottom in shares_to_guesses(half, shares):
        r = top + bottom
        choices.append(over_counts(lambda v, r=r: bound(half, r, v, CONFIDENCE), first.right(top, bottom)))
        a, b = shares_to_guesses(other, (r / half,))[0]
        reports.append(over_counts(lambda v, r=a + b: bound(other, r, v, CONFIDENCE), rest.right(a, b)))
    chosen = np.argmax(choices, axis=0)
    yield "split", np.array(reports)[chosen, np.arange(chosen.size)]


def monte_carlo_violations(ranked: Ranked, truth: float) -> Floats:
    """1 where the Monte-Carlo rule's bound exceeds `truth`: the first grid point at or above it is rejected."""
    rule = MonteCarlo()
    looks = sorted({sum(pair) for pair in shares_to_guesses(ranked.n, rule.shares)})
    seen = np.column_stack([ranked.right(k - k // 2, k // 2) for k in looks]).astype(np.intp)
    eps = math.ceil(round(truth / 0.02, 6)) * 0.02
    critical = _critical(tuple(looks), rule.simulations, rule.seed, CONFIDENCE, round(eps, 6))
    return (_smallest_tail(seen, np.array(looks), eps) < critical).astype(np.float64)


FIELDS = (
    "mechanism",
    "n",
    "game",
    "bound",
    "assumes",
    "inside_family",
    "rule",
    "audits",
    "nominal",
    "violations",
    "rate",
    "mean_bound",
    "truth",
    "ok",
)


class Table:
    """Rows of the result; violations are counted strictly above the truth."""

    def __init__(self, audits: int) -> None:
        self.rows: list[dict[str, object]] = []
        self.audits = audits

    def add(
        self,
        mechanism: Mechanism,
        n: int,
        game: str,
        bound: str,
        assumes: str,
        rule: str,
        values: Floats,
        truth: float,
        mean: bool = True,
    ) -> None:
        violations = int(np.sum(values > truth + 1e-9))
        inside = assumes in mechanism.family
        # P[Binomial(audits, nominal) >= violations]
        chance = 1.0 if violations == 0 else float(bdtrc(violations - 1, values.size, 1 - CONFIDENCE))
        self.rows.append(
            dict(
                zip(
                    FIELDS,
                    (
                        mechanism.name,
                        n,
                        game,
                        bound,
                        assumes,
                        "yes" if inside else "no",
                        rule,
                        values.size,
                        f"{1 - CONFIDENCE:.3f}",
                        violations,
                        f"{violations / values.size:.4f}",
                        f"{np.mean(values):.4f}" if mean else "",
                        f"{truth:.4f}",
                        ("yes" if chance > 1e-3 else "NO") if inside else "outside its family",
                    ),
                    strict=True,
                )
            )
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def chunks(audits: int, n: int) -> Iterator[int]:
    """Audits drawn at once: about 4 million scores."""
    size = max(1, min(audits, 4_000_000 // n))
    for start in range(0, audits, size):
        yield min(size, audits - start)


def measure(mechanism: Mechanism, n: int, audits: int, table: Table) -> None:
    """All one-run and independent-run rows of one mechanism at one size."""
    rng = np.random.default_rng([n, len(mechanism.name), audits])
    parts: list[tuple[Ranked, Ranked, Ranked]] = []
    runs: dict[tuple[str, str], list[Floats]] = {}
    for count in chunks(audits, n):
        scores, inside = mechanism.draw(count, n, rng)
        half = n // 2
        games = (slice(None), slice(0, half), slice(half, None))
        parts.append(tuple(Ranked.of(scores[:, g], inside[:, g], rng) for g in games))  # type: ignore[arg-type]
        members, others = sides(mechanism, count, n // 2, rng)
        for method, rule, values in runs_rows(members, others, 0.5):
            runs.setdefault((method, rule), []).append(values)
    ranked, first, rest = (
        Ranked(np.vstack([p[i].found for p in parts]), np.vstack([p[i].cleared for p in parts])) for i in range(3)
    )
    for method, (assumes, _) in ONE_RUN.items():
        if assumes == "dp-sgd(q,T)" and not mechanism.name.startswith("dp-sgd"):
            continue
        for rule, values in one_run_rows(ranked, first, rest, method):
            table.add(mechanism, n, "one run", method, assumes, rule, values, mechanism.truth)
    if mechanism.pure < math.inf:
        hits = monte_carlo_violations(ranked, mechanism.pure)
        # Only whether the bound passes the truth is computed: 1 counts as above it.
        table.add(
            mechanism,
            n,
            "one run",
            "binomial (delta 0)",
            "none",
            "monte-carlo",
            hits + mechanism.pure - 0.5,
            mechanism.pure,
            mean=False,
        )
    for (method, rule), values in runs.items():
        joined = np.concatenate(values)
        if method == "gdp":
            truth_mu = mu_for(mechanism.truth)
            table.add(mechanism, n, "independent runs", "gdp (mu)", "gaussian", rule, joined, truth_mu)
        else:
            table.add(mechanism, n, "independent runs", method, "none", rule, joined, mechanism.truth)


def sides(mechanism: Mechanism, audits: int, n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Scores of n runs with the record and n without, (audits, n) each."""
    scores, inside = mechanism.draw(audits, 4 * n, rng) if n <= 1000 else mechanism.draw(audits, 3 * n, rng)
    order = np.argsort(~inside, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    # Fair coins give at least n of each kind in 3n or 4n draws but for a vanishing probability.
    assert int(inside.sum(axis=1).min()) >= n and int((~inside).sum(axis=1).min()) >= n
    return ranked[:, :n], ranked[:, ranked.shape[1] - n :]


def mu_for(eps: float) -> float:
    """The mu whose eps at DELTA is `eps`."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if gdp.epsilon_from_mu(middle, DELTA) < eps else (low, middle)
    return high if eps > 0 else 0.0


def main() -> None:
    """Run all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=2000)
    parser.add_argument("--sizes", default="200,1000,10000")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    table = Table(options.audits)
    started = time.process_time()
    for n in (int(size) for size in options.sizes.split(",")):
        for mechanism in mechanisms():
            measure(mechanism, n, options.audits, table)
            print(f"{time.process_time() - started:7.1f} s  n={n}  {mechanism.name}", flush=True)
    table.write(options.out / "bounds_coverage.csv")
    bad = [row for row in table.rows if row["ok"] == "NO"]
    print(f"{len(table.rows)} rows, {len(bad)} beyond their error rate")
    for row in bad:
        print("  ", row)


if __name__ == "__main__":
    main()
