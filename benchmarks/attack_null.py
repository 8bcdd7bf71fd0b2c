"""Does any attack refute the claim eps = 0 of a model that never saw the candidates?

    python benchmarks/attack_null.py --sets 4 --coins 50

A set is one target of the embedded model (DP-SGD on 32 units, no candidate among them), 200 candidates of five kinds
and four reference models that trained on candidates by coins of their own. Every attack of the table scores the
candidates once; then fair coins are drawn again and again, as a game draws them, and each attack's test of the claim
"eps = 0" is run with the guesses that a game fixes. Whatever the coins, nothing leaked: an attack at level 5 % may
refute in at most 21 of 200 seeds (the 0.999 quantile of Binomial(200, 0.05)). Two more rows go through the whole
audit: the attack chosen on the development half (the fitted combination among them), and the bounds, of which any
above 0 is wrong. Sets appear in benchmarks/results/attack_null.json as they are done; those there are not run again.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import binom

from attacks.canaries import Plan, draw_game
from attacks.games.members import Settings, report
from attacks.games.reading import bound_tests, claim_tests
from attacks.membership.members import coins as fair_coins
from attacks.membership.stacked import Shared, Trial, losses_under, train_stack
from attacks.membership.table import attacks, score_all
from attacks.membership.view import Access, References, View
from attacks.training import start_run
from dpaudit import atomic
from dpaudit.config import resolve
from dpaudit.documents import Claim
from dpaudit.randomness import Key
from trainers import data
from trainers.plan import make_plan
from trainers.run import load_model

RESULTS = Path(__file__).parent / "results" / "attack_null.json"
SETTINGS = ["model.device=cpu", "data.limit=32", "training.batch-size=24", "training.steps=30", "privacy.epsilon=8"]
KINDS = ("mislabelled", "noise", "new-token", "rendered-code", "high-perplexity")
COUNT, REFERENCES, POPULATION = 200, 4, 60
LEVEL = 0.05
NOTHING = Claim(
    epsilon=0.0, delta=1e-5, relation="add-remove", unit="image", sampling="poisson", noise_multiplier=None,
    sample_rate=None, steps=None, max_grad_norm=None,
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One set: candidates as they were drawn (ids, kinds, plan) and every attack's scores of them."""

    view: View
    plan: Plan
    scores: dict[str, npt.NDArray[np.float64]]


