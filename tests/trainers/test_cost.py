"""trainers.cost: sizes counted by hand and against the adapter that is attached; no weights are read for them."""

from pathlib import Path

import numpy as np
import pytest

from dpaudit.config import LoraConfig, resolve
from tests.tiny import random_units
from trainers import cost
from trainers.opened import open_checkpoint
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.vlm import VisionLanguageModel

DATA = Dataset("some", "image", random_units(12), random_units(2, prefix="t"))


def test_sizes_are_those_of_the_model(tiny: Path) -> None:
    config = resolve({"model": {"path": str(tiny), "lora": {"rank": 3}}})
    size = cost._Size.of(config, DATA, open_checkpoint(str(tiny)))
    width, inner, layers = 32, 64, 2
    assert (size.width, size.inner, size.layers) == (width, inner, layers)
    assert size.decoder == layers * (4 * width * width + 3 * width * inner)
    assert size.tower == 3 * (4 * width * width + 2 * width * 64)
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    trained = model.attach_lora(LoraConfig(rank=3), generator=np.random.default_rng(0))
    assert size.trained == sum(parameter.numel() for parameter in trained.values())
    assert size.numbers == sum(
        parameter.numel() for name, parameter in model.core.named_parameters() if "lora" not in name
    )
    assert size.visual == 16


def test_a_large_model_is_counted_and_not_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({"model": {"path": str(tiny)}, "training": {"batch_size": 4, "steps": 6}})
    plan, opened = make_plan(config, DATA, 0), open_checkpoint(str(tiny))

    def never(*given: object, **more: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(cost, "MEASURED", 0)
    monkeypatch.setattr(VisionLanguageModel, "load", never)
    monkeypatch.setattr(cost, "_speed", lambda *given: 1e9)
    found = cost.estimate(config, DATA, plan, opened)
    size = cost._Size.of(config, DATA, opened)
    pictures, work = 12, 2 * (2 * size.decoder * size.tokens + 2 * size.head * size.targets)
    work += 2 * 4 * size.tokens**2 * size.width * size.layers  # attention
    assert found.seconds == pytest.approx((2 * size.tower * 16 * pictures + work * 4 * 6) / 1e9)
    assert found.bytes > 4 * size.numbers
    assert found.how.startswith("counted: ")
