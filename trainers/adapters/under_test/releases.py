"""What an optimiser reads: the noisy gradients, as the innermost torch optimiser finds them in `.grad`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def _make_visible() -> None:
    """torch calls its global hooks from the classes of which an instance exists; all of its own are made so."""
    for value in vars(torch.optim).values():
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
            step = value.__dict__.get("step")
            if step is not None and not getattr(step, "hooked", None):
                hooked: Any = Optimizer.profile_hook_step(step)
                hooked.hooked = True
                setattr(value, "step", hooked)  # noqa: B010


class Releases:
    """Records during `watching()`: parameter id -> gradient; how many outermost optimiser steps there were."""

    def __init__(self) -> None:
        _make_visible()
        self.seen: dict[int, Tensor] = {}
        self.steps = 0
        self._depth = 0
        self._settled: set[int] = set()
        self._inner = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Forget the last step and record the next."""
        self.seen, self.steps, self._depth, self._inner = {}, 0, 0, False
        self._settled = set()
        hooks = (register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def settle(self, parameters: list[Tensor]) -> None:
        """Record these gradients now: what follows (a Trainer's clipping of the noisy mean) comes after the noise."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.seen[id(parameter)] = parameter.grad.detach().clone()
                self._settled.add(id(parameter))

    def _before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._inner = self._depth > 0
        self._depth += 1
        self._record(optimizer)

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.steps += 1
            if not self._inner:  # an optimiser of somebody's own that adds noise in its step, and updates by itself
                self._record(optimizer)

    def _record(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in self._settled:
                    self.seen[id(parameter)] = parameter.grad.detach().clone()
