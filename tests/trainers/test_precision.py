"""Frozen models in 4 bits: what is quantised, what stays, and that per-unit gradients and released files stay right."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dpaudit.config import LoraConfig, resolve
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.runs import RunFolder
from tests.commands import run_all
from tests.tiny import random_units, save_tiny_llava
from trainers.gradients import Hooks, MicroBatch
from trainers.inputs import UnitInputs
from trainers.run import load_model
from trainers.vlm import VisionLanguageModel

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one block of 64 weights in all linear layers."""
    return save_tiny_llava(tmp_path_factory.mktemp("wide"), reserved=32, width=64)


@pytest.fixture(scope="module")
def quantised(tiny: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(str(tiny), device="cpu", precision="nf4")


def kinds(model: VisionLanguageModel) -> dict[str, type]:
    return {name: type(module) for name, module in model.core.named_modules() if isinstance(module, torch.nn.Linear)}


def test_the_language_model_s_linear_layers_are_quantised_and_nothing_else(quantised: VisionLanguageModel) -> None:
    found = kinds(quantised)
    inside = {name for name, kind in found.items() if kind is bitsandbytes.nn.Linear4bit}
    assert inside == {name for name in found if "language_model.layers" in name} and inside
    assert quantised.core.get_input_embeddings().weight.dtype == torch.bfloat16
    assert quantised.precision == "nf4" and quantised.dtype == torch.bfloat16


def test_layers_with_parts_of_a_block_stay_as_they_are(tmp_path: Path) -> None:
    narrow = save_tiny_llava(tmp_path, reserved=32, width=32)
    found = kinds(VisionLanguageModel.load(str(narrow), device="cpu", precision="nf4"))
    inside = {name.rpartition(".")[2] for name, kind in found.items() if kind is bitsandbytes.nn.Linear4bit}
    assert inside == {"down_proj"}, "the only one of 64 columns"


def test_quantised_weights_are_the_nearest_of_sixteen_values_of_their_block(
    tiny: Path, quantised: VisionLanguageModel
) -> None:
    """NF4 against its definition: 16 normal quantiles times the largest size of 64 weights."""
    plain = VisionLanguageModel.load(str(tiny), device="cpu")
    name = next(name for name, kind in kinds(quantised).items() if kind is bitsandbytes.nn.Linear4bit)
    exact = plain.core.get_submodule(name).weight.detach().float().reshape(-1)
    layer = quantised.core.get_submodule(name)
    found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().reshape(-1)
    values = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").float()
    block = layer.weight.quant_state.blocksize
    for at in range(0, len(exact), block):
        size = exact[at : at + block].abs().max()
        best = (exact[at : at + block, None] / size - values).abs().amin(dim=1) * size
        # Weights are rounded to bfloat16 before, scales kept in 8 bits (double quantisation).
        assert bool(((found[at : at + block] - exact[at : at + block]).abs() <= best + 0.01 * size).all())
    assert len(set((found[:block] / found[:block].abs().max()).round(decimals=3).tolist())) <= 16


def test_gradients_of_a_unit_are_clipped_exactly_and_equal_on_both_paths(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu", precision="nf4")
    parameters = model.attach_lora(
        LoraConfig(rank=2, alpha=4, targets=("all-linear",)), generator=np.random.default_rng(0)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(parameters.items()):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    units = random_units(3)
    rows = UnitInputs(model, units).select(range(3))
    fresh = Hooks(model, parameters)(rows.unit(0), 0.01).gradient
    model.answer([units[0].pictures[0].pixels], ["which digit is it?"])
    again = Hooks(model, parameters)(rows.unit(0), 0.01).gradient
    assert all(torch.equal(fresh[name], again[name]) for name in parameters), "an answer packs no layer"
    assert all(float(value.abs().max()) > 0 for value in again.values()), "gradients reach every layer"
    hooks, loop = Hooks(model, parameters), MicroBatch(model, parameters)
    for index in range(3):
        found = [path(rows.unit(index), 0.01).gradient for path in (hooks, loop)]
        for gradient in found:
            norm = torch.sqrt(sum((value.square().sum() for value in gradient.values()), torch.zeros(())))
            assert float(norm) == pytest.approx(0.01, rel=1e-5)
        gap = sum(float((found[0][name] - found[1][name]).square().sum()) for name in parameters) ** 0.5
        assert gap < 1e-4, "1 % of the norm: both compute in bfloat16"


def test_all_linear_is_every_linear_layer_of_the_language_model(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    names = {name for name in kinds(model) if "language_model.layers" in name}
    parameters = model.attach_lora(LoraConfig(targets=("all-linear",)), generator=np.random.default_rng(0))
    assert len(parameters) == 2 * len(names)
    adapted = {name for name, module in model.core.named_modules() if hasattr(module, "lora_A")}
    assert adapted == names


@pytest.mark.parametrize("given", ["[all-linear, q_proj]", "linear", "[all_linear]"])
def test_all_linear_stands_alone(given: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"^model\.lora\.targets.*all-linear"):
        config = resolve({}, [f"model.lora.targets={given}"])
        VisionLanguageModel.load(str(tiny), device="cpu").attach_lora(
            config.model.lora, generator=np.random.default_rng(0)
        )


def test_without_bitsandbytes_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(EnvironmentFailure, match=r"^model\.precision: nf4 needs bitsandbytes.*dpaudit\[nf4\]") as error:
        VisionLanguageModel.load(str(tiny), device="cpu", precision="nf4")
    assert "\n" not in str(error.value)


def test_a_released_adapter_fits_the_quantised_base(tiny: Path, tmp_path: Path) -> None:
    """The whole command; what is released is a plain float32 adapter that peft puts on the quantised base."""
    settings = ["model.precision=nf4", "model.lora.targets=all-linear", "model.lora.rank=2", "data.limit=12"]
    steps = ["training.batch-size=6", "training.steps=3", "model.device=cpu"]
    train = [
        "train",
        "--method",
        "dp-sgd",
        "--epsilon",
        "8",
        "--model",
        str(tiny),
        "--out",
        "run",
        "--canaries",
        "20",
        *settings,
        *steps,
    ]
    (done,) = run_all([train], cwd=tmp_path)
    assert done.code == 0, done.stderr
    folder = RunFolder.open(tmp_path / "run")
    tensors = load_file(folder.model / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    ours = load_model(folder, "cpu")
    assert ours.precision == "nf4" and any(float(value.abs().max()) > 0 for value in tensors.values())
    theirs = VisionLanguageModel.load(str(tiny), device="cpu", precision="nf4")
    theirs.set_reducer(ours.reducer_config)
    theirs.hf = PeftModel.from_pretrained(theirs.hf, str(folder.model)).eval()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(3)]
    asked = ["which digit is it?"] * 3
    assert ours.answer(pictures, asked) == theirs.answer(pictures, asked)
