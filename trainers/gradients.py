"""Sums of per-unit clipped gradients, in several ways.

`MicroBatch` runs one unit at a time (forward, backward, clip, add): exact by construction, least memory, the oracle.
`Hooks` lets Opacus compute one gradient a row in a single backward pass; rows of one unit are added before clipping.
`trainers.ghost.Ghost` makes no gradient of a unit at all: two backward passes, for adapters that are too large for one
gradient a row. `trainers.rows.AdapterRows` computes Llama decoders without hooks, every row under its own copy of the
adapter. `Plain` is the unclipped sum, for training without privacy. The other four agree to 1e-5 (tested).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dpaudit.documents import GradientPathName
from dpaudit.errors import DpauditError, rejected
from trainers.inputs import Rows
from trainers.vlm import Checkpointing, VisionLanguageModel

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class UnitSum:
    """Sum over units of clipped gradients (float32, one tensor a parameter), with each unit's norm and loss.

    norms: (U,) before clipping; losses: (U,). Both are exact statistics of private data: never release them.
    """

    gradient: Gradient
    norms: Tensor
    losses: Tensor


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """(U,) factors min(1, C / norm), never above 1; 0 for a unit whose norm is not finite.

    A NaN or infinite gradient must not reach the sum: it would either poison the weights or escape the clipping.
    """
    factors = max_grad_norm / norms.clamp(min=max_grad_norm)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


ClipRule = Callable[[Tensor, float], Tensor]
STABILITY = 0.01  # gamma of automatic clipping, in units of the gradient norm (Bu et al. 2023)


def automatic_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """(U,) factors C / (norm + 0.01): every unit counts for less than C, and small gradients for nearly C as well.

    Automatic clipping (AUTO-S, Bu et al., NeurIPS 2023, arXiv 2206.07136). A unit moves the sum by less than C, so the
    mechanism is that of flat clipping; what changes is the weight of a unit, and with it the bias.
    """
    factors = max_grad_norm / (norms + STABILITY)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


CLIPPING: dict[str, ClipRule] = {"flat": clip_factors, "automatic": automatic_factors}


def unit_losses(model: VisionLanguageModel, rows: Rows) -> Tensor:
    """(U,) loss of each unit: the mean over its questions of the mean over that question's own answer tokens."""
    losses = model.losses(rows.tokens, rows.packed)
    if losses.shape != rows.weight.shape:
        raise DpauditError(f"losses: {tuple(losses.shape)} for {len(rows.weight)} rows; each row needs exactly one")
    per_row = losses * rows.weight
    return torch.zeros(rows.units, dtype=per_row.dtype, device=per_row.device).index_add(0, rows.owner, per_row)


def whole_units(result: UnitSum, rows: Rows) -> UnitSum:
    """`result` as it is; DpauditError where a path clipped anything but whole units (tiles, patches, questions).

    A sum of clipped tiles would have sensitivity C times the number of tiles, and nothing else would show it.
    """
    for name, values in (("norms", result.norms), ("losses", result.losses)):
        if values.shape != (rows.units,):
            raise DpauditError(
                f"gradient path: {tuple(values.shape)} {name} for {rows.units} units; clipping must be per unit. Set "
                "training.gradient-path=micro-batch"
            )
    return result


def sum_per_unit(name: str, value: Tensor, rows: Rows) -> Tensor:
    """(U, ...) sums over the rows of each unit of a gradient (R, ...) of `name`; DpauditError where its rows are
    anything else (tiles, patches, questions)."""
    expected = rows.tokens.shape[0]
    if value.shape[0] != expected:
        raise DpauditError(
            f"gradient of {name}: {value.shape[0]} rows for {expected} pictures; clipping would not be per unit. "
            "Set training.gradient-path=micro-batch"
        )
    if rows.units == expected:
        return value.float()
    out = torch.zeros(rows.units, *value.shape[1:], device=value.device)
    return out.index_add(0, rows.owner, value.float())


def clipped_sum(gradients: Gradient, losses: Tensor, clip: ClipRule, max_grad_norm: float) -> UnitSum:
    """The sum of clipped gradients from those of each unit, (U, ...) a parameter, and their losses (U,)."""
    squares = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients.values()]).sum(dim=0)
    norms = squares.sqrt()
    factors = clip(norms, max_grad_norm)
    total = {}
    for name, value in gradients.items():
        clean = torch.where((factors > 0).view(-1, *[1] * (value.dim() - 1)), value, torch.zeros_like(value))
        total[name] = torch.einsum("u,u...->...", factors, clean)
    return UnitSum(total, norms, losses)


class GradientPath(Protocol):
    """One way to a sum of clipped per-unit gradients."""

    @property
    def kind(self) -> GradientPathName:
        """As in `training.gradient-path`."""
        ...

    @property
    def checkpointing(self) -> Checkpointing:
        """The kind of gradient checkpointing that works with it; none where none does."""
        ...

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        """The sum over the units of `rows` of each unit's clipped gradient."""
        ...

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "GradientPath":
        """The same path over other parameters of its model: a step that trains a part of the adapter."""
        ...


def zeros(parameters: Mapping[str, Tensor]) -> Gradient:
    """A float32 gradient of nothing: what an empty Poisson batch contributes."""
    return {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}


