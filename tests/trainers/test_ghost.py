"""Ghost norms: closed forms, records made against them, layers that they can't follow, and when a run takes them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpaudit.config import LoraConfig, RunConfig, resolve
from dpaudit.errors import DpauditError, UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers import ghost, memory
from trainers.distributed import Alone
from trainers.ghost import Ghost, pairs_pay, squared_norms
from trainers.gradients import Hooks, MicroBatch
from trainers.inputs import Rows, UnitInputs
from trainers.memory import FEW_ROWS, GIB, MOST_ROWS, RowMemory
from trainers.plan import make_plan
from trainers.records import Dataset, Picture, Question, Unit
from trainers.rows import AdapterRows
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

UNITS = random_units(9)


def uneven() -> list[Unit]:
    """Units of one, two and three pictures, with one to three questions each."""
    pictures = [picture for unit in random_units(12, seed=4) for picture in unit.pictures]
    asked = [Question(f"what is {place}?", "an answer " * (place % 3 + 1)) for place in range(3)]
    made, at = [], 0
    for size in (1, 3, 2, 1, 3, 2):
        own = [
            picture.derived(questions=asked[: 1 + (at + n) % 3]) for n, picture in enumerate(pictures[at : at + size])
        ]
        made.append(Unit(f"u{at}", tuple(Picture(f"p{at}-{n}", p.pixels, p.questions) for n, p in enumerate(own))))
        at += size
    return made


def prepare(tiny: Path, rank: int = 4) -> tuple[VisionLanguageModel, dict[str, nn.Parameter]]:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=rank, projector=True), generator=np.random.default_rng(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model, parameters


def size(values: Mapping[str, Tensor]) -> float:
    return float(torch.sqrt(torch.stack([value.double().square().sum() for value in values.values()]).sum()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_both_ways_to_a_norm_are_the_norm(units: int, tokens: int, inputs: int, outputs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(units, tokens, inputs, generator=draw)
    b = torch.randn(units, tokens, outputs, generator=draw)
    truth = torch.stack([(y.double().T @ x.double()).square().sum() for x, y in zip(a, b, strict=True)])
    for pays in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ghost, "pairs_pay", lambda *_, pays=pays: pays)
            patch.setattr(ghost, "AT_ONCE", 1 if seed % 2 else 1 << 26)  # in pieces, or all at once
            torch.testing.assert_close(squared_norms(a, b), truth, rtol=1e-5, atol=1e-6)


def test_pairs_are_taken_where_they_cost_less() -> None:
    """2 T^2 (p + d), twice for float64, against 2 T p d."""
    for tokens, inputs, outputs in ((120, 4096, 128), (20, 4096, 128), (120, 4096, 4096), (600, 4096, 4096), (1, 1, 1)):
        cheaper = 2 * 2 * tokens**2 * (inputs + outputs) < 2 * tokens * inputs * outputs
        assert pairs_pay(tokens, inputs, outputs) == cheaper
    assert not pairs_pay(120, 4096, 128) and pairs_pay(20, 4096, 128) and pairs_pay(120, 4096, 4096)


def test_tokens_that_cancel_hide_nothing() -> None:
    """Large gradients of two tokens that cancel but for a part of 1e-5: pairs in float32 could find no norm at all."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 64, generator=draw), torch.randn(1, 48, generator=draw)
    small = torch.randn(1, 48, generator=draw)
    given, gradient = torch.stack([a, a], 1), torch.stack([1e5 * b, -1e5 * b + small], 1)
    truth = (gradient[0].double().T @ given[0].double()).square().sum()
    assert pairs_pay(2, 64, 48)
    assert float(squared_norms(given, gradient)[0]) == pytest.approx(float(truth), rel=1e-4)
    plain = ((given @ given.mT) * (gradient @ gradient.mT)).sum()
    assert abs(float(plain) / float(truth) - 1) > 0.5, "in float32 it would be wrong, or this test shows nothing"


