"""Which recipe of private fine-tuning is hard to beat: schedules, averaging, bias correction, parts of LoRA, clipping.

    python benchmarks/recipes.py choose --work DIR               # learning rates, on public synthetic pictures
    python benchmarks/recipes.py rank --work DIR --data FOLDER   # the ranking on sign_digits_vqa, with what was chosen
    python benchmarks/recipes.py pieces --work DIR --data FOLDER # fusion noise, assignment, and eps = infinity
    python benchmarks/recipes.py longer --work DIR --data FOLDER # two recipes over 20 epochs, eps = 8
    python benchmarks/recipes.py keep --work DIR                 # results/recipes.json
    python benchmarks/recipes.py table                           # the tables of docs/recipes.md

Every cell is one training from the reference model: DP-SGD on 25 visual tokens (CLS, 16 dominant, 8 fused, no fusion
noise, all blocks updated), LoRA of rank 4, expected batch 256, 5 epochs, C = 1, delta = 1e-5. `choose` trains on 1,150
synthetic pictures in a style that the base model has not seen, at eps = 1, one seed, and takes the best learning rate
of each recipe (of equals the smaller). `rank` trains on the photographs of hands with these rates, eps = 1 and 8, three
seeds: the recipe of the defaults and the three that learned most on synthetic pictures. Nothing is chosen on
photographs. Cells are files in DIR, so several processes share the work and an interrupted one goes on.

Exact match of greedy answers on held-out pictures; intervals and paired differences (same seeds, same pictures) are a
bootstrap over seeds and pictures together, 2,000 resamples, 95 %.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
from utility_gain import correct

from dpaudit import atomic
from dpaudit.config import resolve
from dpaudit.randomness import Key
from trainers import data
from trainers.fusion import for_questions
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

RESULT = Path(__file__).parent / "results" / "recipes.json"
COMMON = (
    "model.device=cpu",
    "reducer={name: visionzip, keep: 16, fuse: 8}",
    "training.batch-size=256",
    "training.epochs=5",
    "training.rows-at-once=64",
)
RECIPES: dict[str, tuple[str, ...]] = {
    "cosine, AdamW": (),
    "constant, average 0.8": ("training.schedule=constant", "training.average=0.8"),
    "AdamBC": ("training.optimizer=adambc",),
    "B only (FFA-LoRA)": ("model.lora.train=b",),
    "B and A in turn": ("model.lora.train=alternating",),
    "automatic clipping": ("privacy.clipping=automatic",),
    "half the batch": ("training.batch-size=128",),
    "automatic, B only, average 0.8": (
        "privacy.clipping=automatic",
        "model.lora.train=b",
        "training.schedule=constant",
        "training.average=0.8",
    ),
}
ZEROTH = ("method=dp-zo", "privacy.epsilon=inf", "training.optimizer=sgd", COMMON[0], COMMON[1], "training.epochs=10")
RATES = {"dp-zo, no noise, SGD": (1e-3, 1e-2, 1e-1)}
RATE = (1e-2, 2e-2, 4e-2)
# The pieces of Dual-Priv that the published text leaves open, and the rows without noise: settings, eps of each.
DUAL = ("method=dual-priv", COMMON[0], "training.epochs=5")
PIECES: dict[str, tuple[tuple[str, ...], tuple[float | str, ...]]] = {
    "dual-priv: fusion noise sigma C / B": (DUAL, (8.0, 1.0)),
    "fusion noise sigma C": ((*DUAL, "reducer.noise=sum"), (8.0, 1.0)),
    "no fusion noise": ((*DUAL, "reducer.noise=none"), (8.0, 1.0)),
    "assignment by tokens": ((*DUAL, "reducer.assign=tokens"), (8.0, 1.0)),
    "dual-priv, no gradient noise": (DUAL, ("inf",)),
    "dp-sgd, clipping only": (COMMON, ("inf",)),
    "dp-zo, no noise, SGD": (ZEROTH, ("inf",)),
}
DEFAULT, MOST = "cosine, AdamW", 4  # the recipe of the defaults, and how many are ranked with it
EPSILONS, SEEDS = (8.0, 1.0), (0, 1, 2)
LONGER, EPOCHS = (DEFAULT, "automatic, B only, average 0.8"), 20
Cell = dict[str, Any]


def choices() -> list[Cell]:
    """One seed, eps = 1, every recipe with every rate; zeroth order without noise."""
    zeroth = "dp-zo, no noise, SGD"
    return [
        {"stage": "choose", "recipe": name, "epsilon": 1.0 if name in RECIPES else "inf", "seed": 0, "rate": rate}
        for name in (*RECIPES, zeroth)
        for rate in RATES.get(name, RATE)
    ]


def ranked(cells: Sequence[Cell]) -> list[str]:
    """What is ranked on photographs: the default, then those that learned most on synthetic pictures."""
    best: dict[str, float] = {}
    for cell in cells:
        if cell["recipe"] in RECIPES:
            best[cell["recipe"]] = max(best.get(cell["recipe"], 0.0), float(np.mean(cell["right"])))
    others = sorted((name for name in best if name != DEFAULT), key=lambda name: -best[name])
    return [DEFAULT, *others[: MOST - 1]]


def ranking(chosen: Sequence[Cell]) -> list[Cell]:
    """The base model, then all recipes of a seed before the next seed, one eps after the other."""
    rates = best_rates(chosen)
    base: list[Cell] = [{"stage": "rank", "recipe": "base model", "seed": 0}]
    return base + [
        {"stage": "rank", "recipe": name, "epsilon": epsilon, "seed": seed, "rate": rates[name]}
        for epsilon in EPSILONS
        for seed in SEEDS
        for name in ranked(chosen)
    ]


def pieces(chosen: Sequence[Cell]) -> list[Cell]:
    """All pieces of a seed before the next seed, at the rates of the defaults or as chosen."""
    rates = best_rates(chosen)
    return [
        {"stage": "pieces", "recipe": name, "epsilon": epsilon, "seed": seed, "rate": rates.get(name, 1e-2)}
        for seed in SEEDS
        for name, (_, epsilons) in PIECES.items()
        for epsilon in epsilons
    ]


def longer(chosen: Sequence[Cell]) -> list[Cell]:
    """The default and the best at eps = 8, four times as long, at the same rates."""
    rates = best_rates(chosen)
    return [
        {"stage": "longer", "recipe": name, "epsilon": 8.0, "seed": seed, "rate": rates[name]}
        for seed in SEEDS
        for name in LONGER
    ]


def dataset(stage: str, folder: Path | None) -> Dataset:
    """Public synthetic pictures, or the photographs."""
    if stage == "choose":
        from trainers.public.synthetic import synthetic_vqa

        return synthetic_vqa("shifted", 1150, seed=11)
    files = ["data.train=train.jsonl", "data.test=test.jsonl", "data.train-images=train_images.parquet"]
    files += ["data.test-images=test_images.parquet", f"data.path={folder}"]
    return data.load(resolve({}, files).data)


def play(cell: Cell, chosen: Dataset) -> Cell:
    """Train and answer: which answers are right, picture by picture."""
    began = time.process_time()
    model = VisionLanguageModel.load(None, device="cpu")
    if cell["recipe"] == "base model":
        model.set_reducer(resolve({}, COMMON).reducer)
        right = correct(model, chosen.test)
        return cell | {"right": right.mean(axis=1).tolist(), "seconds": time.process_time() - began}
    recipe = cell["recipe"]
    settings = [*COMMON, *RECIPES[recipe]] if recipe in RECIPES else [*PIECES[recipe][0]]
    settings += [f"privacy.epsilon={cell['epsilon']}", f"training.learning-rate={cell['rate']}"]
    if cell["stage"] == "longer":
        settings.append(f"training.epochs={EPOCHS}")
    config = resolve({}, [*settings, f"seed={cell['seed']}"])
    plan = make_plan(config, chosen, 0)
    trainer = Trainer.build(config, plan, Key.from_seed(cell["seed"]), model, chosen.train)
    for step in range(1, plan.steps + 1):
        batch = plan.sampler.batch(trainer.key, step=step, units=len(chosen.train))
        total = trainer.clipped_sum(step, [int(index) for index in batch])
        trainer.update(step, trainer.noisy_mean(step, total))
    trainer.average.install(trainer.parameters)
    for_questions(model, config)
    right = correct(model, chosen.test)
    seconds = time.process_time() - began
    return cell | {"right": right.mean(axis=1).tolist(), "sigma": plan.noise_multiplier, "seconds": seconds}


def name_of(cell: Cell) -> str:
    """The file of a cell."""
    parts = [str(cell.get(key, "")) for key in ("stage", "recipe", "epsilon", "seed", "rate")]
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in "-".join(parts)) + ".json"


def work(cells: Sequence[Cell], place: Path, folder: Path | None) -> None:
    """Play the cells that nobody has begun with."""
    place.mkdir(parents=True, exist_ok=True)
    chosen = dataset(cells[0]["stage"], folder)
    for cell in cells:
        target = place / name_of(cell)
        try:
            (place / f"{target.name}.begun").touch(exist_ok=False)
        except FileExistsError:
            continue
        done = play(cell, chosen)
        atomic.write_text(target, json.dumps(done))
        print(f"{target.name} {np.mean(done['right']):.4f} in {done['seconds']:.0f} s", flush=True)


def finished(place: Path, stage: str) -> list[Cell]:
    """All finished cells of a stage."""
    cells = (json.loads(path.read_text()) for path in sorted(place.glob(f"{stage}-*.json")))
    return [cell for cell in cells if cell["stage"] == stage]


def best_rates(cells: Sequence[Cell]) -> dict[str, float]:
    """The learning rate with the largest exact match of each recipe; of equals the smaller."""
    found: dict[str, float] = {}
    for name in sorted({str(cell["recipe"]) for cell in cells}):
        mine = sorted((-float(np.mean(cell["right"])), float(cell["rate"])) for cell in cells if cell["recipe"] == name)
        found[name] = mine[0][1]
    return found


def bootstrap(values: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval of (seeds, pictures)."""
    rng = np.random.default_rng(seed)
    seeds, pictures = values.shape
    draws = [
        values[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, pictures, pictures))].mean() for _ in range(2000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def summary(place: Path) -> dict[str, Any]:
    """What is kept: every choice, and the ranking with intervals."""
    chosen, on_photographs, parts = (finished(place, stage) for stage in ("choose", "rank", "pieces"))
    long = finished(place, "longer")

    def rights(name: str, epsilon: float | str | None, among: Sequence[Cell]) -> dict[int, list[float]]:
        mine = [cell for cell in among if cell["recipe"] == name and cell.get("epsilon") == epsilon]
        return {int(cell["seed"]): cell["right"] for cell in sorted(mine, key=lambda cell: int(cell["seed"]))}

    def row(name: str, epsilon: float | str, against: str, among: Sequence[Cell]) -> dict[str, Any] | None:
        own, reference = rights(name, epsilon, among), rights(against, epsilon, among)
        if not own:
            return None
        both = [seed for seed in own if seed in reference]
        difference = None
        if both and name != against:
            difference = bootstrap(
                np.array([own[seed] for seed in both]) - np.array([reference[seed] for seed in both])
            )
        values = np.array(list(own.values()))
        found = {"recipe": name, "epsilon": epsilon, "seeds": len(own), "exact": bootstrap(values)}
        return found | {"difference": difference}

    base = rights("base model", None, on_photographs)
    rows = [row(name, epsilon, DEFAULT, on_photographs) for epsilon in EPSILONS for name in ranked(chosen)]
    first = next(iter(PIECES))
    pieces_rows = [row(name, epsilon, first, parts) for name, (_, epsilons) in PIECES.items() for epsilon in epsilons]
    longer_rows = [row(name, 8.0, DEFAULT, long) for name in LONGER]
    return {
        "common": list(COMMON),
        "recipes": {name: list(settings) for name, settings in RECIPES.items()},
        "choices": [
            {**{k: cell[k] for k in ("recipe", "rate")}, "exact": float(np.mean(cell["right"]))} for cell in chosen
        ],
        "rates": best_rates(chosen),
        "base": bootstrap(np.array(list(base.values()))) if base else None,
        "sigma": {str(cell["epsilon"]): cell["sigma"] for cell in on_photographs if "sigma" in cell},
        "rows": [found for found in rows if found is not None],
        "pieces": [found for found in pieces_rows if found is not None],
        "longer": [found for found in longer_rows if found is not None],
        "cpu_seconds": round(sum(cell["seconds"] for cell in [*chosen, *on_photographs, *parts, *long])),
        "machine": f"{platform.machine()}, one thread a cell",
    }


def _percent(found: Sequence[float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (100 * item for item in found)
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: the choice, then the ranking."""
    lines = [
        "| recipe | " + " | ".join(["learning rate: exact match, %", "", ""]) + " | chosen |",
        "|---|---|---|---|---|",
    ]
    for name in result["rates"]:
        mine = sorted((c["rate"], c["exact"]) for c in result["choices"] if c["recipe"] == name)
        if mine:
            shown = [f"{rate:g}: {100 * exact:.1f}" for rate, exact in mine]
            cells = " | ".join([*shown, *[""] * (3 - len(shown))])
            lines.append(f"| {name} | {cells} | {result['rates'][name]:g} |")
    lines += ["", "| recipe | eps | seeds | exact match, % | minus the first line, points |", "|---|---|---|---|---|"]
    if result["base"] is not None:
        lines.append(f"| base model | | | {_percent(result['base'])} | |")
    for row in result["rows"] + result["pieces"] + result["longer"]:
        difference = "" if row["difference"] is None else _percent(row["difference"], signed=True)
        epsilon = str(row["epsilon"]).removesuffix(".0")
        shown = (row["recipe"], epsilon, str(row["seeds"]), _percent(row["exact"]), difference)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("choose", "rank", "pieces", "longer", "keep", "table"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.stage == "choose":
        work(choices(), options.work, None)
    elif options.stage in ("rank", "pieces", "longer"):
        cells = {"rank": ranking, "pieces": pieces, "longer": longer}[options.stage]
        work(cells(finished(options.work, "choose")), options.work, options.data)
    elif options.stage == "keep":
        atomic.write_text(RESULT, json.dumps(summary(options.work), indent=1) + "\n")
    else:
        print(table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
