"""One trainer under test: every call guarded, everything that comes back validated at the door."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.contract.copies import whole_copies
from attacks.contract.guard import MethodFailure, call
from dpaudit.claims import StepClaim
from trainers.protocol import OPTIONAL, REQUIRED

if TYPE_CHECKING:
    from attacks.contract.probe import Probe

Vector = npt.NDArray[np.float64]

_MISSING = object()


class Subject:
    """One trainer, every call guarded."""

    def __init__(self, trainer: Any, probe: "Probe") -> None:
        self.trainer, self.probe = trainer, probe
        for name in REQUIRED:
            value = call(name, getattr, trainer, name, _MISSING, limit=probe.limit)
            if value is _MISSING:
                raise MethodFailure(name, f"missing; the trainer must offer {', '.join(REQUIRED)}")
            if name not in ("records", "claim") and not callable(value):
                raise MethodFailure(name, f"got {short(value)}; accepted: a method")

    def offers(self, name: str) -> bool:
        """Whether an optional method is there."""
        assert name in OPTIONAL
        return callable(getattr(self.trainer, name, None))

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call one method."""
        shown = ", ".join(short(argument) for argument in arguments)
        return call(f"{name}({shown})", getattr(self.trainer, name), *arguments, limit=self.probe.limit)

    def records(self) -> tuple[Any, ...]:
        """The units in use."""
        value = call("records", lambda: list(self.trainer.records), limit=self.probe.limit)
        if len(value) < 3:
            raise MethodFailure("records", f"holds {len(value)} units; accepted: at least 3")
        return tuple(value)

    def claim(self) -> StepClaim:
        """The validated claim (StepClaim itself rejects values that can't be true)."""
        value = call("claim", lambda: self.trainer.claim, limit=self.probe.limit)
        if not isinstance(value, StepClaim):
            raise MethodFailure("claim", f"got {type(value).__name__}; accepted: dpaudit.claims.StepClaim")
        return value

    def parameters(self) -> dict[str, Vector]:
        """Copies, flat."""
        value = self.ask("parameters")
        if not isinstance(value, Mapping) or not value:
            raise MethodFailure("parameters()", f"returned {short(value)}; accepted: a dict of tensors by name")
        return {str(name): flat("parameters()", name, tensor) for name, tensor in value.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        return {str(name): tuple(tensor.shape) for name, tensor in self.ask("parameters").items()}

    def released(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Vector | None]:
        """Validated: known names and the parameters' shapes (a zeroth-order trainer may release bare numbers)."""
        value = self.ask("released")
        if not isinstance(value, Mapping) or not value:
            raise MethodFailure("released()", f"returned {short(value)}; accepted: a dict name -> tensor or None")
        free = self.probe.mechanism == "zeroth-order"
        out: dict[str, Vector | None] = {}
        for name, tensor in value.items():
            if name in self.probe.appeared:  # a fault of its own; nothing at step 1 could be compared with it
                continue
            if name not in shapes and not free:
                raise MethodFailure("released()", f"names {name!r}, which parameters() does not")
            if tensor is None:
                out[str(name)] = None
                continue
            tensor = as_tensor("released()", name, tensor)
            values = flat("released()", name, tensor)
            self.probe.precision = max(self.probe.precision, float(torch.finfo(tensor.dtype).eps))
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                got, wanted = tuple(tensor.shape), shapes[name]
                raise MethodFailure("released()", f"{name!r} has shape {got}, the parameter has {wanted}")
            out[str(name)] = values
        return out

    def put(self, blocks: Mapping[str, Vector]) -> bool:
        """Set the trained parameters and nothing else; False where the trainer has no way to do that.

        By `assign`, otherwise by writing into the tensors of `parameters()`, where these are the live ones. Nor where
        `parameters()` shows others afterwards (`Probe.unheard` says so): then it shows a copy, or `assign` changes what
        it is given.
        """
        shown = self.ask("parameters")
        if not isinstance(shown, Mapping) or set(shown) != set(blocks):
            return False
        new = {}
        for name, value in shown.items():
            like = as_tensor("parameters()", name, value)
            new[name] = torch.from_numpy(blocks[name].reshape(tuple(like.shape))).to(like.dtype).to(like.device)
        if self.offers("assign"):
            # Arrays where the trainer shows arrays, tensors where it shows tensors.
            given = {name: value.clone() for name, value in new.items()}
            self.ask("assign", {n: v if isinstance(shown[n], Tensor) else v.numpy() for n, v in given.items()})
        elif not _live(shown, self.ask("parameters")):
            return False
        else:
            with torch.no_grad():
                for name, value in shown.items():
                    value.copy_(new[name])
        now = self.parameters()
        wrong = [name for name, value in new.items() if not np.array_equal(now[name], flat("assign", name, value))]
        if wrong and self.offers("assign"):
            self.probe.unheard = f"after assign() parameters() shows other values for {wrong[0]!r}"
        return not wrong

    def twin(self) -> "Subject":
        """An independent copy of the trainer as it is now; the records are shared. Raises whatever copying raises."""
        memo = {id(record): record for record in self.trainer.records}
        with whole_copies():
            return Subject(copy.deepcopy(self.trainer, memo), self.probe)

    def bytes(self) -> int:
        """What the tensors of the trainer hold, as far as its attributes show."""
        return _bytes(self.trainer, 4, set())

    def applied(self) -> frozenset[str] | None:
        """Updated blocks, None if the trainer does not say."""
        return _names("applied()", self.ask("applied")) if self.offers("applied") else None

    def select(self, noisy: Mapping[str, Tensor]) -> frozenset[str]:
        """The trainer's mask for a noisy gradient."""
        return _names("select(noisy)", self.ask("select", noisy))


def _live(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether `parameters()` hands out the parameters themselves: leaves that require gradients, the same twice."""
    return all(
        isinstance(value, torch.nn.Parameter) and value is two.get(name) and value.is_leaf
        for name, value in one.items()
    )


def _bytes(value: object, depth: int, seen: set[int]) -> int:
    if id(value) in seen or depth < 0:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, torch.nn.Module):
        parts: list[object] = [*value.parameters(), *value.buffers()]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value[:64])
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return sum(_bytes(part, depth - 1, seen) for part in parts)


def short(value: object) -> str:
    """Indices and numbers as they are; of all else the type alone: it may be a record, and a line may be logged."""
    if isinstance(value, list | tuple):
        shown = [short(item) for item in value[: 3 if len(value) > 6 else 6]]
        return f"[{', '.join(shown)}{f', ... {len(value)} in all' if len(value) > 6 else ''}]"
    return repr(value) if value is None or type(value) in (bool, int, float) else f"a {type(value).__name__}"


def as_tensor(method: str, name: object, value: object) -> Tensor:
    """A floating-point tensor as it is (a sparse one filled with zeros), or of an array of numpy, jax or what else
    `numpy.asarray` understands."""
    found = value
    if not isinstance(found, Tensor) and hasattr(found, "__array__"):
        array = np.asarray(found)
        # bfloat16 of jax is a type of its own in numpy, which torch does not know.
        found = torch.as_tensor(array if array.dtype.kind in "fiub" else array.astype(np.float32))
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = type(value).__name__ if not hasattr(value, "dtype") else f"{type(value).__name__} of {value.dtype}"
        raise MethodFailure(method, f"{name!r} is {what}; accepted: a floating-point tensor or array")
    return found if found.layout == torch.strided else found.to_dense()


def flat(method: str, name: object, value: object) -> Vector:
    """One block in float64, flat, a copy."""
    tensor = as_tensor(method, name, value)
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy(), dtype=np.float64).reshape(-1).copy()


def _names(method: str, value: object) -> frozenset[str]:
    if not isinstance(value, set | frozenset | list | tuple) or not all(isinstance(name, str) for name in value):
        raise MethodFailure(method, f"returned {short(value)}; accepted: a set of parameter names")
    return frozenset(value)
