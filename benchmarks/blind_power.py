"""How often the blind baseline finds a planted shift, and how often it raises a false alarm.

    python benchmarks/blind_power.py [--games 100] [--before REVISION] [--out benchmarks/results/blind_power.csv]

Each row: n records, Gaussian columns, fair coins; members are shifted by `auc` in the first `shifted` columns, or (kind
"product") the sign of the product of two columns favours members. --before also plays the games with the baseline of
feature tables (dpaudit/analysis/blind.py) of an earlier revision. `least` is the AUC in one column that the check
prints as found with 80 % power. A third of the games where n is above 1,000.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from dpaudit import atomic, blind

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
SIZES, WIDTHS = (100, 300, 1000, 3000), (5, 50, 200)
# For one, ten and all columns: shifts of this AUC at n = 1,000; at other n scaled so that AUC - 1/2 goes with n**-0.5.
EFFECTS = {"one": 0.60, "ten": 0.55, "all": 0.53}


def game(n: int, columns: int, shifted: int, auc: float, kind: str, rng: np.random.Generator) -> tuple[Floats, Bools]:
    members = rng.random(n) < 0.5
    rows = rng.normal(size=(n, columns))
    if kind == "product":
        # A member's product of two columns is positive with probability `auc`, each column alone stays Gaussian.
        flip = (rng.random(n) < np.where(members, auc, 1 - auc)) != (rows[:, 0] * rows[:, 1] > 0)
        rows[flip, 0] *= -1
    else:
        rows[:, :shifted] += np.sqrt(2) * ndtri(auc) * members[:, None]
    return rows, members


def settings() -> Iterator[tuple[int, int, str, int, float]]:
    for n in SIZES:
        for columns in WIDTHS:
            yield n, columns, "none", 0, 0.5
            for name, auc in EFFECTS.items():
                shifted = {"one": 1, "ten": 10, "all": columns}[name]
                if shifted <= columns:
                    yield n, columns, name, shifted, min(0.5 + (auc - 0.5) * (1000 / n) ** 0.5, 0.95)
            yield n, columns, "product", 2, min(0.5 + 0.1 * (1000 / n) ** 0.5, 0.95)


def earlier(revision: str) -> Callable[[Floats, Bools, np.random.Generator], bool]:
    """The baseline of feature tables of an earlier revision: rejects at its level or not."""
    source = subprocess.run(
        ["git", "show", f"{revision}:dpaudit/analysis/blind.py"], capture_output=True, text=True, check=True
    ).stdout
    module = ModuleType("earlier_blind")
    sys.modules["earlier_blind"] = module
    exec(compile(source, "earlier_blind", "exec"), module.__dict__)
    return lambda rows, members, rng: bool(module.baseline(rows, members, rng=rng).p_value < module.LEVEL)


def play(
    row: tuple[int, int, str, int, float],
    games: int,
    before: Callable[[Floats, Bools, np.random.Generator], bool] | None,
) -> dict[str, object]:
    n, columns, kind, shifted, auc = row
    found = old = 0
    for seed in range(games):
        rng = np.random.default_rng([n, columns, shifted, seed, len(kind)])
        rows, members = game(n, columns, shifted, auc, kind, rng)
        found += blind.baseline(rows, members, rng=rng).beats_chance
        if before is not None:
            old += before(rows, members, rng)
    least = blind.least_auc(columns, n // 2, n - n // 2)
    return {
        "n": n,
        "columns": columns,
        "shift": kind,
        "auc": f"{auc:.3f}",
        "games": games,
        "before": "" if before is None else f"{old / games:.2f}",
        "after": f"{found / games:.2f}",
        "least": "" if least is None else f"{least:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--before", metavar="REVISION")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--columns", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/blind_power.csv"))
    arguments = parser.parse_args()
    before = earlier(arguments.before) if arguments.before else None
    rows = []
    for row in settings():
        if row[0] not in arguments.sizes or row[1] not in arguments.columns:
            continue
        started = time.perf_counter()
        rows.append(play(row, arguments.games if row[0] <= 1000 else arguments.games // 3, before))
        print(*rows[-1].values(), f"{time.perf_counter() - started:.1f} s", flush=True)
    with atomic.replacing(arguments.out) as path, path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
