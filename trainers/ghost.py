"""Sums of clipped per-unit gradients without a gradient of any unit: norms in one backward pass, the sum in a second.

A linear layer with inputs a_t and gradients b_t at its outputs has the gradient G = sum_t b_t a_t^T over the tokens of
a unit, all rows of the unit together. Its squared norm follows in two ways:

    direct      || sum_t b_t a_t^T ||^2                       2 T p d operations, made and dropped layer by layer
    ghost       sum_{s,t} <a_s, a_t> <b_s, b_t>               2 T^2 (p + d) operations (Goodfellow 2015; Li et al. 2022)

and the cheaper one is taken for each layer and number of tokens. The second pass adds f_u b_t a_t^T of each unit's
clipping factor f_u to the one sum that is kept (Bu et al. 2022: book-keeping; here inputs and gradients come from the
graph again instead of being kept, since for low-rank adapters they are as large as the gradients themselves). So memory
is that of a plain backward pass, and time is one backward pass more than that of Opacus' hooks.

The sum over pairs is taken in float64. Where gradients of tokens cancel, its relative error is that of the products
times (sum |a||b| / ||G||)^2: in float32 a record made for it could seem to have no gradient at all and escape clipping.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpaudit.documents import GradientPathName
from dpaudit.errors import DpauditError
from trainers.gradients import ClipRule, Gradient, UnitSum, clip_factors, unit_losses, zeros
from trainers.inputs import Rows
from trainers.vlm import Checkpointing, VisionLanguageModel

AT_ONCE = 64 << 20  # bytes of what is made and dropped for norms
DOUBLE = 2  # operations in float64 cost about twice those in float32
Visit = Callable[[str, Tensor, Tensor], None]


class Ghost:
    """Norms and clipped sum in two backward passes through one graph. `rows` must hold the rows of whole units."""

    kind: GradientPathName = "ghost"
    checkpointing: Checkpointing = "non-reentrant"

    def __init__(
        self, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], clip: ClipRule = clip_factors
    ) -> None:
        self.model, self.parameters, self.clip = model, parameters, clip

    def over(self, parameters: Mapping[str, nn.Parameter]) -> "Ghost":
        """The same for other parameters."""
        return Ghost(self.model, parameters, self.clip)

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        total = zeros(self.parameters)
        if not rows.units:
            return UnitSum(total, torch.zeros(0, device=self.model.device), torch.zeros(0, device=self.model.device))
        with taps(self.model, self.parameters, rows.tokens.shape[0]) as tapped:
            losses = unit_losses(self.model, rows)
            tapped.check()
            norms = Norms(rows)
            tapped.backward(losses, norms.visit, again=True)
            found = norms.values()
            factors = self.clip(found, max_grad_norm)
            tapped.backward(losses, Sum(total, factors, rows).visit)
        return UnitSum(total, found, losses.detach())


class Norms:
    """Squared norms of the gradients of units, added up layer by layer."""

    def __init__(self, rows: Rows) -> None:
        device = rows.tokens.device
        self.groups = list(by_rows(rows))
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.squares = torch.zeros(rows.units, dtype=self.dtype, device=device)

    def visit(self, name: str, given: Tensor, gradient: Tensor) -> None:
        """Add a layer's share. given: (R, T, d), gradient: (R, T, p)."""
        for units, rows in self.groups:
            inputs, outputs = (value[rows].flatten(1, 2) for value in (given, gradient))
            self.squares[units] += squared_norms(inputs, outputs, self.dtype)

    def values(self) -> Tensor:
        """(U,) norms, float32."""
        return self.squares.clamp(min=0).sqrt().float()