def choose_checkpointing(wanted: str, path: GradientPath) -> Checkpointing:
    """The kind of checkpointing for a path: the one that works with it, or UsageError that says which does.

    Measured on every family: Opacus' hooks need the reentrant kind (the other computes a layer again after the hooks
    have looked), `torch.autograd.grad` needs the non-reentrant one (the other knows `backward()` alone).
    """
    if wanted == "none" or (wanted == "auto" and path.checkpointing != "none"):
        return "none" if wanted == "none" else path.checkpointing
    if wanted != path.checkpointing:
        fits = "none" if path.checkpointing == "none" else f"auto, {path.checkpointing}"
        other = "hooks" if wanted == "reentrant" else "micro-batch or ghost"
        way = "" if wanted == "auto" else f"; {wanted} needs training.gradient-path={other}"
        raise rejected("training.gradient-checkpointing", wanted, f"{fits} with this gradient path{way}")
    return path.checkpointing


class MicroBatch:
    """One unit at a time. `rows` must hold the rows of whole units."""

    kind: GradientPathName = "micro-batch"
    checkpointing: Checkpointing = "non-reentrant"

    def __init__(
        self, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], clip: ClipRule = clip_factors
    ) -> None:
        self.model, self.parameters, self.clip = model, parameters, clip

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "MicroBatch":
        """The same for other parameters."""
        return MicroBatch(self.model, parameters, self.clip)

    def gradient(self, rows: Rows) -> tuple[Gradient, Tensor]:
        """Gradient and loss of the single unit in `rows`, before clipping."""
        loss = unit_losses(self.model, rows).sum()
        values = torch.autograd.grad(loss, list(self.parameters.values()))
        return {name: value.float() for name, value in zip(self.parameters, values, strict=True)}, loss.detach()

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        total = zeros(self.parameters)
        norms, losses = [], []
        for unit in range(rows.units):
            gradient, loss = self.gradient(rows.unit(unit))
            norm = torch.stack([value.square().sum() for value in gradient.values()]).sum().sqrt()
            factor = self.clip(norm, max_grad_norm)
            if factor > 0:
                for name, value in gradient.items():
                    total[name].add_(value, alpha=float(factor))
            norms.append(norm)
            losses.append(loss)
        empty = torch.zeros(0, device=self.model.device)
        return UnitSum(total, torch.stack(norms) if norms else empty, torch.stack(losses) if losses else empty)


class Hooks:
    """Per-row gradients by Opacus' hooks, added up per unit, then clipped."""

    kind: GradientPathName = "hooks"
    checkpointing: Checkpointing = "reentrant"

    def __init__(
        self, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], clip: ClipRule = clip_factors
    ) -> None:
        self.model, self.parameters, self.clip = model, parameters, clip

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "Hooks":
        """The same for other parameters."""
        return Hooks(self.model, parameters, self.clip)

    def per_unit(self, rows: Rows) -> tuple[Gradient, Tensor]:
        """Gradient of each unit before clipping, (U, ...) a parameter, and the units' losses (U,)."""
        with _opacus(self.model, self.parameters) as per_row:
            losses = unit_losses(self.model, rows)
            with warnings.catch_warnings():
                # The first adapted layer's input is frozen; its hooks fire all the same, which is all we need.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                torch.autograd.backward(losses.sum())
            gradients = {name: sum_per_unit(name, value, rows) for name, value in per_row().items()}
        return gradients, losses.detach()

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        return clipped_sum(*self.per_unit(rows), self.clip, max_grad_norm)


class Plain:
    """The plain sum, no clipping: training without privacy. `max_grad_norm` is not used."""

    kind: GradientPathName = "plain"
    checkpointing: Checkpointing = "non-reentrant"

    def __init__(self, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "Plain":
        """The same for other parameters."""
        return Plain(self.model, parameters)

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        losses = unit_losses(self.model, rows)
        values = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        gradient = {name: value.float() for name, value in zip(self.parameters, values, strict=True)}
        return UnitSum(gradient, torch.zeros_like(losses), losses.detach())


@contextmanager
def _opacus(model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter]) -> Iterator["_PerRow"]:
    """Opacus' hooks around one forward and backward pass; training mode only for the layers that need it."""
    from opacus.grad_sample import GradSampleHooks

    owners = [module for module in model.hf.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    was = [module.training for module in owners]
    for module in owners:
        module.train()
    hooks = GradSampleHooks(model.hf, batch_first=True, loss_reduction="sum", strict=False)
    try:
        yield _PerRow(parameters)
    finally:
        hooks.remove_hooks()
        for module, mode in zip(owners, was, strict=True):
            module.train(mode)
        for parameter in parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


class _PerRow:
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self) -> Gradient:
        out: Gradient = {}
        for name, parameter in self.parameters.items():
            value = getattr(parameter, "grad_sample", None)
            if not isinstance(value, Tensor):
                raise DpauditError(
                    f"gradient of {name}: Opacus found none for each row; set training.gradient-path=micro-batch"
                )
            out[name] = value
        return out


def add_sums(parts: Iterable[UnitSum], parameters: Mapping[str, Tensor], device: torch.device) -> UnitSum:
    """Add physical batches into one logical one, as they come: one sum is kept; no parts at all is the empty batch."""
    total, norms, losses = zeros(parameters), [torch.zeros(0, device=device)], [torch.zeros(0, device=device)]
    for part in parts:
        for name, value in part.gradient.items():
            total[name].add_(value)
        norms.append(part.norms)
        losses.append(part.losses)
    return UnitSum(total, torch.cat(norms), torch.cat(losses))
