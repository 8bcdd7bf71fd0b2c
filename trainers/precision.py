"""What the frozen model is kept and computed in: float32, bfloat16, or 4 bits.

Adapters, gradients, clipping and noise are float32 in every case, so none of this enters the privacy proof: the frozen
model is public, and quantising it is a function of public numbers.
"""

import importlib.util
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dpaudit import online
from dpaudit.errors import EnvironmentFailure, rejected

if TYPE_CHECKING:
    from trainers.opened import Opened

Precision = Literal["float32", "bfloat16", "nf4"]
BLOCK = 64  # weights that share a scale


def computed_in(precision: str) -> torch.dtype:
    """The type of activations, and of every frozen weight that is not quantised."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def settings(opened: "Opened", precision: Precision, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given for it.

    nf4: normal floats of 4 bits, one scale for 64 of them (Dettmers et al. 2023, section 3), for the linear layers of
    the language model. Embeddings, output layer, projector and tower stay in bfloat16, so visual tokens are those of
    `precision=bfloat16`; so do layers whose rows are no whole number of blocks, which bitsandbytes' CPU kernels compute
    wrongly. Raises EnvironmentFailure where bitsandbytes is not installed, UsageError for a model without such layers.
    """
    wanted: dict[str, Any] = {"dtype": computed_in(precision), "config": opened.config}
    if precision != "nf4":
        return wanted
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFailure(
            "model.precision: nf4 needs bitsandbytes, which is not installed: pip install 'dpaudit[nf4]'"
        )
    with online.cut_off():  # where `kernels` is installed it would fetch compiled code by a hub id
        importlib.import_module("bitsandbytes")
    from transformers import BitsAndBytesConfig

    family = opened.family(opened.empty, opened.processor, opened.source or "reference")
    inside = re.compile(family.language + r"\w+")
    linear = {name: module for name, module in opened.empty.named_modules() if isinstance(module, nn.Linear)}
    kept = [name for name, module in linear.items() if not inside.fullmatch(name) or module.in_features % BLOCK]
    if len(kept) == len(linear):
        accepted = f"float32 or bfloat16: this model has no linear layers whose rows are multiples of {BLOCK}"
        raise rejected("model.precision", precision, accepted)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in kept],
    )
    return wanted | {"quantization_config": quantised, "device_map": {"": str(device)}}


def unpacked(hf: Any) -> Any:
    """`hf` whose quantised layers keep the layout that has a gradient.

    On CPUs with AVX512-BF16 bitsandbytes packs a layer's weights for inference at the first forward pass in evaluation
    mode, and its kernel for them has no backward pass: after one answer of the model, gradients through its layers
    would be zero without a word. Evaluation mode is what per-unit gradients are computed in, so that is switched off.
    """
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf
