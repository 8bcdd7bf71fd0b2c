"""What leaks if visual tokens of Dual-Priv Pruning leave the trust boundary? On the compact model, as published.

    python benchmarks/release_game.py              # measures what is missing in benchmarks/results/release_game.json
    python benchmarks/release_game.py --only game masks
    python benchmarks/release_game.py --figures    # draws docs/images/fusion-*.svg and fusion-strip.png from it
    python benchmarks/release_game.py --table      # prints the tables of docs/fusion-path.md

The model is the reference model with the settings of `dpaudit train --method dual-priv --epsilon 8` (K = 16 patches and
CLS, 8 fused tokens, fusion noise sigma C / B); the tower is frozen, so its tokens are those of every training run.
Parts, each written as soon as it is there:

game             three pairs of pictures x five values of sigma_fuse, 1,000 draws each of the trainer's own noise
repeats          200 independent games of 400 draws at three values of sigma_fuse: how often is a bound above the truth?
masks            what the positions of the kept patches tell, 200 test pictures
reconstruction   public test pictures rebuilt from released tokens, over sigma_fuse and over z
accounted        accounted fusion (clip to R, noise z R): nine games against 1 / z and 2 / z, and 200 repeats
runs             accuracy with and without `fusion.release=clip-noise`, three seeds each, and the fusion audit of the
                 first seed: every row of the truth table as its test decided it
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from attacks.fusion import published, reconstruction, release
from attacks.fusion.audit import audit_fusion
from attacks.fusion.masks import mask_leak
from attacks.fusion.path import TokenPath
from attacks.fusion.standins import one_patch
from attacks.training import start_run
from dpaudit import accounting, atomic
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import ReleasePair
from dpaudit.randomness import Key
from trainers.data.digits import load_digits_vqa
from trainers.fusion import TokenRelease, public_norms
from trainers.plan import fusion_std, make_plan
from trainers.progress import Live
from trainers.records import Unit
from trainers.run import load_model
from trainers.vlm import VisionLanguageModel

RESULTS = Path(__file__).parent / "results" / "release_game.json"
DELTA, CONFIDENCE = 1e-5, 0.95
REPEATS, REPEATED_DRAWS = 200, 400
MULTIPLIERS = (0.5, 1.0, 2.0)  # z of the games on accounted fusion
PARTS = ("game", "repeats", "masks", "reconstruction", "accounted", "runs")
SEEDS = (1, 2, 3)
# Arms of `runs`: what is set besides the defaults of dual-priv. All claim under zero-out, the relation of a release.
SIGMA = "privacy.noise-multiplier=1.5045"  # of eps = 8 without a release
ARMS: dict[str, tuple[str, ...]] = {
    "nothing leaves": ("privacy.epsilon=8",),
    "z = 1": ("privacy.epsilon=8", "fusion.multiplier=1"),
    "z = 0.03": (SIGMA, "fusion.multiplier=0.03"),
    "z = 0.003": (SIGMA, "fusion.multiplier=0.003"),
}
Row = dict[str, Any]


class Setting:
    """The model, its settings and the pictures of all games."""

    def __init__(self) -> None:
        self.config: RunConfig = resolve({"method": "dual-priv"}, ["model.device=cpu"])
        data = load_digits_vqa()
        plan = make_plan(self.config, data, 0)
        self.mean = fusion_std(self.config, plan)  # sigma C / B, the default
        self.sum = plan.noise_multiplier * plan.max_grad_norm  # sigma C, the paper's other reading
        self.model = VisionLanguageModel.load(device="cpu")
        self.model.set_reducer(self.config.reducer)
        self.parameters = self.model.attach_lora(self.config.model.lora, generator=np.random.default_rng(0))
        self.units = [release.alone(unit, f"unit {place}") for place, unit in enumerate(data.test[:200])]
        norms = public_norms(self.model)
        self.radius = float(f"{norms[len(norms) // 2]:.3g}")  # R: the median of public pictures

    def path(self, seed: int = 0) -> TokenPath:
        """The trainer's token path under a key of its own."""
        return TokenPath.of(self.model, self.parameters, key=Key.from_seed(seed), fusion_std=1.0)

    def pairs(self) -> dict[str, list[Unit]]:
        """Real pictures, a picture and its one-patch neighbour, and the farthest that a search found."""
        first, second = self.units[:2]
        one, two = first.pictures[0].pixels, second.pictures[0].pixels
        ends = release.farthest(self.model, one, two, rng=np.random.default_rng(1), rounds=24)
        return {
            "two pictures": [first, second],
            "one patch inverted": [first, release.alone(first, "patched", one_patch(one))],
            "farthest found": [release.alone(first, f"end {place}", pixels) for place, pixels in enumerate(ends)],
        }


