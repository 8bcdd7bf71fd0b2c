"""Gradients of single units inside a loop that takes its units one by one: read, or replaced by a canary's.

Torch calls the hooks of a parameter whenever its gradient is computed, by `loss.backward()` and `autograd.grad` alike,
before anybody clips it. In a loop that takes one unit a backward pass, the k-th pass belongs to the k-th unit; so a
unit appended to the batch can carry any gradient through the loop's own clipping. A loop that takes several units in a
pass is found out by its number of passes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Gradient = dict[str, Tensor]
_NORMAL = (torch.normal, torch.randn, torch.randn_like, Tensor.normal_)
_BACKWARD = (Tensor.backward, torch.autograd.grad, torch.autograd.backward)


def _transformed() -> bool:
    """Whether torch.func transforms what runs now: its passes reach no live parameter, and their values are hidden."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _like(gradient: Tensor, canary: Tensor) -> Tensor:
    """The canary as torch requires it of a hook: of the type, device and layout of the gradient."""
    found = canary.to(gradient.device, gradient.dtype)
    return found.to_sparse(gradient.sparse_dim()) if gradient.layout == torch.sparse_coo else found


class Passes(TorchFunctionMode):
    """A mode that is active around the foreign code; it looks during `watching()` only.

    count: backward passes that reached one of the parameters. values: what each of them started from. kept: the
    gradients of each (if asked to keep them). reached: names that each of them reached. drawn: whether anything normal
    was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.drawn = 0, False
        self.values: list[float] = []
        self.kept: list[Gradient] = []
        self.reached: list[set[str]] = []
        self._canaries: Mapping[int, Mapping[str, Tensor]] = {}
        self._watches, self._keep = False, False
        self._root: float | None = None

    @contextlib.contextmanager
    def watching(
        self,
        parameters: Mapping[str, Tensor],
        canaries: Mapping[int, Mapping[str, Tensor]] | None = None,
        *,
        keep: bool = False,
    ) -> Iterator[None]:
        """Record the passes of one step. canaries: pass number (from 0) -> gradient that replaces its own."""
        self.count, self.values, self.kept, self.reached, self.drawn = 0, [], [], [], False
        self._canaries, self._keep, self._watches, self._root = canaries or {}, keep, True, None
        live = [(name, tensor) for name, tensor in parameters.items() if tensor.requires_grad]
        hooks: list[Any] = [tensor.register_hook(self._hook(name)) for name, tensor in live]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._watches = False
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Any:
        def fire(gradient: Tensor) -> Tensor | None:
            if self._root is not None:  # the first parameter of a new pass
                self.values.append(self._root)
                self.kept.append({})
                self.reached.append(set())
                self.count, self._root = self.count + 1, None
            if not self.count:
                return None  # a backward pass that was begun before we looked
            self.reached[-1].add(name)
            if self._keep:
                self.kept[-1][name] = gradient.detach().to_dense().clone()
            canary = self._canaries.get(self.count - 1)
            return None if canary is None else _like(gradient, canary[name])

        return fire

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.drawn = self.drawn or func in _NORMAL
        if self._watches and func in _BACKWARD and args and not _transformed():
            roots = [args[0]] if isinstance(args[0], Tensor) else list(args[0])
            self._root = sum(float(root.detach().sum()) for root in roots if isinstance(root, Tensor))
        return func(*args, **(kwargs or {}))
