"""Low-rank adapters through PEFT: which modules, which settings, names, and what is refused.

Only plain LoRA keeps "one gradient a unit" simple: every trained matrix sees each row by itself. What PEFT offers
beyond that is refused with the reason, instead of being trained with clipping that does not mean what the claim says.
"""

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpaudit import online
from dpaudit.config import ALL_LINEAR, LoraConfig
from dpaudit.errors import UsageError, rejected
from trainers import adapter_files
from trainers.families import Family

# Settings of a PEFT adapter that can't be differentiated unit by unit, and why.
UNSUPPORTED = {
    "use_dora": "its magnitude vector divides by a norm of the whole matrix, which per-unit hooks can't follow",
    "modules_to_save": "whole modules would be trained, tied embeddings among them",
    "layer_replication": "a replicated layer uses one weight twice",
    "target_parameters": "parameters without a module of their own have no per-unit gradient",
    "trainable_token_indices": "rows of the embedding would be trained, which is tied to the output layer",
}


def attach(hf: Any, family: Family, config: LoraConfig, generator: np.random.Generator) -> Any:
    """`hf` inside a PEFT model with fresh LoRA, A from `generator`, B zero, both in float32 whatever `hf` computes in.

    Only the language model (and the projector if asked) is adapted: plain target names would also hit the vision tower.
    """
    with online.cut_off():  # it imports bitsandbytes where that is installed (trainers.precision)
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model

    known = targets(hf, family)
    wanted = sorted(known) if config.targets == (ALL_LINEAR,) else config.targets
    names = "|".join(re.escape(name) for name in wanted)
    pattern = rf"{family.language}\.({names})"
    if config.projector:
        pattern = rf"({pattern}|{family.projector})"
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        accepted = f"{ALL_LINEAR}, or some of {sorted(known)} (linear layers inside the language model)"
        raise rejected("model.lora.targets", (missing or [ALL_LINEAR])[0], accepted)
    wide = max(max(m.in_features, m.out_features) for n, m in hf.named_modules() if _adapted(n, m, wanted, family))
    if config.rank > wide:
        raise rejected("model.lora.rank", config.rank, f"at most {wide}, the width of the widest of these layers")
    if config.projector and not any(re.fullmatch(family.projector, name) for name, _ in hf.named_modules()):
        accepted = f"false: the projector of a {family.model_type} is no part that dpaudit trains"
        raise rejected("model.lora.projector", True, accepted)
    adapter = PeftLora(r=config.rank, lora_alpha=config.alpha, target_modules=pattern, lora_dropout=0.0)
    with warnings.catch_warnings():  # peft asks transformers for a name that it calls deprecated
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(hf, adapter, autocast_adapter_dtype=True)
    _check_modules(wrapped, config)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad and "lora_A" in name:
                bound = 1.0 / np.sqrt(parameter.shape[1])
                values = generator.uniform(-bound, bound, size=tuple(parameter.shape))
                parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype))
    if config.train == "b":
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return wrapped


def _adapted(name: str, module: nn.Module, wanted: Collection[str], family: Family) -> bool:
    return (
        isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in wanted
        and re.fullmatch(rf"{family.language}\.\w+", name) is not None
    )


def _check_modules(wrapped: Any, config: LoraConfig) -> None:
    """UsageError where PEFT put an adapter on more than the linear layers that were named, as it does with experts."""
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), nn.Linear):
            shared = sorted(set(config.targets) & {"gate_proj", "up_proj", "down_proj"})
            accepted = "attention layers alone (PEFT would train experts too, which per-unit gradients can't follow)"
            raise rejected("model.lora.targets", (shared or [short_name(name)])[0], accepted)


def targets(hf: Any, family: Family) -> set[str]:
    """Names of the linear layers inside the language model; its output layer, often tied, is not one of them."""
    inside = re.compile(rf"{family.language}\.\w+")
    linear = (name for name, module in hf.named_modules() if isinstance(module, nn.Linear))
    return {name.rsplit(".", 1)[-1] for name in linear if inside.fullmatch(name)}


def load(hf: Any, folder: Path, flag: str = "adapter") -> Any:
    """`hf` with a released PEFT adapter on top; its weights are float32. flag: how an error names the adapter."""
    return adapter_files.load(hf, folder, flag)


def trained(wrapped: Any) -> dict[str, nn.Parameter]:
    """The parameters of the adapter that require a gradient, by short name."""
    return {short_name(name): value for name, value in wrapped.named_parameters() if value.requires_grad}


def made_trainable(wrapped: Any, train: str = "both") -> dict[str, nn.Parameter]:
    """The adapter's parameters by short name, made trainable: for attacks that need gradients of a released model.

    train: which were trained (model.lora.train); A is left out, and fixed, where only B was.

    Raises UsageError for an adapter with settings that per-unit gradients can't follow.
    """
    for settings in getattr(wrapped, "peft_config", {}).values():
        for name, why in UNSUPPORTED.items():
            if getattr(settings, name, None):
                raise UsageError(
                    f"adapter: {name} is not supported where gradients are needed ({why}); audit it by its answers, or "
                    "train plain LoRA"
                )
        if getattr(settings, "bias", "none") != "none" or getattr(settings, "lora_bias", False):
            raise UsageError(
                "adapter: trained biases are not supported where gradients are needed; accepted: bias none"
            )
    fixed = "lora_A" if train == "b" else "nothing"
    found = {
        short_name(name): value for name, value in wrapped.named_parameters() if "lora_" in name and fixed not in name
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def short_name(name: str) -> str:
    """A parameter's name without the wrappers' prefixes, stable across peft versions."""
    for wrapper in ("base_model.model.", "model."):
        name = name.removeprefix(wrapper)
    return name.replace(".default", "").removeprefix("language_model.")
