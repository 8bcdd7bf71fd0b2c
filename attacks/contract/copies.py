"""Copying trainers whole: what PyTorch's own copies of parameters and optimisers leave behind comes along.

`copy.deepcopy` of a parameter drops its gradient and what a library hung on it (Opacus: `grad_sample`). That of an
optimiser keeps only its public state and, on the way, wraps the `step` of its class for good. Both are replaced while a
trainer is copied. Whether the copy is any good is not taken on trust: `Probe` compares it with the original.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Memo = dict[int, Any]


def _parameter(self: nn.Parameter, memo: Memo) -> nn.Parameter:
    if id(self) in memo:
        found: nn.Parameter = memo[id(self)]
        return found
    made = type(self)(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
    memo[id(self)] = made
    for name, value in vars(self).items():
        setattr(made, name, copy.deepcopy(value, memo))
    if self.grad is not None:
        made.grad = self.grad.detach().clone()
    return made


def _optimizer(self: torch.optim.Optimizer, memo: Memo) -> torch.optim.Optimizer:
    made = type(self).__new__(type(self))
    memo[id(self)] = made
    made.__dict__.update(copy.deepcopy(vars(self), memo))
    return made


def _generator(self: torch.Generator, memo: Memo) -> torch.Generator:
    made = torch.Generator(device=self.device)
    made.set_state(self.get_state())
    memo[id(self)] = made
    return made


_MISSING = object()


@contextlib.contextmanager
def whole_copies() -> Iterator[None]:
    """Inside the block `copy.deepcopy` copies parameters, optimisers and generators with all that they hold."""
    changed: tuple[tuple[type, Any], ...] = ((nn.Parameter, _parameter), (torch.optim.Optimizer, _optimizer))
    before = [vars(kind).get("__deepcopy__", _MISSING) for kind, _ in changed]
    table: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    table[torch.Generator] = _generator
    try:
        for kind, function in changed:
            setattr(kind, "__deepcopy__", function)  # noqa: B010
        yield
    finally:
        del table[torch.Generator]
        for (kind, _), old in zip(changed, before, strict=True):
            if old is _MISSING:
                delattr(kind, "__deepcopy__")
            else:
                setattr(kind, "__deepcopy__", old)  # noqa: B010
