"""What does the path from low-attention patches carry into the model? Fused-region canaries and their counterparts.

    python benchmarks/fused_region.py            # measures what is missing in benchmarks/results/fused_region.json
    python benchmarks/fused_region.py --table    # prints the Markdown table of docs/fusion-path.md

Every candidate shows one public picture with a colour code and asks for the code's word. The code lies on patches of
low attention (reaches the language model through fused tokens) or, in the counterparts, on dominant patches. Fair
coins decide which are trained on. Exposure is the rank of the true word among 64, in bits (6 = memorised); the gain is
that of inserted canaries minus that of those left out. Arms, each on 100 units of the digits with 200 candidates:

visionzip        low-attention patches are merged into 8 fused tokens, as published; non-private
cls-topk         they are dropped: what is left is what the encoder mixes into the kept tokens; non-private
dual-priv        as published, eps = 8

Canaries of all seeds of an arm are joined; the words and coins of each seed are its own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from attacks.canaries import Canary, check_coins
from attacks.fusion.audit import KIND
from attacks.fusion.carried import carried, exposures
from attacks.training import redraw_game, start_run
from dpaudit import atomic
from dpaudit.config import resolve
from dpaudit.documents import LedgerDocument
from dpaudit.randomness import Key
from trainers import data
from trainers.progress import Live
from trainers.run import load_model, read_config

RESULTS = Path(__file__).parent / "results" / "fused_region.json"
COMMON = ("model.device=cpu", "data.limit=100", "canaries.count=200", f"canaries.kinds=[{KIND}]")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "visionzip": ("non-private", ("reducer.name=visionzip",)),
    "cls-topk": ("non-private", ("reducer.name=cls-topk",)),
    "dual-priv": ("dual-priv", ("privacy.epsilon=8",)),
}
Row = dict[str, Any]


def one_run(arm: str, seed: int, folder: Path) -> Row:
    """One training; for every candidate its region, its coin and its exposure."""
    method, settings = ARMS[arm]
    config = resolve({"method": method}, [*COMMON, *settings, f"seed={seed}"])
    began = time.process_time()
    run = start_run(config, folder, reporter=Live(f"{arm} seed {seed}"))
    trained = time.process_time() - began
    config = read_config(run)
    base, tuned = load_model(None, "cpu", config=config), load_model(run, "cpu")
    coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
    game = redraw_game(config, data.load(config.data), Key.load(run.noise_key), base, coins)
    assert game is not None
    game.check_against(coins)
    values = exposures(base, tuned, [canary.unit for canary in game.candidates])
    return {
        "arm": arm,
        "seed": seed,
        "method": method,
        "settings": [*COMMON, *settings],
        "seconds": {"training": round(trained), "all": round(time.process_time() - began)},
        "candidates": [
            [canary.description, canary.member, round(float(value), 4)]
            for canary, value in zip(game.candidates, values, strict=True)
        ],
    }


def summary(rows: list[Row]) -> Row:
    """All candidates of an arm's seeds together."""
    found = [item for row in rows for item in row["candidates"]]
    canaries = [Canary(str(place), KIND, None, member, region) for place, (region, member, _) in enumerate(found)]  # type: ignore[arg-type]
    part = carried(canaries, np.array([value for *_, value in found]))
    assert part is not None
    tree: Row = part.model_dump()
    return {"seeds": [row["seed"] for row in rows], **tree}


def main() -> None:
    """Train what is missing, writing after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the Markdown table of what is there")
    options = parser.parse_args()
    tree: Row = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"runs": []}
    if options.table:
        print(table(tree))
        return
    rows: list[Row] = tree["runs"]
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one_run(arm, seed, Path(folder) / "run"))
            mine = {name: [row for row in rows if row["arm"] == name] for name in ARMS}
            tree["summary"] = {name: summary(found) for name, found in mine.items() if found}
            atomic.write_text(options.out, json.dumps(tree) + "\n")
            print(arm, seed, rows[-1]["seconds"], tree["summary"][arm], flush=True)


def table(tree: Row) -> str:
    """One line an arm and region, and the difference of the two."""
    lines = [
        "| run | code on | inserted, left out | exposure inserted | left out | gain, bits (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    names = {"visionzip": "non-private, fused", "cls-topk": "non-private, dropped", "dual-priv": "Dual-Priv, eps = 8"}
    for arm, part in tree["summary"].items():
        for region in part["regions"]:
            lines.append(
                f"| {names[arm]} | {region['region'].removeprefix('a code in ')} | {region['inserted']}, "
                f"{region['left_out']} | {region['exposure_in']:.2f} | {region['exposure_out']:.2f} | "
                f"{region['gain']:.2f} ({region['gain_low']:.2f} to {region['gain_high']:.2f}) |"
            )
        lines.append(
            f"| {names[arm]} | difference | | | | {part['difference']:.2f} ({part['difference_low']:.2f} to "
            f"{part['difference_high']:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