def row_of(pair: ReleasePair, **more: object) -> Row:
    """The figures of one game."""
    bounds = {f"{test.statistic}, {test.bound}": round(float(test.epsilon_lower or 0), 3) for test in pair.tests}
    low, high = float(pair.mu_low or 0), float(pair.mu_high or np.inf)
    return {
        "pair": pair.name,
        **more,
        "std": pair.std,
        "mu": round(float(pair.mu), 4),
        "mu_low": round(low, 4),
        "mu_high": round(high, 4) if np.isfinite(high) else "inf",
        "contained": low <= float(pair.mu) <= high,
        "epsilon": round(float(pair.epsilon), 3) if np.isfinite(float(pair.epsilon)) else "inf",
        "draws": pair.draws,
        "epsilon_lower": bounds,
    }


def game(setting: Setting) -> Row:
    """Every pair at the run's two readings of sigma_fuse and at the three where a game of 1,000 draws can measure."""
    rng, path, rows = np.random.default_rng(2), setting.path(), []
    pairs = {
        name: release.fused_pair(path, units, name, release.fair_coins(release.DRAWS, rng))
        for name, units in setting.pairs().items()
    }
    real = pairs["two pictures"]
    stds = [setting.mean, setting.sum, *(real.distance / mu for mu in reversed(release.CALIBRATED))]
    for name, pair in pairs.items():
        rows += [row_of(release.play(pair, std, delta=DELTA), distance=round(pair.distance, 3)) for std in stds]
        print(name, rows[-1], flush=True)
    noiseless, tokens = release.noiseless_tokens(path, setting.units[0])
    return {
        "sigma_fuse": {"mean": setting.mean, "sum": setting.sum},
        "noiseless_tokens": noiseless,
        "tokens": tokens,
        "rows": rows,
        "contained": f"{sum(row['contained'] for row in rows)} of {len(rows)}",
    }


def tally(counts: dict[str, int], pair: ReleasePair) -> None:
    """Count the bounds above the closed form, and the intervals that hold it."""
    for test in pair.tests:
        name = f"{test.statistic}, {test.bound}"
        counts[name] = counts.get(name, 0) + (float(test.epsilon_lower or 0) > float(pair.epsilon))
    inside = float(pair.mu_low or 0) <= float(pair.mu) <= float(pair.mu_high or np.inf)
    counts["interval misses mu"] = counts.get("interval misses mu", 0) + (not inside)


def repeats(setting: Setting) -> Row:
    """200 games on the real pair, each with fresh coins and a fresh key; one set of noise serves the three sigmas."""
    units, counts = setting.pairs()["two pictures"], {f"{mu:g}": {} for mu in release.CALIBRATED}
    rng = np.random.default_rng(3)
    for repeat in range(REPEATS):
        coins = release.fair_coins(REPEATED_DRAWS, rng)
        pair = release.fused_pair(setting.path(1000 + repeat), units, "two pictures", coins)
        for mu in release.CALIBRATED:
            tally(counts[f"{mu:g}"], release.play(pair, pair.distance / mu, delta=DELTA))
    return {"repeats": REPEATS, "draws": REPEATED_DRAWS, "allowed": 21, "above_the_closed_form": counts}