def scored(seed: int) -> Scored:
    """Train, draw, score; a function of the seed."""
    config = resolve({"method": "dp-sgd"}, [*SETTINGS, f"seed={seed}"])
    dataset, key = data.load(config.data), Key.from_seed(1_000_000 + seed)
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(config, Path(folder) / "target")
        target, base = load_model(run, "cpu"), load_model(None, "cpu", config=config)
    tokens = base.spare_tokens(2 * COUNT // len(KINDS))
    game = draw_game(dataset, COUNT, KINDS, key=key, spare_tokens=tokens)
    units = [canary.unit for canary in game.candidates]
    kinds = np.array([canary.kind for canary in game.candidates])
    population = list(dataset.test[:POPULATION])
    shared = Shared.of(
        config, make_plan(config, dataset, COUNT), load_model(None, "cpu", config=config),
        [*dataset.train, *units, *population],
    )  # fmt: skip
    first = len(dataset.train)
    inside = np.stack([fair_coins(Key.from_seed(7000 + 100 * seed + k), COUNT) for k in range(REFERENCES)])
    trials = [
        Trial(Key.from_seed(7000 + 100 * seed + k), np.concatenate([np.arange(first), first + np.flatnonzero(row)]))
        for k, row in enumerate(inside)
    ]
    adapters = train_stack(shared, trials)
    at = [list(range(first, first + COUNT)), list(range(first + COUNT, len(shared.units)))]
    losses = [np.stack([losses_under(shared, adapter, places) for adapter in adapters]) for places in at]
    outside = Access(target, population, adapted=True).loss
    references = References(losses[0], inside, losses[1], np.array(["test"] * len(population)), outside)
    view = View(units, kinds, Access(target, units, adapted=True), Access(base, units, adapted=False), references, seed)
    return Scored(view, game.plan, score_all(view))


def refutations(found: Scored, coins: int, seed: int) -> dict[str, dict[str, int]]:
    """For every attack, and for the choice among them: in how many of `coins` draws is eps = 0 refuted, and how many
    bounds lie above 0."""
    kinds, ids = found.view.kinds, [unit.id for unit in found.view.units]
    names = [*found.scores, CHOSEN]
    out = {name: {"refuted": 0, "bounds_above_0": 0} for name in names}
    for draw in range(coins):
        members = Key.from_seed(10_000 * (seed + 1) + draw).uniform(COUNT, step=0, name="null", purpose="coins") < 0.5
        plan = Plan(found.plan.guesses, tie_seed=draw)
        frame = pd_frame(ids, kinds, members)
        for name, scores in found.scores.items():
            mine = frame.assign(score=scores)
            tests = claim_tests(mine, plan, claim=NOTHING, confidence=0.95, alpha=LEVEL)
            bounds = bound_tests(mine, plan, confidence=0.95, delta=NOTHING.delta)
            _count(out[name], tests, bounds)
        settings = Settings(NOTHING, NOTHING.delta, 0.95, LEVEL)
        part = report(found.view, found.scores, Drawn(frame, plan), settings)  # type: ignore[arg-type]
        decided = [test for test in part.tests if test.p_value is not None]
        _count(out[CHOSEN], decided, [test for test in part.tests if test.p_value is None])
    return out


CHOSEN = "chosen on the development half"


@dataclass(frozen=True)
class Drawn:
    """What `report` reads of a coin file."""

    frame: pd.DataFrame
    plan: Plan


def pd_frame(ids: list[str], kinds: npt.NDArray[np.str_], members: npt.NDArray[np.bool_]) -> pd.DataFrame:
    """The coin file's rows."""
    return pd.DataFrame({"id": ids, "kind": kinds, "member": members})


def _count(row: dict[str, int], tests: object, bounds: object) -> None:
    row["refuted"] += any(test.decides and test.p_value <= LEVEL for test in tests)  # type: ignore[attr-defined]
    row["bounds_above_0"] += any((test.epsilon_lower or 0.0) > 0 for test in bounds)  # type: ignore[attr-defined]


def summary(sets: list[dict[str, object]]) -> dict[str, object]:
    """Per attack, over all sets: seeds, refutations, and what is allowed."""
    seeds = int(sum(one["coins"] for one in sets))  # type: ignore[misc]
    rows: dict[str, dict[str, int]] = {}
    for one in sets:
        for name, row in one["attacks"].items():  # type: ignore[attr-defined]
            total = rows.setdefault(name, {"refuted": 0, "bounds_above_0": 0})
            for key, value in row.items():
                total[key] += value
    return {
        "seeds": seeds,
        "allowed": int(binom.ppf(0.999, seeds, LEVEL)),
        "most_refuted": max(row["refuted"] for row in rows.values()),
        "attacks": rows,
        "not_scored": sorted(set(attacks()) - set(rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--coins", type=int, default=50, help="draws of the coins a set")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tree = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"settings": SETTINGS, "sets": []}
    for seed in range(options.sets):
        if any(one["seed"] == seed for one in tree["sets"]):
            continue
        began = time.process_time()
        found = scored(seed)
        trained = time.process_time() - began
        row = refutations(found, options.coins, seed)
        spent = [round(trained, 1), round(time.process_time() - began - trained, 1)]
        tree["sets"].append({"seed": seed, "coins": options.coins, "attacks": row, "cpu_seconds": spent})
        tree["summary"] = summary(tree["sets"])
        print(json.dumps(tree["summary"]), flush=True)
        atomic.write_text(RESULTS, json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
