"""Gradient paths, noise and a resumed run on an accelerator; `DPAUDIT_TEST_DEVICE=cpu` plays the same on a CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attacks.training import resume_run, start_run
from dpaudit.config import LoraConfig, ReducerConfig, resolve
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.tiny import random_units, save_tiny_llava
from trainers.ghost import Ghost
from trainers.gradients import Hooks, MicroBatch, UnitSum
from trainers.inputs import UnitInputs
from trainers.noise import Noise
from trainers.progress import Silent, StepReport
from trainers.records import Dataset
from trainers.vlm import VisionLanguageModel

DEVICE = os.environ.get("DPAUDIT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
REDUCERS = [
    ReducerConfig(),
    ReducerConfig(name="random", keep=5),
    ReducerConfig(name="cls-topk", keep=5),
    ReducerConfig(name="visionzip", keep=5, fuse=3),
]
CPU = "cpu"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Without TF32, whose 10 bits of mantissa are no bound for a comparison at 1e-5."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def sums(tiny: Path, device: str, reducer: ReducerConfig, precision: str = "float32") -> dict[str, UnitSum]:
    """The clipped sum of seven units by each gradient path."""
    model = VisionLanguageModel.load(str(tiny), device=device, precision=precision)
    model.set_reducer(reducer)
    parameters = model.attach_lora(LoraConfig(rank=4), generator=np.random.default_rng(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    inputs = UnitInputs(model, random_units(7))
    rows = inputs.select(list(range(7)), key=Key.from_seed(1), step=1, fusion_std=0.1)
    return {kind.__name__: kind(model, parameters)(rows, 1.0) for kind in (MicroBatch, Hooks, Ghost)}


def distance(one: UnitSum, two: UnitSum) -> float:
    """Largest difference over the largest value."""
    pairs = [(one.gradient[name].float().cpu(), two.gradient[name].float().cpu()) for name in one.gradient]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: reducer.name)
def test_paths_agree_on_the_device_and_with_the_cpu(tiny: Path, reducer: ReducerConfig) -> None:
    here, there = sums(tiny, DEVICE, reducer), sums(tiny, CPU, reducer)
    assert max(distance(here[kind], here["MicroBatch"]) for kind in ("Hooks", "Ghost")) <= 1e-5
    assert distance(here["MicroBatch"], there["MicroBatch"]) <= 1e-4  # other kernels, the same sum
    for kind in ("Hooks", "Ghost"):
        torch.testing.assert_close(here[kind].norms, here["MicroBatch"].norms, rtol=1e-5, atol=0)


def test_clipping_holds_in_bfloat16(tiny: Path) -> None:
    """The base in bfloat16, norms and clipping in float32: no unit contributes more than C."""
    for found in sums(tiny, DEVICE, REDUCERS[3], "bfloat16").values():
        assert all(value.dtype == torch.float32 for value in found.gradient.values())
        size = torch.sqrt(torch.stack([value.square().sum() for value in found.gradient.values()]).sum())
        assert float(size) <= 7 * (1 + 1e-5) and bool((found.norms > 1.0).any())


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_the_same_on_every_device_and_drawn_ahead(secure: bool) -> None:
    key, shapes = Key.from_seed(2), {"a": (700, 500), "b": (3,)}
    here = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    ahead = Noise(key, secure=secure, threads=2)
    ahead.draw_ahead(shapes, step=4, std=1.5)
    drawn, plain = ahead.of(here, step=4, std=1.5), Noise(key, secure=secure, threads=1)
    expected = plain.of({name: value.cpu() for name, value in here.items()}, step=4, std=1.5)
    ahead.close()
    for name, value in drawn.items():
        assert value.device.type == DEVICE and torch.equal(value.cpu(), expected[name])


class StopAt(Silent):
    """Ends the training at a step, as a kill would."""

    def step(self, report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["dp-sgd", "dual-priv"])
def test_an_interrupted_run_goes_on_to_the_same_weights_and_ledger(tiny: Path, tmp_path: Path, method: str) -> None:
    words = [f"model.path={tiny}", "seed=1", "training.batch-size=8", "training.steps=8", "model.lora.rank=2"]
    words += [f"model.device={DEVICE}", "training.checkpoint-every=2", "privacy.noise-multiplier=1.0"]
    if method == "dual-priv":
        words += ["reducer.keep=5", "reducer.fuse=3"]
    config = resolve({"method": method}, words)
    data = Dataset("random", "image", random_units(24), random_units(4, seed=9, prefix="t"))
    whole = start_run(config, tmp_path / "whole", dataset=data)
    with pytest.raises(KeyboardInterrupt):
        start_run(config, tmp_path / "cut", dataset=data, reporter=StopAt())
    cut = resume_run(tmp_path / "cut", dataset=data)
    assert cut.ledger.read_bytes() == whole.ledger.read_bytes()
    one, two = (load_file(RunFolder(run.path).model / "adapter_model.safetensors") for run in (whole, cut))
    # Atomic additions of CUDA kernels may change the last bits.
    tolerance = {"rtol": 0.0, "atol": 0.0} if DEVICE == CPU else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], **tolerance)
