"""Shifted copies: their pixels, whom they depend on, and that a unit's gradient is the mean over them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpaudit.config import resolve
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.augmentation import PART, Shifted, augmented, shifted
from trainers.gradients import MicroBatch
from trainers.inputs import UnitInputs
from trainers.plan import Inserted, ledger_rows, make_plan
from trainers.records import Dataset, Unit, pixels_sha256
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel


def reflected(place: int, size: int) -> int:
    """The place inside that a place outside shows: ... 2 1 | 0 1 2 ..."""
    place = -place if place < 0 else place
    return 2 * (size - 1) - place if place >= size else place


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 17), st.integers(8, 17), st.integers(-2, 2), st.integers(-2, 2), st.integers(0, 99))
def test_pixels_against_one_at_a_time(height: int, width: int, down: int, right: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    moved = Shifted(pixels, down, right)
    expected = [
        [pixels[reflected(row - down, height), reflected(column - right, width)] for column in range(width)]
        for row in range(height)
    ]
    np.testing.assert_array_equal(moved.pixels(), np.array(expected))
    assert moved.shape == pixels.shape and moved.sha256 == pixels_sha256(moved.pixels())


def test_copies_follow_from_the_picture_alone() -> None:
    """Every shift is reached, a copy does not change with the units beside it, and the first pictures stay as given."""
    units = random_units(60, pictures=2)
    made = augmented(units, 4)
    alone = [augmented([unit], 4)[0] for unit in units]
    for unit, together, single in zip(units, made, alone, strict=True):
        assert together.pictures[:2] == unit.pictures and len(together.pictures) == 8
        ids = [picture.id for picture in together.pictures]
        assert ids == [picture.id for picture in single.pictures] and len(set(ids)) == 8
        for one, other in zip(together.pictures, single.pictures, strict=True):
            assert one.questions == other.questions
            np.testing.assert_array_equal(one.pixels, other.pixels)
    moves = [picture.images[0] for unit in made for picture in unit.pictures[2:]]
    size = units[0].pictures[0].images[0].shape[0] // PART
    assert {move.down for move in moves} == {move.right for move in moves} == set(range(-size, size + 1))  # type: ignore[union-attr]
    assert augmented(units, 1) is units


def test_pictures_beside_move_too() -> None:
    first, second = random_units(1, pictures=2)[0].pictures
    both = shifted(replace(first, pixels=first.pixels, beside=(second.pixels,)), 1)
    assert len(both.images) == 2 and all(isinstance(image, Shifted) for image in both.images)


def test_a_units_gradient_is_the_mean_over_its_copies(tiny: Path) -> None:
    """Oracle: each copy as a unit of its own, one at a time. And the clipped sum is that of the means."""
    words = [f"model.path={tiny}", "model.lora.rank=2", "training.batch-size=3", "training.steps=2", "model.device=cpu"]
    config = resolve({}, [*words, "training.augmentations=3", "privacy.max-grad-norm=0.05"])
    dataset = Dataset("random", "image", random_units(3, pictures=2), random_units(1, seed=5, prefix="t"))
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    trainer = Trainer.build(config, make_plan(config, dataset, 0), Key.from_seed(1), model, dataset.train)
    with torch.no_grad():
        for name, value in trainer.parameters.items():
            if "lora_B" in name:
                value.copy_(torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, tuple(value.shape))).float())
    path = MicroBatch(model, trainer.parameters)
    total = {name: torch.zeros_like(value) for name, value in trainer.parameters.items()}
    for unit in dataset.train:
        copies = [unit, *(Unit("c", tuple(shifted(own, copy) for own in unit.pictures)) for copy in (1, 2))]
        each = [path.gradient(UnitInputs(model, [copy]).select([0]))[0] for copy in copies]
        mean = {name: torch.stack([one[name] for one in each]).mean(dim=0) for name in total}
        assert float((each[0][next(iter(total))] - each[1][next(iter(total))]).norm()) > 0
        norm = float(torch.sqrt(sum((value.square().sum() for value in mean.values()), torch.zeros(()))))
        assert norm > 0.05
        for name, value in mean.items():
            total[name] += value * (0.05 / norm)
    found = trainer.clipped_sum(1, range(3)).gradient
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_the_ledger_has_a_row() -> None:
    for count in (1, 3):
        config = resolve({}, ["privacy.noise-multiplier=1", "training.batch-size=8", f"training.augmentations={count}"])
        dataset = Dataset("random", "image", random_units(20), random_units(2, seed=5, prefix="t"))
        rows = ledger_rows(config, dataset, make_plan(config, dataset, 0), Inserted())
        mine = [(row.stage, row.status, row.evidence) for row in rows if row.path == "shifted copies"]
        assert mine == [("preprocessing", "per-example preprocessing", "training.augmentations = 3")] * (count > 1)


def test_released_tokens_are_those_of_the_pictures_themselves() -> None:
    words = ["method=dual-priv", "training.augmentations=2", "fusion={release: clip-noise, radius: 5, multiplier: 2}"]
    with pytest.raises(UsageError, match=r"training.augmentations: got 2; accepted: 1 with fusion.release"):
        resolve({}, [*words, "privacy.relation=zero-out"])
