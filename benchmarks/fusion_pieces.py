"""Two pieces of the token fusion that the published text leaves open, measured on the reference tower.

    python benchmarks/fusion_pieces.py          # writes benchmarks/results/fusion_pieces.json, a few seconds

1. Assignment: of the patches that are neither dominant nor a centre, how many join another centre when the cosine
   compares tokens (the text of Dual-Priv Pruning) in place of keys (VisionZip's code), and how far that moves the fused
   tokens. By synthetic pictures (public), the embedded digits, and any folder given with --data.
2. Fusion noise: standard deviation under the two readings of the text, sigma C / B and sigma C, beside the root mean
   square of a fused token's coordinates, for the default settings of `dpaudit train --method dual-priv`.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dpaudit import atomic
from dpaudit.config import resolve
from trainers import data
from trainers.data.digits import load_digits_vqa
from trainers.plan import fusion_std, make_plan
from trainers.public.synthetic import synthetic_vqa
from trainers.records import Dataset, Pixels
from trainers.reducers import visionzip
from trainers.vlm import VisionLanguageModel

RESULT = Path(__file__).parent / "results" / "fusion_pieces.json"
MOST = 1000


def pictures(dataset: Dataset) -> list[Pixels]:
    """At most a thousand pictures of the training part."""
    return [picture.pixels for unit in dataset.train for picture in unit.pictures][:MOST]


def assignment(model: VisionLanguageModel, pixels: Sequence[Pixels], keep: int, fuse: int) -> dict[str, Any]:
    """Share of assignments that differ, and the relative change of the fused tokens."""
    seen = model.visual_tokens(pixels)
    by_keys, by_tokens = (visionzip(keep, fuse, how)(seen) for how in ("keys", "tokens"))  # type: ignore[arg-type]
    assert by_keys.assignment is not None and by_tokens.assignment is not None
    count = by_keys.assignment.shape[1]
    free = np.ones(count, dtype=bool)
    free[np.arange(0, count, max(1, count // fuse))[:fuse]] = False  # a centre is its own
    differs = (by_keys.assignment != by_tokens.assignment).numpy()[:, free]
    fused = [part.tokens[:, -fuse:] for part in (by_keys, by_tokens)]
    moved = (fused[0] - fused[1]).norm(dim=(1, 2)) / fused[0].norm(dim=(1, 2))
    return {
        "pictures": len(pixels),
        "differing_share": float(differs.mean()),
        "pictures_with_no_difference": float((~differs.any(axis=1)).mean()),
        "relative_change_of_fused": float(moved.median()),
        "fused_rms": float(fused[0].square().mean().sqrt()),
    }


def noise(dataset: Dataset) -> list[dict[str, Any]]:
    """Std of the fusion noise under both readings for eps = 1, 3 and 8."""
    rows = []
    for epsilon in (1.0, 3.0, 8.0):
        config = resolve({"method": "dual-priv"}, [f"privacy.epsilon={epsilon}"])
        plan = make_plan(config, dataset, 0)
        both = {
            how: fusion_std(
                config.model_copy(update={"reducer": config.reducer.model_copy(update={"noise": how})}), plan
            )
            for how in ("mean", "sum")
        }
        rows.append({"epsilon": epsilon, "sigma": plan.noise_multiplier, **both})
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder like ../shared/data/sign_digits_vqa")
    options = parser.parse_args()
    model = VisionLanguageModel.load(None, device="cpu")
    digits = load_digits_vqa()
    sets = {"synthetic": synthetic_vqa("shifted", MOST, seed=11), "digits": digits}
    if options.data is not None:
        files = ["data.train=train.jsonl", "data.test=test.jsonl", "data.train-images=train_images.parquet"]
        files += ["data.test-images=test_images.parquet", f"data.path={options.data}"]
        loaded = data.load(resolve({}, files).data)
        sets[options.data.name] = replace(loaded, name=options.data.name)
    chosen = resolve({"method": "dual-priv"}).reducer
    assert chosen.keep is not None and chosen.fuse is not None
    result = {
        "keep": chosen.keep,
        "fuse": chosen.fuse,
        "assignment": {name: assignment(model, pictures(one), chosen.keep, chosen.fuse) for name, one in sets.items()},
        "noise": noise(digits),
    }
    atomic.write_text(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