@pytest.mark.parametrize("pays", [True, False])
def test_units_of_several_rows_in_any_number(tiny: Path, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(ghost, "pairs_pay", lambda *_: pays)
    model, parameters = prepare(tiny)
    rows = UnitInputs(model, uneven()).select(range(6))
    assert rows.packed.rows > 6 and len({int((rows.owner == unit).sum()) for unit in range(6)}) == 3
    slow = MicroBatch(model, parameters)
    clip = float(slow(rows, 1.0).norms.median())
    one, two = slow(rows, clip), Ghost(model, parameters)(rows, clip)
    torch.testing.assert_close(two.norms, one.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-5, atol=1e-6)
    assert size({name: two.gradient[name] - one.gradient[name] for name in parameters}) <= 1e-5 * size(one.gradient)


def test_nothing_is_left_on_the_model(tiny: Path) -> None:
    model, parameters = prepare(tiny)
    rows = UnitInputs(model, UNITS).select(range(3))
    before = [len(module._forward_hooks) for module in model.hf.modules()]
    Ghost(model, parameters)(rows, 1.0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters.values())
    assert [len(module._forward_hooks) for module in model.hf.modules()] == before
    empty = Ghost(model, parameters)(UnitInputs(model, UNITS).select([]), 1.0)
    assert empty.norms.shape == empty.losses.shape == (0,) and size(empty.gradient) == 0.0


def test_what_has_no_norm_here_is_refused(tiny: Path) -> None:
    model, parameters = prepare(tiny)
    rows = UnitInputs(model, UNITS).select(range(3))
    embedding = model.core.get_input_embeddings()
    with pytest.raises(DpauditError, match=r"embedding: it is not the weight of one linear layer; set .*micro-batch"):
        Ghost(model, {**parameters, "embedding": embedding.weight})(rows, 1.0)
    layer = model.family.language_model.layers[0].mlp
    plain = type(layer).forward
    layer.forward = lambda hidden: plain(layer, hidden) + plain(layer, 2 * hidden)  # a layer that is used twice
    with pytest.raises(DpauditError, match=r"its layer is used 2 times in one forward pass.*micro-batch"):
        Ghost(model, parameters)(rows, 1.0)


def peaks(model: VisionLanguageModel, path: Hooks | Ghost, rows: Rows) -> int:
    """Bytes of the largest tensor that a sum makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Watch():
        path(rows, 1.0)
    return largest


def test_no_gradient_of_a_unit_is_made(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus' hooks make nine gradients of each matrix at once, ghost norms none where pieces are small."""
    monkeypatch.setattr(ghost, "AT_ONCE", 1)
    model, parameters = prepare(tiny, rank=64)
    rows = UnitInputs(model, UNITS).select(range(9))
    matrix = max(parameter.numel() for parameter in parameters.values()) * 4
    assert peaks(model, Hooks(model, parameters), rows) >= 9 * matrix
    assert peaks(model, Ghost(model, parameters), rows) < 9 * matrix


def build(tiny: Path, *extra: str, group: Alone | None = None) -> Trainer:
    words = ["training.batch-size=5", "training.steps=2", "privacy.delta=1e-3", "seed=1", f"model.path={tiny}"]
    config: RunConfig = resolve({}, [*words, "model.device=cpu", *extra])
    dataset = Dataset("random", "picture", UNITS, UNITS[:2])
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    plan = make_plan(config, dataset, 0)
    return Trainer.build(config, plan, Key.from_seed(1), model, dataset.train, group=group or Alone())


def test_auto_takes_ghost_norms_where_gradients_leave_room_for_few_rows(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RowMemory(GIB // 100, GIB).ghost_pays(FEW_ROWS - 1.0) and not RowMemory(GIB // 100, GIB).ghost_pays(20)
    assert not RowMemory(GIB, GIB // 2).ghost_pays(1.0), "activations are most of it: nothing is gained"
    wide = ("model.lora.rank=64",)
    for part in ("HIDDEN", "INNER"):  # a model with much larger matrices, whose activations are small beside them
        monkeypatch.setattr(memory, part, 1)
    for extra, expected, checkpointing in (
        ((), AdapterRows, "none"),
        (("training.gradient-path=hooks",), Hooks, "none"),
        (("training.gradient-path=rows",), AdapterRows, "none"),
        (("training.gradient-checkpointing=auto",), Hooks, "reentrant"),
        ((*wide, "training.memory=0.001"), Ghost, "none"),
        ((*wide, "training.memory=0.001", "training.gradient-checkpointing=auto"), Ghost, "non-reentrant"),
        ((*wide, "training.memory=0.001", "training.gradient-checkpointing=reentrant"), Hooks, "reentrant"),
        ((*wide, "training.memory=0.001", "training.rows-at-once=3"), AdapterRows, "none"),
        ((*wide, "training.memory=0.001", "training.gradient-path=hooks"), Hooks, "none"),
        ((*wide, "training.memory=0.001", "training.gradient-path=micro-batch"), MicroBatch, "none"),
        (("training.gradient-path=ghost",), Ghost, "none"),
    ):
        trainer = build(tiny, *extra)
        assert type(trainer.path) is expected and trainer.model.checkpointing == checkpointing, extra
    hooks = build(tiny, *wide, "training.memory=0.001", "training.gradient-path=hooks")
    ours = build(tiny, *wide, "training.memory=0.001")
    assert hooks.rows_at_once < ours.rows_at_once <= MOST_ROWS
    one, two = (trainer.clipped_sum(1, range(9)).gradient for trainer in (hooks, ours))
    assert size({name: one[name] - two[name] for name in one}) <= 1e-5 * size(one)


def test_a_sharded_base_model_has_no_ghost_norms(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("HIDDEN", "INNER"):
        monkeypatch.setattr(memory, part, 1)
    monkeypatch.setattr("trainers.step.shard", lambda *_: None)
    group = Alone()
    group.sharded = True
    with pytest.raises(
        UsageError, match=r"gradient-path: got 'ghost'; accepted: auto, hooks or micro-batch with .*fsdp"
    ):
        build(tiny, "training.gradient-path=ghost", group=group)
    with pytest.raises(
        UsageError, match=r"gradient-path: got 'rows'; accepted: auto, hooks or micro-batch with .*fsdp"
    ):
        build(tiny, "training.gradient-path=rows", group=group)
    few = ("model.lora.rank=64", "training.memory=0.001")
    assert type(build(tiny, *few, group=group).path) is Hooks


@pytest.mark.parametrize(
    "extra",
    [("model.lora.projector=true",), ("model.lora.train=b",)],
    ids=["projector", "b alone"],
)
def test_rows_that_compute_another_model_are_not_chosen_and_are_refused(tiny: Path, extra: tuple[str, ...]) -> None:
    assert type(build(tiny, *extra).path) is Hooks
    with pytest.raises(
        UsageError, match=r"training.gradient-path: got 'rows'; accepted: auto, hooks, ghost or micro-b"
    ):
        build(tiny, *extra, "training.gradient-path=rows")


def test_rows_are_not_computed_in_half_precision(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu", precision="bfloat16")
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    assert AdapterRows.of(model, parameters, UnitInputs(model, UNITS)) is None


def test_rows_are_refused_where_layers_are_to_be_recomputed(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"training.gradient-checkpointing: got 'auto'; accepted: none with this"):
        build(tiny, "training.gradient-path=rows", "training.gradient-checkpointing=auto")
