"""The language model of a checkpoint as a function of one LoRA adapter *per row*.

A batch is one pass through the frozen weights plus a batched low-rank product, and the gradient of the summed losses
with respect to the per-row adapters is every row's own gradient: no hooks, no second pass. The rows may belong to
different models that share their frozen weights, as reference models do. One more saving that a general implementation
can't make: the last layer is computed at the positions that have a target only.

Written for Llama decoders with rotary positions, which covers the reference model, LLaVA-1.5, Idefics3 and SmolVLM.
`RowModel.of` compares its losses with the model's own before it is used, and returns None where they differ or the
architecture is another one; the caller then takes the ordinary path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpaudit.documents import GradientPathName
from trainers.forward import embed
from trainers.gradients import ClipRule, Gradient, UnitSum, clip_factors, clipped_sum, sum_per_unit
from trainers.inputs import Rows, UnitInputs
from trainers.prompts import IGNORE
from trainers.vlm import Checkpointing, VisionLanguageModel

# Loss of a row, against the model's own: float32 rounding over some layers stays far below.
TOLERANCE = 1e-4
_MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

Adapters = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Layer:
    weights: dict[str, Tensor]
    first_norm: Tensor
    second_norm: Tensor


def _plain(module: Any) -> Any:
    """The frozen linear layer under a PEFT wrapper."""
    return module.base_layer if hasattr(module, "base_layer") else module


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RowModel:
    """Losses of rows under adapters of their own. Build with `of`."""

    def __init__(self, model: VisionLanguageModel, scale: float) -> None:
        self.model = model
        self.scale = scale
        language = model.family.language_model
        config = language.config
        self.layers = [
            _Layer(
                {name: _plain(layer.get_submodule(path)).weight for name, path in _MODULES.items()},
                layer.input_layernorm.weight,
                layer.post_attention_layernorm.weight,
            )
            for layer in language.layers
        ]
        self.last_norm, self.head, self.eps = (
            language.norm.weight,
            model.core.lm_head.weight,
            float(config.rms_norm_eps),
        )
        self.prefix = _prefix(model)
        self.rotary = language.rotary_emb
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    @classmethod
    def of(cls, model: VisionLanguageModel, inputs: UnitInputs) -> "RowModel | None":
        """The row model of a checkpoint with an adapter attached, or None where it would not be the same model.

        Both are compared on two units with a random adapter in place, which is taken out again.
        """
        scale = _scale(model)
        if scale is None or not inputs.units:
            return None
        mine = cls(model, scale)
        rows = inputs.select(range(min(2, inputs.units)))
        parameters = model.adapter_parameters()
        before = {name: value.detach().clone() for name, value in parameters.items()}
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in parameters.values():  # a fresh adapter's B is zero and would show nothing
                noise = torch.randn(value.shape, generator=draw).to(value)
                value.add_(noise, alpha=0.1 * value.shape[1] ** -0.5)
            theirs = model.losses(rows.tokens, rows.packed)
            ours = mine.losses(
                rows, {name: value.float().expand(rows.packed.rows, *value.shape) for name, value in parameters.items()}
            )
            for name, value in parameters.items():
                value.copy_(before[name])
        return mine if torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE) else None

    def losses(self, rows: Rows, adapters: Adapters) -> Tensor:
        """(R,) loss of each row under its own adapter, as `VisionLanguageModel.losses` defines it.

        adapters: "layers.N.MODULE.lora_A.weight" (R, r, in) and "...lora_B.weight" (R, out, r), by the names of the
        model's own adapter; modules without an adapter stay frozen. Gradients flow to the adapters, and to
        `rows.tokens` where these want one.
        """
        packed = rows.packed
        with torch.set_grad_enabled(torch.is_grad_enabled() and rows.tokens.requires_grad):
            x, cos, sin, mask, head = self._start(rows)
            wanted = packed.targets != IGNORE
            most = int(wanted.sum(dim=1).max()) if packed.rows else 0
            order = torch.argsort((~wanted).to(torch.int8), dim=1, stable=True)[:, :most]  # target positions first
            at = order + head
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x = self._attend(index, layer, adapters, x, (cos, sin, mask), at if last else None)
            h = _norm(x, layer.second_norm, self.eps)
            inner = functional.silu(self._linear(index, "gate", h, adapters)) * self._linear(index, "up", h, adapters)
            x = x + self._linear(index, "down", inner, adapters)
        logits = (_norm(x, self.last_norm, self.eps) @ self.head.T).float()
        targets = packed.targets.gather(1, order).clamp(min=0)
        entropy = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return (entropy * packed.weights.gather(1, order) * wanted.gather(1, order)).sum(dim=1)

    def _start(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        embedded = embed(self.model, rows)
        cos, sin = self.rotary(embedded.embeds, embedded.positions[0])
        return embedded.embeds, cos.unsqueeze(1), sin.unsqueeze(1), embedded.mask, embedded.head

    def _linear(self, index: int, name: str, x: Tensor, adapters: Adapters) -> Tensor:
        out = x @ self.layers[index].weights[name].T
        path = f"{self.prefix}layers.{index}.{_MODULES[name]}"
        a = adapters.get(f"{path}.lora_A.weight")
        if a is None:
            return out
        b = adapters[f"{path}.lora_B.weight"]
        return out + (x @ a.transpose(1, 2)) @ (b.transpose(1, 2) * self.scale)

    def _attend(
        self, index: int, layer: _Layer, adapters: Adapters, x: Tensor, where: tuple[Tensor, ...], at: Tensor | None
    ) -> Tensor:
        """Attention with its residual; with `at` (R, n), only these positions ask and come back."""
        cos, sin, mask = where
        h = _norm(x, layer.first_norm, self.eps)
        asking, cos_q, sin_q = h, cos, sin
        if at is not None:
            wide = at.unsqueeze(-1)
            asking, x = (value.gather(1, wide.expand(-1, -1, value.shape[2])) for value in (h, x))
            per_head = wide.unsqueeze(1)
            cos_q, sin_q = (value.gather(2, per_head.expand(-1, 1, -1, self.width)) for value in (cos, sin))
            mask = mask.gather(2, per_head.expand(-1, 1, -1, mask.shape[3]))

        def heads(value: Tensor, count: int) -> Tensor:
            return value.view(value.shape[0], value.shape[1], count, self.width).transpose(1, 2)

        query = _rotate(heads(self._linear(index, "q", asking, adapters), self.heads), cos_q, sin_q)
        key = _rotate(heads(self._linear(index, "k", h, adapters), self.groups), cos, sin)
        value = heads(self._linear(index, "v", h, adapters), self.groups)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.heads != self.groups
        )
        flat = mixed.transpose(1, 2).reshape(x.shape[0], -1, self.heads * self.width)
        return x + self._linear(index, "o", flat, adapters)


def _prefix(model: VisionLanguageModel) -> str:
    """What stands before "layers." in the names of the adapter's parameters ("text_model." in Idefics3)."""
    return next((name.partition("layers.")[0] for name in model.adapter_parameters()), "")


