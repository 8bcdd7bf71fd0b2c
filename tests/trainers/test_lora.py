"""Adapters: where they go, their precision, and what of PEFT is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model

from dpaudit.config import LoraConfig, resolve
from dpaudit.errors import UsageError
from tests.tiny import random_units
from trainers.ghost import Ghost
from trainers.gradients import Hooks, MicroBatch, choose_checkpointing
from trainers.inputs import UnitInputs
from trainers.vlm import VisionLanguageModel


@pytest.mark.parametrize(
    ("setting", "way_out"),
    [
        ("use-dora=true", "higher rank"),
        ("dropout=0.1", "weight-decay"),
        ("lora_dropout=0.1", "weight-decay"),
        ("rank-pattern={q_proj: 4}", "targets"),
        ("alpha-pattern={q_proj: 4}", "targets"),
        ("modules-to-save=[lm_head]", "targets"),
        ("bias=all", "leave it out"),
        ("init-lora-weights=eva", "run's key"),
        ("use-rslora=true", "alpha"),
        ("tower=true", "projector"),
        ("r=4", "called rank"),
        ("target-modules=[q_proj]", "called targets"),
    ],
)
def test_what_peft_has_beyond_plain_lora_is_refused_with_a_way_out(setting: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=way_out) as error:
        resolve({}, [f"model.lora.{setting}"])
    name = setting.split("=")[0].replace("_", "-")
    assert str(error.value).startswith("model.lora: got") and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "out_proj", "fc1", "q_proj.lora_A"])
def test_tied_weights_and_the_tower_are_no_targets(tiny: Path, name: str) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    assert model.core.get_input_embeddings().weight is model.core.lm_head.weight, "tied"
    with pytest.raises(
        UsageError,
        match=rf"^model\.lora\.targets: got '{name}'; accepted: all-linear, or some of \['down_proj', .*'v_proj'\]",
    ):
        model.attach_lora(LoraConfig(targets=("q_proj", name)), generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "trained biases"),
    ],
)
def test_a_foreign_adapter_with_other_weights_has_no_per_unit_gradient(tiny: Path, settings: dict, why: str) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.hf = get_peft_model(model.hf, PeftLora(r=2, target_modules=r".*language_model.*q_proj", **settings))
    with pytest.raises(UsageError, match=f"^adapter: {why}"):
        model.adapter_parameters()


def test_half_precision_leaves_adapters_gradients_and_clipping_in_float32(tiny: Path) -> None:
    exact = VisionLanguageModel.load(str(tiny), device="cpu")
    half = VisionLanguageModel.load(str(tiny), device="cpu", precision="bfloat16")
    assert {value.dtype for value in half.hf.parameters()} == {torch.bfloat16}
    found = []
    for model in (exact, half):
        parameters = model.attach_lora(LoraConfig(rank=4, projector=True), generator=np.random.default_rng(0))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, value in sorted(parameters.items()):
                if "lora_B" in name:
                    value.normal_(0, 0.1)
        assert {value.dtype for value in parameters.values()} == {torch.float32}
        rows = UnitInputs(model, random_units(2)).select(range(2))
        assert rows.tokens.dtype == model.dtype
        for path in (Hooks(model, parameters), MicroBatch(model, parameters), Ghost(model, parameters)):
            alone = [path(rows.unit(index), 0.5) for index in range(2)]
            for total in alone:
                norm = torch.sqrt(sum(value.square().sum() for value in total.gradient.values()))
                assert {value.dtype for value in total.gradient.values()} == {torch.float32}
                assert float(norm) == pytest.approx(0.5, rel=1e-6), "clipped exactly, although half computed"
            found.append(torch.stack([total.losses[0] for total in alone]))
    full, half = found[:3], found[3:]
    for one, two in zip(full, half, strict=True):
        torch.testing.assert_close(one, full[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(two, full[0], rtol=0.02, atol=0)
        assert not torch.equal(one, two)


@pytest.mark.parametrize("kind", [Hooks, MicroBatch, Ghost])
def test_checkpointing_of_the_kind_that_fits_changes_nothing(tiny: Path, kind: type) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    rows = UnitInputs(model, random_units(3, pictures=2)).select(range(3))
    path = kind(model, parameters)
    before = path(rows, 1.0)
    model.set_checkpointing(choose_checkpointing("auto", path))
    assert model.checkpointing == path.checkpointing != "none"
    layers = model.family.language_model.layers
    calls = []
    handle = layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    after = path(rows, 1.0)
    handle.remove()
    passes = {Hooks: 2, MicroBatch: 2 * 3, Ghost: 3}[kind]
    assert len(calls) == passes, "each layer is computed again for each backward pass"
    assert all(torch.equal(before.gradient[name], after.gradient[name]) for name in parameters)
    assert not any(layer.training for layer in layers), "answers go through the cache as ever"
    assert model.answer([np.zeros((32, 32, 3), np.uint8)], ["what?"])


def test_checkpointing_of_the_other_kind_is_refused_with_a_way_out(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    with pytest.raises(
        UsageError, match=r"gradient-checkpointing: got 'non-reentrant'; accepted: auto, reentrant"
    ) as e:
        choose_checkpointing("non-reentrant", Hooks(model, parameters))
    assert "training.gradient-path=micro-batch" in str(e.value)
    with pytest.raises(UsageError, match=r"got 'reentrant'; accepted: auto, non-reentrant .*gradient-path=hooks"):
        choose_checkpointing("reentrant", MicroBatch(model, parameters))
    assert choose_checkpointing("none", Hooks(model, parameters)) == "none"