def masks(setting: Setting) -> Row:
    """Positions of the kept patches alone."""
    pictures = [unit.pictures[0].pixels for unit in setting.units]
    return mask_leak(setting.model, pictures, rng=np.random.default_rng(0)).model_dump()


def fused_only(std: float, fused: int) -> reconstruction.Level:
    """The fused tokens alone, as if CLS and dominant ones stayed inside."""
    noisy = reconstruction.fused_noise(std, fused)
    return replace(
        noisy,
        name=f"fused tokens alone, noise {std:.3g}",
        noise=lambda tokens, stream: [item[-fused:] for item in noisy.noise(tokens, stream)],
    )


def rebuilt(setting: Setting) -> Row:
    """All tokens and the fused ones alone over sigma_fuse, accounted fusion over z; one strip of pictures."""
    corpora = reconstruction.public_corpora(setting.model)
    assert corpora is not None
    fused = setting.model.encoded([setting.units[0].pictures[0].pixels])[0].fused
    typical = setting.radius / np.sqrt(len(corpora[0].tokens[0]))  # norm of one token
    stds = [0.0, setting.mean, setting.sum, float(f"{typical:.2g}"), float(f"{10 * typical:.2g}")]
    everything = {std: reconstruction.fused_noise(std, fused) for std in stds}
    alone = {std: fused_only(std, fused) for std in stds}
    noised = {z: reconstruction.accounted(setting.radius, z) for z in (0.001, 0.003, 0.01, 0.03, 0.1, 1.0)}
    shown = [everything[0.0], everything[setting.sum], everything[stds[-1]], alone[setting.sum], alone[stds[-1]]]
    shown += [noised[z] for z in (0.003, 0.03, 1.0)]
    first = reconstruction.rebuild(*corpora, shown, deep=[everything[0.0].name, everything[setting.sum].name])
    others = [level for level in (*everything.values(), *alone.values(), *noised.values()) if level not in shown]
    rest = reconstruction.rebuild(*corpora, others)
    rows = [*first.rows, *rest.rows[1:]]  # the mean picture once
    return {
        "radius": setting.radius,
        "rows": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.model_dump().items()} for row in rows],
        "strip_caption": first.caption,
        "strip_png_base64": reconstruction.strip_text(first.strip),
    }


def accounted(setting: Setting) -> Row:
    """Three kinds of pairs at three z, and 200 repeats of the pair that reaches the formula, 2 / z, at z = 1."""
    rows, counts, path = [], {}, setting.path()
    for z in MULTIPLIERS:
        mechanism = TokenRelease(setting.radius, z, Key.from_seed(4))
        games = published.pairs(mechanism, path, setting.units, draws=release.DRAWS, seed=int(10 * z))
        played, agrees = published.audit_pairs(mechanism, games, delta=DELTA)
        for pair, (_, relation) in zip(played, games, strict=True):
            allowed = accounting.sensitivity(relation) / z
            rows.append(row_of(pair, z=z, relation=relation, formula=allowed, check=agrees.status))
    end = setting.model.encoded([setting.units[0].pictures[0].pixels])[0].tokens.float()
    rng = np.random.default_rng(5)
    for repeat in range(REPEATS):
        mechanism = TokenRelease(setting.radius, 1.0, Key.from_seed(2000 + repeat))
        coins = release.fair_coins(REPEATED_DRAWS, rng)
        pair = release.published_pair(mechanism, [2 * end, -2 * end], "the two ends of the ball", coins)
        tally(counts, release.play(pair, mechanism.std, delta=DELTA))
    held = f"{sum(row['contained'] for row in rows)} of {len(rows)}"
    return {
        "radius": setting.radius,
        "rows": rows,
        "contained": held,
        "repeats": REPEATS,
        "draws": REPEATED_DRAWS,
        "allowed": 21,
        "above_the_closed_form": counts,
    }