def _scale(model: VisionLanguageModel) -> float | None:
    """LoRA's alpha / r, or None where the model is not one that `RowModel` computes."""
    language = model.family.language_model
    config: Any = getattr(language, "config", None)
    if getattr(config, "model_type", None) != "llama" or config.hidden_act != "silu" or model.family.axes != 1:
        return None
    if model.dtype != torch.float32 or getattr(model.core, "lm_head", None) is None:
        return None
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return None
    layers, prefix = range(len(language.layers)), _prefix(model)
    known = {f"{prefix}layers.{index}.{path}" for index in layers for path in _MODULES.values()}
    adapted = {name.rsplit(".lora_", 1)[0] for name in model.adapter_parameters()}
    if not adapted or not adapted <= known:
        return None
    scales = {
        float(module.scaling[name])
        for module in model.hf.modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for name in module.scaling
    }
    return scales.pop() if len(scales) == 1 else None


def row_gradients(rows: Rows, model: RowModel, adapters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of each row's loss with respect to its own adapter, (R, ...) a parameter, and the losses (R,).

    adapters: (R, ...) a parameter, without gradient.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in adapters.items()}
    losses = model.losses(rows, leaves)
    values = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return dict(zip(leaves, values, strict=True)), losses.detach()


class AdapterRows:
    """Gradient path (trainers.gradients.GradientPath): rows under copies of the adapter, added up per unit, clipped.

    clip: None is training without privacy, the plain sum.
    """

    kind: GradientPathName = "rows"
    checkpointing: Checkpointing = "none"

    def __init__(
        self,
        rows: RowModel,
        adapter: Mapping[str, Tensor],
        clip: ClipRule | None = clip_factors,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """adapter: all of it; parameters: those that a step trains (None: all)."""
        self.rows, self.adapter, self.clip = rows, adapter, clip
        self.parameters = adapter if parameters is None else parameters

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        parameters: Mapping[str, nn.Parameter],
        inputs: UnitInputs,
        clip: ClipRule | None = clip_factors,
    ) -> "AdapterRows | None":
        """The path for this model and adapter; None where `RowModel` does not compute it, or without a unit to try."""
        rows = RowModel.of(model, inputs)
        return None if rows is None else cls(rows, parameters, clip)

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "AdapterRows":
        """The same for a part of the adapter."""
        return AdapterRows(self.rows, self.adapter, self.clip, parameters)

    def per_unit(self, rows: Rows) -> tuple[Gradient, Tensor]:
        """Gradient of each unit before clipping, (U, ...) a parameter, and the units' losses (U,)."""
        leaves = {name: self._spread(value, rows).requires_grad_() for name, value in self.parameters.items()}
        losses = self._losses(rows, leaves)
        values = torch.autograd.grad(losses.sum(), list(leaves.values()))
        found = {name: sum_per_unit(name, value, rows) for name, value in zip(leaves, values, strict=True)}
        return found, self._unit_losses(losses, rows)

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        if self.clip is not None:
            return clipped_sum(*self.per_unit(rows), self.clip, max_grad_norm)
        shared = {name: value.expand(rows.packed.rows, *value.shape) for name, value in self.parameters.items()}
        losses = self._losses(rows, shared)
        values = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        gradient = {name: value.float() for name, value in zip(self.parameters, values, strict=True)}
        units = self._unit_losses(losses, rows)
        return UnitSum(gradient, torch.zeros_like(units), units)

    @staticmethod
    def _spread(value: Tensor, rows: Rows) -> Tensor:
        return value.detach().expand(rows.packed.rows, *value.shape)

    def _losses(self, rows: Rows, trained: Mapping[str, Tensor]) -> Tensor:
        """(R,) losses, each times its share of its unit."""
        rest = {name: self._spread(value, rows) for name, value in self.adapter.items() if name not in trained}
        return self.rows.losses(rows, {**rest, **trained}) * rows.weight

    @staticmethod
    def _unit_losses(losses: Tensor, rows: Rows) -> Tensor:
        losses = losses.detach()
        return torch.zeros(rows.units, dtype=losses.dtype, device=losses.device).index_add(0, rows.owner, losses)
