"""Token paths on the tiny random model, correct and planted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from attacks.fusion.path import TokenPath
from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.randomness import Key
from trainers.gradients import GradientPath
from trainers.vlm import VisionLanguageModel

VISIONZIP = ReducerConfig(name="visionzip", keep=5, fuse=3)


def token_path(
    tiny: Path,
    reducer: ReducerConfig = VISIONZIP,
    *,
    fusion_std: float = 0.1,
    gradient: Callable[..., GradientPath] | None = None,
) -> TokenPath:
    """The trainer's own path with random adapter weights (a fresh adapter is zero and would hide what reaches it)."""
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(reducer)
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.1)
    return TokenPath.of(
        model,
        parameters,
        key=Key.from_seed(0),
        fusion_std=fusion_std if reducer.name == "visionzip" else 0.0,
        gradients=[gradient(model, parameters)] if gradient else (),
    )
