"""The bound on a physical batch's memory against what autograd saves, and the physical batches that follow from it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpaudit.config import LoraConfig, resolve
from dpaudit.randomness import Key
from tests.tiny import random_units
from tests.tiny_families import TINY
from trainers.gradients import GradientPath, Hooks, MicroBatch, Plain, unit_losses
from trainers.inputs import Rows, UnitInputs
from trainers.memory import GIB, MOST_ROWS, RowMemory, row_memory, rows_at_once
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.rows import AdapterRows
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

UNITS = random_units(6)


def saved(model: VisionLanguageModel, inputs: UnitInputs, forward: Callable[[Rows], object]) -> tuple[int, int]:
    """(bytes that autograd keeps for the backward pass of all units, without the weights; rows)."""
    kept: dict[int, int] = {}
    weights = {value.untyped_storage().data_ptr() for value in model.hf.parameters()}
    alive = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        alive.append(value)  # else another tensor could take its place in memory
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    rows = inputs.select(range(inputs.units))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        forward(rows)
    return sum(kept.values()), rows.packed.rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["reference", *TINY])
def test_the_bound_holds_and_is_not_far_off(name: str, precision: str, tmp_path: Path) -> None:
    folder = None if name == "reference" else str(TINY[name](tmp_path))
    model = VisionLanguageModel.load(folder, device="cpu", precision=precision)  # type: ignore[arg-type]
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    chosen = LoraConfig(rank=4, targets=attention) if "moe" in name else LoraConfig(rank=4)
    parameters = model.attach_lora(chosen, generator=np.random.default_rng(0))
    inputs = UnitInputs(model, UNITS)
    found, rows = saved(model, inputs, lambda rows: unit_losses(model, rows))
    bound = row_memory(model, parameters, Plain(model, parameters), longest=inputs.longest, answers=inputs.answers)
    assert found <= bound.total * rows
    assert bound.total * rows <= 1.8 * found  # rows shorter than the longest are counted as if they were as long


@pytest.mark.parametrize("name", ["reference", *TINY])
def test_the_bound_holds_for_one_adapter_a_row(name: str, tmp_path: Path) -> None:
    model = VisionLanguageModel.load(None if name == "reference" else str(TINY[name](tmp_path)), device="cpu")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    chosen = LoraConfig(rank=4, targets=attention) if "moe" in name else LoraConfig(rank=4)
    parameters = model.attach_lora(chosen, generator=np.random.default_rng(0))
    inputs = UnitInputs(model, UNITS)
    path = AdapterRows.of(model, parameters, inputs)
    if path is None:
        assert name not in ("reference", "llava", "llava-siglip", "idefics3", "smolvlm")
        return
    found, rows = saved(model, inputs, lambda rows: path._losses(rows, {
        key: value.detach().expand(rows.packed.rows, *value.shape).requires_grad_() for key, value in parameters.items()
    }))  # fmt: skip
    bound = row_memory(model, parameters, path, longest=inputs.longest, answers=inputs.answers)
    assert bound.gradients == 4 * sum(value.numel() for value in parameters.values())
    assert found <= bound.total * rows


def test_gradients_a_row_come_with_hooks_alone(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=4), generator=np.random.default_rng(0))
    numbers = sum(value.numel() for value in parameters.values())
    paths: list[GradientPath | None] = [Hooks(model, parameters), Plain(model, parameters), None]
    hooks, plain, forward = (row_memory(model, parameters, path, longest=50, answers=5) for path in paths)
    assert hooks.gradients == 4 * numbers and plain.gradients == forward.gradients == 0
    assert hooks.activations == plain.activations > forward.activations
    model.set_checkpointing("reentrant")
    again = row_memory(model, parameters, Hooks(model, parameters), longest=50, answers=5)
    assert forward.activations < again.activations < hooks.activations and again.gradients == hooks.gradients
    wide = row_memory(model, parameters, None, longest=100, answers=5)
    assert wide.activations > forward.activations
    given = {"longest": 50, "answers": 5, "gib": 1e-9}
    assert rows_at_once("auto", model, parameters, Hooks(model, parameters), **given) == 1
    assert rows_at_once(7, model, parameters, Hooks(model, parameters), **given) == 7
    assert rows_at_once("auto", model, parameters, MicroBatch(model, parameters), **given) == MOST_ROWS
    assert RowMemory(GIB // 8, GIB // 8).rows(1.0) == 4 and RowMemory(1, 1).rows(1.0) == MOST_ROWS


def test_a_small_memory_makes_small_batches_and_the_same_sum(tiny: Path) -> None:
    def build(*extra: str) -> Trainer:
        settings = ["training.batch-size=5", "training.steps=2", "model.lora.rank=2", "privacy.delta=1e-3", "seed=1"]
        config = resolve({}, [f"model.path={tiny}", "model.device=cpu", *settings, *extra])
        dataset = Dataset("random", "picture", UNITS, UNITS[:2])
        model = VisionLanguageModel.load(str(tiny), device="cpu")
        return Trainer.build(config, make_plan(config, dataset, 0), Key.from_seed(1), model, dataset.train)

    whole, small = build(), build("training.memory=1e-6")
    assert (whole.rows_at_once, small.rows_at_once) == (MOST_ROWS, 1)
    one, two = (trainer.clipped_sum(1, range(6)).gradient for trainer in (whole, small))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-6)
