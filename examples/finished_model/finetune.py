"""A fine-tuning whose owner tossed coins beforehand, so that the finished adapter can be audited.

    python finetune.py                       # records.parquet, coins.csv, adapter/ with eps = 1
    dpaudit audit-model adapter --base reference --records records.parquet --coins coins.csv --epsilon 1 --delta 1e-5

    python finetune.py --bug no-privacy      # neither clipped nor noised, but eps = 1 is claimed all the same: refuted

The base is dpaudit's small reference model. What matters for the audit are the first 30 lines of `main`.
"""

import argparse
import io
import secrets
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dpaudit import accounting
from dpaudit.config import LoraConfig
from trainers.gradients import Hooks, unit_losses
from trainers.inputs import UnitInputs
from trainers.records import Picture, Question, Unit
from trainers.vlm import VisionLanguageModel

RECORDS, STEPS, EPSILON, DELTA, CLIP = 160, 120, 1.0, 1e-5, 1.0
BUGS = ("none", "no-privacy")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_records(words: list[str], rng: np.random.Generator) -> tuple[Unit, ...]:
    """Noise pictures, each with a word that nothing but training can tell."""

    def unit(name: str) -> Unit:
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return Unit(name, (Picture(name, pixels, (Question("what is the code?", str(rng.choice(words))),)),))

    return tuple(unit(f"record-{index:03d}") for index in range(RECORDS))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune, with coins.")
    parser.add_argument("--bug", choices=BUGS, default="none", help="a mistake on purpose")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seed", type=int, default=None, help="repeatable (default: from the operating system)")
    given = parser.parse_args()
    rng = np.random.default_rng(secrets.randbits(128) if given.seed is None else given.seed)
    model = VisionLanguageModel.load(None, device="cpu")
    records = make_records(model.spare_tokens(100), rng)

    # Before the training: one fair toss a record, written down. Heads are trained on, tails are not.
    members = rng.random(len(records)) < 0.5
    rows = [
        {"id": unit.id, "image": png(picture.pixels), "question": asked.text, "answer": asked.answer}
        for unit in records
        for picture in unit.pictures
        for asked in picture.questions
    ]
    pd.DataFrame(rows).to_parquet(given.out / "records.parquet")
    coins = pd.DataFrame({"id": [unit.id for unit in records], "member": members.astype(int)})
    coins.to_csv(given.out / "coins.csv", index=False)

    inside = [unit for unit, head in zip(records, members, strict=True) if head]
    train(model, inside, rng, private=given.bug == "none")
    model.save_adapter(given.out / "adapter")
    print(f"{given.out / 'adapter'}: trained on {len(inside)} of {len(records)} records, claims eps = {EPSILON:g}")


def train(model: VisionLanguageModel, units: list[Unit], rng: np.random.Generator, *, private: bool) -> None:
    """DP gradient descent on all units in every step: clipped per unit, noise for eps = EPSILON after STEPS steps."""
    parameters = model.attach_lora(LoraConfig(rank=8), generator=rng)
    rows = UnitInputs(model, units).select(range(len(units)))
    path = Hooks(model, parameters)
    sigma = accounting.noise_multiplier_for(epsilon=EPSILON, delta=DELTA, sample_rate=1.0, steps=STEPS)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if private:
            total = path(rows, CLIP).gradient
            for name, value in parameters.items():
                noise = torch.tensor(rng.normal(0, sigma * CLIP, tuple(value.shape)), dtype=torch.float32)
                value.grad = (total[name] + noise) / (RECORDS / 2)  # the public size, not the number of heads
        else:
            torch.autograd.backward(unit_losses(model, rows).mean())
        optimizer.step()


if __name__ == "__main__":
    main()
