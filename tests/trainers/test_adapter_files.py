"""Adapters of other hands: loaded without PEFT's loader, with the same result; what it must not do is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dpaudit.errors import UsageError
from tests.tiny import random_units, save_tiny_llava
from trainers import adapter_files
from trainers.gradients import unit_losses
from trainers.inputs import UnitInputs
from trainers.vlm import VisionLanguageModel

LANGUAGE = r".*language_model.*\.(q_proj|up_proj)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("base") / "tiny")


def saved(tiny: Path, folder: Path, **settings: Any) -> Path:
    """An adapter with random weights, as PEFT itself saves it."""
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    given = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model.hf, PeftLora(**given))
        torch.manual_seed(0)
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn_like(value))
        wrapped.save_pretrained(str(folder))
    return folder


def losses(model: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return unit_losses(model, UnitInputs(model, random_units(3)).select(range(3)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower"], "layers_to_transform": [1]},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"modules_to_save": ["multi_modal_projector"]},
    ],
    ids=str,
)
def test_an_adapter_gives_what_it_gives_under_peft(tiny: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = saved(tiny, tmp_path / "adapter", **settings)
    ours, theirs, plain = (VisionLanguageModel.load(str(tiny), device="cpu") for _ in range(3))
    ours.load_adapter(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.hf = PeftModel.from_pretrained(theirs.hf, str(folder)).eval()
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(losses(ours), losses(plain), atol=1e-4)
    assert not any(value.requires_grad for value in ours.hf.parameters())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.layers"])
def test_names_of_older_versions_are_understood(tiny: Path, tmp_path: Path, prefix: str) -> None:
    folder = saved(tiny, tmp_path / "adapter")
    now = VisionLanguageModel.load(str(tiny), device="cpu")
    now.load_adapter(folder)
    path = folder / adapter_files.WEIGHTS
    new, old = ("model.language_model.", prefix) if prefix.endswith(".") else ("model.language_model.layers", prefix)
    save_file({name.replace(new, old): value for name, value in load_file(path).items()}, path)
    settings = json.loads((folder / adapter_files.SETTINGS).read_text())
    (folder / adapter_files.SETTINGS).write_text(json.dumps(settings | {"target_modules": ["q_proj", "up_proj"]}))
    then = VisionLanguageModel.load(str(tiny), device="cpu")
    then.load_adapter(folder)
    assert torch.equal(losses(now), losses(then))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "somebody/else"}}, "peft_type: got 'XLORA'; accepted: LORA"),
        ({"peft_type": None}, "peft_type: got None; accepted: LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"megatron_config": {"x": 1}}, "'megatron_config': got"),
        ({"loftq_config": {"loftq_bits": 4}}, "'loftq_config': got"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication': got"),
        ({"adapters": {"a": "hub/id"}}, "'adapters': got"),
        ({"something_new": "x"}, "'something_new': got 'x'; accepted: null"),
        ({"r": 0}, "r: got 0"), ({"r": "8"}, "r: got '8'"), ({"r": 10**9}, "r: got 1000000000"),
        ({"r": 64}, "a rank of 64"),
        ({"r": True}, "r: got True"), ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern: got"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: got"),
        ({"modules_to_save": ["(a+)+$"]}, "modules_to_save: got"), ({"bias": "every"}, "bias: got 'every'"),
        ({"target_modules": 7}, "target_modules: got 7"), ({"target_modules": ["v_proj"]}, "leaves out modules"),
        ({"target_modules": "("}, "a pattern that"), ({"exclude_modules": ["q_proj"]}, "leaves out modules"),
        ({"layers_to_transform": [0]}, "leaves out modules"), ({"rank_pattern": {"up_proj": 2}}, "size mismatch for"),
        ({"r": 2}, "size mismatch for"), ({"r": 3, "rank_pattern": {"q_proj": 4}}, "size mismatch for"),
    ],
)  # fmt: skip
def test_settings_are_taken_by_an_allow_list(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = saved(tiny, tmp_path / "adapter")
    path = folder / adapter_files.SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UsageError) as caught:
        VisionLanguageModel.load(str(tiny), device="cpu").load_adapter(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