def by_rows(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Units with equally many rows, (k,), and their rows, (k, m)."""
    counts = torch.bincount(rows.owner, minlength=rows.units)
    starts = counts.cumsum(0) - counts
    for size in sorted(set(counts.tolist())):
        units = (counts == size).nonzero()[:, 0]
        yield units, starts[units][:, None] + torch.arange(size, device=units.device)


def pairs_pay(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether sums over pairs of tokens are cheaper than the gradient of a layer."""
    return DOUBLE * tokens * (inputs + outputs) < inputs * outputs


def squared_norms(given: Tensor, gradient: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(U,) squared norms of sum_t gradient_t given_t^T. given: (U, T, d), gradient: (U, T, p)."""
    tokens, inputs, outputs = given.shape[1], given.shape[2], gradient.shape[2]
    pairs = dtype == torch.float64 and pairs_pay(tokens, inputs, outputs)
    size = 8 * tokens * (2 * tokens + inputs + outputs) if pairs else given.element_size() * inputs * outputs
    pieces = []
    for a, b in zip(*(torch.split(value, max(1, AT_ONCE // size)) for value in (given, gradient)), strict=True):
        if pairs:
            a, b = a.double(), b.double()
            pieces.append(((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)))
        else:
            pieces.append((b.mT @ a).flatten(1).square().sum(dim=1).to(dtype))
    return torch.cat(pieces)


class Sum:
    """The clipped sum, added up layer by layer in `total`."""

    def __init__(self, total: Gradient, factors: Tensor, rows: Rows) -> None:
        self.total, self.factors = total, factors[rows.owner]
        # What is not finite is left out whole: 0 times infinity is no zero.
        self.kept = None if bool((factors > 0).all()) else (self.factors > 0).nonzero()[:, 0]

    def visit(self, name: str, given: Tensor, gradient: Tensor) -> None:
        """Add a layer's share. given: (R, T, d), gradient: (R, T, p)."""
        factors = self.factors
        if self.kept is not None:
            factors, given, gradient = factors[self.kept], given[self.kept], gradient[self.kept]
        weighted = (gradient * factors[:, None, None].to(gradient.dtype)).flatten(0, 1)
        self.total[name] += (weighted.mT @ given.flatten(0, 1)).float()


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; backwards it shows the layer's input and the gradient at its output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor, anchor: Tensor, show: Callable[[Tensor, Tensor], None]) -> Any:
        ctx.save_for_backward(given)  # the layer itself keeps it too; under checkpointing it is computed again
        ctx.show = show
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        ctx.show(ctx.saved_tensors[0], gradient)
        return gradient, None, gradient.new_zeros(()), None


class _Taps:
    """Taps on the layers of some parameters. rows: what each layer's first dimension must count."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.seen: dict[str, int] = {}
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._visit: Visit | None = None
        self._forward = True

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """What a layer calls after its forward pass."""

        def tap(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._forward:
                self.seen[name] = self.seen.get(name, 0) + 1
            show = partial(self._show, name)
            found: Tensor = _Tap.apply(output, given[0], self.anchor, show)  # type: ignore[no-untyped-call]
            return found

        return tap

    def check(self) -> None:
        """After the forward pass: DpauditError where a layer was used more or less than once."""
        self._forward = False
        for name, times in self.seen.items():
            if times != 1:
                raise DpauditError(
                    f"gradient of {name}: its layer is used {times} times in one forward pass, and a sum over its uses "
                    "has no norm in one of them; set training.gradient-path=micro-batch"
                )

    def backward(self, losses: Tensor, visit: Visit, *, again: bool = False) -> None:
        """One backward pass without gradients of parameters; `visit` sees each layer. again: one more pass comes."""
        self._visit = visit
        # The anchor has a part in every tap, so that this pass goes through all of them and computes nothing else.
        torch.autograd.grad(losses.sum(), [self.anchor], retain_graph=again)

    def _show(self, name: str, given: Tensor, gradient: Tensor) -> None:
        assert self._visit is not None
        a, b = (_tokens(value) for value in (given.detach(), gradient.detach()))
        if a.shape[0] != self.rows or b.shape[0] != self.rows:
            raise DpauditError(
                f"gradient of {name}: {a.shape[0]} rows for {self.rows} pictures; clipping would not be per unit. "
                "Set training.gradient-path=micro-batch"
            )
        self._visit(name, a, b)


def _tokens(value: Tensor) -> Tensor:
    """(R, T, width) in at least float32."""
    value = value if value.dtype == torch.float64 else value.float()
    return value.reshape(value.shape[0], -1, value.shape[-1])


@contextmanager
def taps(model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], rows: int) -> Iterator[_Taps]:
    """Taps on every layer that owns one of `parameters`. DpauditError for one that is not the weight of one."""
    made = _Taps(rows, model.device)
    owners = _owners(model, parameters)
    handles = [module.register_forward_hook(made.hook(name)) for name, module in owners.items()]
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    try:
        for (
            parameter
        ) in trained:  # else a layer would keep its input a second time, for a gradient that nobody asks for
            parameter.requires_grad_(False)
        yield made
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _owners(model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in parameters}
    for module in model.hf.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                found[names[id(parameter)]].append((module, kind))
    for name, uses in found.items():
        if len(uses) != 1 or not isinstance(uses[0][0], nn.Linear) or uses[0][1] != "weight":
            raise DpauditError(
                f"gradient of {name}: it is not the weight of one linear layer; set training.gradient-path=micro-batch"
            )
    return {name: uses[0][0] for name, uses in found.items()}
