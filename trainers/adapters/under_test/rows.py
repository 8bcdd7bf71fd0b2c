"""Opacus' gradients of single records (`grad_sample`): read, or joined by canaries, when `optimizer.step()` begins."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainers.adapters.under_test.backward import Gradient

GHOST_INJECT = (
    "ghost clipping keeps no gradient of a single record (no grad_sample), so a canary gradient can't be injected; "
    "this closes the white-box game. grad_sample_mode='hooks' or 'functorch' enables it"
)


class Rows:
    """What joins the next step, and what was read off it. steps: of the private optimizer, so far.

    rows: canaries for the first physical batch of the next step. keep: remember the first record's gradient in `seen`.
    ghost: there are no rows, but a batch of one whose clipping is turned off shows its gradient in `.grad`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], ghost: bool) -> None:
        self.parameters, self.ghost = parameters, ghost
        self.rows: list[Mapping[str, Tensor]] = []
        self.keep = False
        self.seen: Gradient | None = None
        self.steps = 0

    def before_step(self) -> None:
        """Called when the gradients are there and nothing is clipped yet."""
        self.steps += 1
        if self.keep and self.seen is None:
            self.seen = self._first()
        rows, self.rows = self.rows, []
        for name, parameter in self.parameters.items() if rows else ():
            held: Any = getattr(parameter, "grad_sample", None)
            if held is None:
                continue
            last = held[-1] if isinstance(held, list) else held
            joined = torch.cat([last, torch.stack([row[name] for row in rows]).to(last)])
            parameter.grad_sample = [*held[:-1], joined] if isinstance(held, list) else joined  # type: ignore[attr-defined]

    def _first(self) -> Gradient:
        found: Gradient = {}
        for name, parameter in self.parameters.items():
            held: Any = parameter.grad if self.ghost else getattr(parameter, "grad_sample", None)
            if held is not None:
                last = held[-1] if isinstance(held, list) else held
                found[name] = (last if self.ghost else last[0]).detach().clone()
        return found


def hook_step(optimizer: Any, rows: Rows) -> None:
    """`optimizer.step` of this object alone: `rows.before_step()` first, or at the end of its closure."""
    original = optimizer.step

    def step(closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            rows.before_step()
            return original()

        def with_rows() -> Any:
            loss = closure()
            rows.before_step()
            return loss

        return original(with_rows)

    optimizer.step = step


def dp_optimizer(optimizer: Any) -> Any:
    """The Opacus optimizer in it or behind it (accelerate wraps optimizers); None where there is none."""
    opacus = sys.modules.get("opacus.optimizers")
    while opacus is not None and optimizer is not None:
        if isinstance(optimizer, opacus.DPOptimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def is_ghost(optimizer: Any) -> bool:
    """Whether an Opacus optimizer leaves clipping to ghost norms."""
    return isinstance(optimizer, sys.modules["opacus.optimizers"].DPOptimizerFastGradientClipping)
