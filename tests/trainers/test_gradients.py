"""Per-unit gradients: the fast path equals the loop, the loop equals a single-unit backward, C is never exceeded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import DpauditError
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.ghost import Ghost
from trainers.gradients import GradientPath, Hooks, MicroBatch, Plain, add_sums, clip_factors, sum_per_unit, unit_losses
from trainers.inputs import Rows, UnitInputs
from trainers.rows import AdapterRows
from trainers.vlm import VisionLanguageModel

REDUCERS = [
    ReducerConfig(),
    ReducerConfig(name="random", keep=5),
    ReducerConfig(name="cls-topk", keep=5),
    ReducerConfig(name="visionzip", keep=5, fuse=3),
]


def prepare(
    tiny: Path, reducer: ReducerConfig, *, pictures: int = 1, projector: bool = False, units: int = 7
) -> tuple[VisionLanguageModel, dict[str, nn.Parameter], UnitInputs]:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(reducer)
    parameters = model.attach_lora(LoraConfig(rank=4, projector=projector), generator=np.random.default_rng(0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model, parameters, UnitInputs(model, random_units(units, pictures=pictures))


def adapter_rows(
    model: VisionLanguageModel, parameters: dict[str, nn.Parameter], inputs: UnitInputs, *, private: bool = True
) -> AdapterRows:
    path = AdapterRows.of(model, parameters, inputs, clip_factors if private else None)
    assert path is not None
    return path


def path_of(
    kind: type, model: VisionLanguageModel, parameters: dict[str, nn.Parameter], inputs: UnitInputs
) -> GradientPath:
    return adapter_rows(model, parameters, inputs) if kind is AdapterRows else kind(model, parameters)


def all_rows(inputs: UnitInputs, units: list[int] | None = None) -> Rows:
    return inputs.select(units or list(range(inputs.units)), key=Key.from_seed(1), step=1, fusion_std=0.1)


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: reducer.name)
@pytest.mark.parametrize(("pictures", "projector"), [(1, False), (2, True)])
def test_paths_agree_and_equal_single_unit_backward(
    tiny: Path, reducer: ReducerConfig, pictures: int, projector: bool
) -> None:
    model, parameters, inputs = prepare(tiny, reducer, pictures=pictures, projector=projector)
    rows = all_rows(inputs)
    clip = float(MicroBatch(model, parameters)(rows, 1.0).norms.median())  # some units are clipped, some are not
    slow = MicroBatch(model, parameters)(rows, clip)
    fast = [Hooks(model, parameters)(rows, clip), Ghost(model, parameters)(rows, clip)]
    if projector:  # what stands before the decoder is not computed by rows
        assert AdapterRows.of(model, parameters, inputs) is None
    else:
        fast.append(adapter_rows(model, parameters, inputs)(rows, clip))
    assert 0 < int((slow.norms > clip).sum()) < inputs.units
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for unit in range(inputs.units):
        alone = all_rows(inputs, [unit])
        model.hf.zero_grad()
        torch.autograd.backward(unit_losses(model, alone).sum())
        gradient = {
            name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
        }
        norm = torch.sqrt(sum(value.square().sum() for value in gradient.values()))
        torch.testing.assert_close(norm, slow.norms[unit], rtol=1e-5, atol=0)
        for name, value in gradient.items():
            expected[name] += value * min(1.0, clip / float(norm))
    scale = max(float(value.abs().max()) for value in expected.values())
    for name in parameters:
        assert float((slow.gradient[name] - expected[name]).abs().max()) <= 1e-5 * scale
        for found in fast:
            assert float((found.gradient[name] - expected[name]).abs().max()) <= 1e-5 * scale
    for found in fast:
        torch.testing.assert_close(found.norms, slow.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.losses, slow.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [MicroBatch, Hooks, Ghost, AdapterRows])
def test_one_unit_never_contributes_more_than_c(tiny: Path, kind: type) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[3], pictures=2)
    for clip in (1e-3, 1.0, 1e6):
        for unit in range(inputs.units):
            total = path_of(kind, model, parameters, inputs)(all_rows(inputs, [unit]), clip)
            norm = torch.sqrt(sum(value.square().sum() for value in total.gradient.values()))
            assert float(norm) <= clip * (1 + 1e-5)
            assert float(norm) <= float(total.norms[0]) * (1 + 1e-5), "clipping never scales up"


@pytest.mark.parametrize("kind", [MicroBatch, Hooks, Ghost, AdapterRows])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_unit_that_is_not_finite_contributes_nothing(tiny: Path, kind: type, bad: float) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[0])
    rows = all_rows(inputs)
    rows.tokens[2] = bad
    path = path_of(kind, model, parameters, inputs)
    total = path(rows, 1.0)
    rest = path(all_rows(inputs, [0, 1, 3, 4, 5, 6]), 1.0)
    for name in parameters:
        torch.testing.assert_close(total.gradient[name], rest.gradient[name], rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_pictures_are_refused(tiny: Path) -> None:
    _, _, inputs = prepare(tiny, REDUCERS[0])
    tiles = torch.zeros(3 * inputs.units, 4, 4)  # what a tower adapter gives for three tiles a picture
    with pytest.raises(DpauditError, match="clipping would not be per unit"):
        sum_per_unit("lora_A", tiles, all_rows(inputs))


def test_chunks_and_padding_change_nothing(tiny: Path) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[3], pictures=2)
    whole = Hooks(model, parameters)(all_rows(inputs), 5.0)
    chunks = inputs.chunks(range(inputs.units), 3)
    assert [unit for chunk in chunks for unit in chunk] == list(range(inputs.units)) and len(chunks) == inputs.units
    parts = add_sums([Hooks(model, parameters)(all_rows(inputs, c), 5.0) for c in chunks], parameters, model.device)
    for name in parameters:
        torch.testing.assert_close(parts.gradient[name], whole.gradient[name], rtol=1e-4, atol=1e-6)


def test_plain_is_the_sum_of_unclipped_gradients(tiny: Path) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[0], pictures=2)
    rows = all_rows(inputs)
    unclipped = MicroBatch(model, parameters)(rows, 1e9)
    for plain in (Plain(model, parameters), adapter_rows(model, parameters, inputs, private=False)):
        found = plain(rows, 1.0)
        for name in parameters:
            torch.testing.assert_close(found.gradient[name], unclipped.gradient[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.losses, unclipped.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("private", [True, False])
def test_rows_train_a_part_of_the_adapter_at_the_values_of_the_rest(tiny: Path, private: bool) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[0])
    rows = all_rows(inputs)
    some = {name: value for name, value in parameters.items() if "lora_B" in name and "v_proj" in name}
    found = adapter_rows(model, parameters, inputs, private=private).over(some)(rows, 0.5 if private else 1.0)
    oracle = (MicroBatch(model, parameters) if private else Plain(model, parameters)).over(some)
    expected = oracle(rows, 0.5 if private else 1.0)
    assert set(found.gradient) == set(some)
    for name in some:
        torch.testing.assert_close(found.gradient[name], expected.gradient[name], rtol=1e-4, atol=1e-6)


def test_rows_follow_the_adapter_as_it_is_trained(tiny: Path) -> None:
    model, parameters, inputs = prepare(tiny, REDUCERS[0])
    rows, path = all_rows(inputs), adapter_rows(model, parameters, inputs)
    before = path(rows, 1.0).losses
    with torch.no_grad():
        for value in parameters.values():
            value.mul_(1.5)
    torch.testing.assert_close(path(rows, 1.0).losses, unit_losses(model, rows).detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(path(rows, 1.0).losses, before, rtol=1e-4)


def test_clip_factors_closed_form() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0, float("nan"), float("inf")])
    assert clip_factors(norms, 1.0).tolist() == [1.0, 1.0, 1.0, 0.25, 0.0, 0.0]