def one_run(setting: Setting, arm: str, seed: int, folder: Path) -> Row:
    """One training, its held-out accuracy, and (first seed of the first two arms) its fusion audit."""
    given = [*ARMS[arm], "privacy.relation=zero-out", f"seed={seed}", "model.device=cpu"]
    if arm != "nothing leaves":
        given += ["fusion.release=clip-noise", f"fusion.radius={setting.radius:g}"]
    config = resolve({"method": "dual-priv"}, given)
    began = time.process_time()
    run = start_run(config, folder, reporter=Live(f"{arm} seed {seed}"))
    test = load_digits_vqa().test
    row: Row = {"arm": arm, "seed": seed, "settings": given, **accuracy(load_model(run, "cpu"), test)}
    row["claim"] = json.loads(run.claim.read_text(encoding="utf-8"))["claim"]["epsilon"]
    row["seconds"] = round(time.process_time() - began)
    if seed == SEEDS[0] and arm in tuple(ARMS)[:2]:
        found = audit_fusion(run)
        row["audit"] = {
            "training": found.training,
            "release": found.release,
            "cases": [case.model_dump() for case in found.cases],
            "checks": [check.model_dump(exclude={"explanation"}) for check in found.checks],
            "sensitivity": [part.model_dump() for part in found.sensitivity],
            "statement": None if found.released is None else found.released.statement,
        }
    return row


def accuracy(model: VisionLanguageModel, test: Sequence[Unit]) -> Row:
    """Exact match on the held-out questions, and how many there were."""
    pictures = [picture for unit in test for picture in unit.pictures]
    pixels = [picture.pixels for picture in pictures for _ in picture.questions]
    questions = [question for picture in pictures for question in picture.questions]
    answers = model.answer(pixels, [question.text for question in questions])
    right = [given.strip() == question.answer for given, question in zip(answers, questions, strict=True)]
    return {"exact_match": round(float(np.mean(right)), 4), "pictures": len(pictures), "questions": len(right)}


def measure(wanted: Sequence[str], out: Path, arms: Sequence[str]) -> None:
    """Whatever is missing, writing after every part and every run."""
    tree: Row = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def write() -> None:
        atomic.make_folder(out.parent)
        atomic.write_text(out, json.dumps(tree, indent=1) + "\n")

    parts: dict[str, Callable[[Setting], Row]] = {
        "game": game,
        "repeats": repeats,
        "masks": masks,
        "reconstruction": rebuilt,
        "accounted": accounted,
    }
    setting = Setting()
    for name in wanted:
        if name in parts and name not in tree:
            began = time.process_time()
            tree[name] = {**parts[name](setting), "seconds": round(time.process_time() - began)}
            write()
            print(f"{name}: {tree[name]['seconds']} s", flush=True)
    if "runs" not in wanted:
        return
    base = resolve({"method": "dual-priv"}, ["model.device=cpu"])
    tree.setdefault("base", accuracy(VisionLanguageModel.load(base.model.path, device="cpu"), load_digits_vqa().test))
    rows = tree.setdefault("runs", [])
    for seed in SEEDS:
        for arm in arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one_run(setting, arm, seed, Path(folder) / "run"))
            write()
            print(arm, seed, rows[-1]["exact_match"], f"{rows[-1]['seconds']} s", flush=True)


def main() -> None:
    """Measure, draw or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figures", action="store_true", help="only draw the figures of docs/fusion-path.md")
    parser.add_argument("--table", action="store_true", help="only print the tables of docs/fusion-path.md")
    options = parser.parse_args()
    if options.figures or options.table:
        from release_figures import draw, tables

        tree = json.loads(options.out.read_text(encoding="utf-8"))
        print(tables(tree)) if options.table else draw(tree)
        return
    measure(options.only, options.out, options.arms)


if __name__ == "__main__":
    main()
