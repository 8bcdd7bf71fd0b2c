"""Asking a trainer under test: fresh trainers, one observation a question, everything validated at the door.

An observation is what one step released, under given records, batch, noise seed and earlier batches. Trainers are
never reused between questions, so that parameters are equal whenever the contract says so; answers are memoised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.contract.guard import TIME_LIMIT, MethodFailure, call
from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError
from trainers.protocol import OPTIONAL, REQUIRED, lacking

Vector = npt.NDArray[np.float64]

# What a released number may lose, in units of its type's own precision (float32: 1e-6, some operations on 2^-23), and
# what a contribution may differ by, relatively.
ROUNDING = 8.0
AGREEMENT = 1e-3

# About 250 observations are remembered, 16 bytes a number each.
MOST_NUMBERS = 3_000_000

_MISSING = object()


@dataclass(frozen=True)
class Records:
    """A data set with a name; the name is what observations are memoised by."""

    name: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Observation:
    """One step. `released` is multiplied by the claimed batch size: clipped sum plus noise, one vector a block.

    None = no noise was drawn. `moved`: displacement of each parameter in that step. `applied`: if offered.
    """

    released: dict[str, Vector | None]
    moved: dict[str, Vector]
    applied: frozenset[str] | None

    @property
    def vector(self) -> Vector:
        """All blocks in name order; a block without noise counts as zeros of its parameter's size."""
        parts = [
            value if value is not None else np.zeros(self.moved[name].size if name in self.moved else 1)
            for name, value in sorted(self.released.items())
        ]
        return np.concatenate(parts)

    @property
    def noised(self) -> frozenset[str]:
        """Blocks that received noise."""
        return frozenset(name for name, value in self.released.items() if value is not None)


class Subject:
    """One trainer, every call guarded."""

    def __init__(self, trainer: Any, probe: "Probe") -> None:
        self.trainer, self.probe = trainer, probe
        for name in REQUIRED:
            value = call(name, getattr, trainer, name, _MISSING, limit=probe.limit)
            if value is _MISSING:
                raise MethodFailure(name, f"missing; the trainer must offer {', '.join(REQUIRED)}")
            if name not in ("records", "claim") and not callable(value):
                raise MethodFailure(name, f"got {_short(value)}; accepted: a method")

    def offers(self, name: str) -> bool:
        """Whether an optional method is there."""
        assert name in OPTIONAL
        return callable(getattr(self.trainer, name, None))

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call one method."""
        shown = ", ".join(_short(argument) for argument in arguments)
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
            raise MethodFailure("parameters()", f"returned {_short(value)}; accepted: a dict of tensors by name")
        return {str(name): _flat("parameters()", name, tensor) for name, tensor in value.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        return {str(name): tuple(tensor.shape) for name, tensor in self.ask("parameters").items()}

    def released(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Vector | None]:
        """Validated: known names and the parameters' shapes (a zeroth-order trainer may release bare numbers)."""
        value = self.ask("released")
        if not isinstance(value, Mapping) or not value:
            raise MethodFailure("released()", f"returned {_short(value)}; accepted: a dict name -> tensor or None")
        free = self.probe.mechanism == "zeroth-order"
        out: dict[str, Vector | None] = {}
        for name, tensor in value.items():
            if name not in shapes and not free:
                raise MethodFailure("released()", f"names {name!r}, which parameters() does not")
            if tensor is None:
                out[str(name)] = None
                continue
            flat = _flat("released()", name, tensor)
            self.probe.precision = max(self.probe.precision, float(torch.finfo(tensor.dtype).eps))
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                got, wanted = tuple(tensor.shape), shapes[name]
                raise MethodFailure("released()", f"{name!r} has shape {got}, the parameter has {wanted}")
            out[str(name)] = flat
        return out

    def applied(self) -> frozenset[str] | None:
        """Updated blocks, None if the trainer does not say."""
        return _names("applied()", self.ask("applied")) if self.offers("applied") else None

    def select(self, noisy: Mapping[str, Tensor]) -> frozenset[str]:
        """The trainer's mask for a noisy gradient."""
        return _names("select(noisy)", self.ask("select", noisy))


class Probe:
    """A factory with its seeds, limits and the memory of what was asked."""

    def __init__(self, factory: Callable[..., Any], *, seed: int = 0, limit: float = TIME_LIMIT) -> None:
        if not callable(factory):
            raise UsageError(f"factory: got {_short(factory)}; accepted: a callable factory(records=None, *, seed)")
        self.factory, self.seed, self.limit = factory, seed, limit
        self.mechanism: str = "gaussian"
        self._memory: dict[tuple[object, ...], Observation] = {}
        first = self.build()
        self.claim = first.claim()
        self.mechanism = self.claim.mechanism
        self.own = Records("own records", first.records())
        self.shapes = first.shapes()
        numbers = sum(int(np.prod(shape)) for shape in self.shapes.values())
        if numbers > MOST_NUMBERS:
            wanted = f"at most {MOST_NUMBERS:,}: the contract is about code, so check it on a smaller model"
            raise MethodFailure("parameters()", f"holds {numbers:,} trained numbers; accepted: {wanted}")
        self.precision = float(torch.finfo(torch.float32).eps)
        self.offered = frozenset(name for name in OPTIONAL if first.offers(name))
        self.lacking = {name: lacking(first.trainer, name) for name in OPTIONAL if name not in self.offered}
        self.extremes = self._extremes(first)
        self.deterministic = self._deterministic()

    def build(self, records: Records | None = None, noise: int | None = 0) -> Subject:
        """A fresh trainer; `noise` counts noise seeds from 0, None = fresh noise."""
        items = list(records.items) if records is not None else None
        noise_seed = None if noise is None else self.seed * 1_000_003 + 1 + noise
        trainer = call("factory", self.factory, items, seed=self.seed, noise_seed=noise_seed, limit=self.limit)
        return Subject(trainer, self)

    def observe(
        self,
        batch: Sequence[int],
        *,
        records: Records | None = None,
        noise: int | None = 0,
        earlier: Sequence[Sequence[int]] = (),
        again: bool = False,
    ) -> Observation:
        """The step on `batch`, after the steps `earlier`, by a fresh trainer. `again` asks anew."""
        chosen = records or self.own
        key = (chosen.name, tuple(batch), noise, tuple(tuple(part) for part in earlier))
        if key not in self._memory or again or noise is None:
            subject = self.build(chosen, noise)
            for part in earlier:
                subject.ask("step", list(part))
            self._memory[key] = self.watch(subject, batch)
        return self._memory[key]

    def watch(self, subject: Subject, batch: Sequence[int]) -> Observation:
        """One step of a given trainer."""
        before = subject.parameters()
        subject.ask("step", list(batch))
        after = subject.parameters()
        if after.keys() != before.keys() or any(after[name].shape != before[name].shape for name in before):
            raise MethodFailure("parameters()", "returned other names or shapes after a step than before")
        moved = {name: after[name] - before[name] for name in before}
        released = subject.released(self.shapes)
        if self.mechanism == "zeroth-order":
            released = self._numbers(subject, released)
        scaled = {
            name: None if value is None else value * self.claim.expected_batch_size for name, value in released.items()
        }
        return Observation(scaled, moved, subject.applied())

    def _numbers(self, subject: Subject, released: dict[str, Vector | None]) -> dict[str, Vector | None]:
        """The private numbers of a zeroth-order step: as released, or the rank-one tensors along their line."""
        if not set(released) <= set(self.shapes) or "direction" not in self.offered:
            return released
        line = {str(name): _flat("direction()", name, tensor) for name, tensor in subject.ask("direction").items()}
        if set(line) != set(self.shapes):
            raise MethodFailure("direction()", "names other blocks than parameters()")
        z = np.concatenate([line[name] for name in sorted(line)])
        parts = [released[name] for name in sorted(line)]
        if any(part is None for part in parts):
            return dict.fromkeys(["number"])
        flat = np.concatenate([part for part in parts if part is not None])
        return {"number": np.array([float(flat @ z / (z @ z))])}

    def gradient(self, record: Any, records: Records | None = None) -> Vector:
        """One record's gradient at the initial parameters, blocks in name order."""
        subject = self.build(records or self.own)
        value = subject.ask("gradient", record)
        if not isinstance(value, Mapping) or set(value) != set(self.shapes):
            raise MethodFailure("gradient(record)", "must return one tensor for every name of parameters()")
        return np.concatenate([_flat("gradient(record)", name, value[name]) for name in sorted(value)])

    def replaced(self, index: int, stand_in: Any, name: str) -> Records:
        """The own data set with one record replaced."""
        items = list(self.own.items)
        items[index] = stand_in
        return Records(f"{index} -> {name}", tuple(items))

    def dropped(self, index: int) -> Records:
        """The own data set without one record."""
        return Records(f"without {index}", self.own.items[:index] + self.own.items[index + 1 :])

    @property
    def std(self) -> float:
        """sigma * C, or the scale of Laplace noise."""
        return self.claim.noise_multiplier * self.claim.max_grad_norm

    def size(self, vector: Vector) -> float:
        """Norm in which C bounds a contribution: L2, or L1 for Laplace; inf if anything is not finite."""
        if not np.isfinite(vector).all():
            return float("inf")
        return float(np.abs(vector).sum() if self.mechanism == "laplace" else np.linalg.norm(vector))

    def slack(self, *observations: Observation) -> float:
        """What rounding of the noisy sums may amount to in a difference of them."""
        finite = [np.nan_to_num(item.vector, posinf=0.0, neginf=0.0) for item in observations]
        return ROUNDING * self.precision * max(self.size(vector) for vector in finite)

    def _extremes(self, subject: Subject) -> tuple[Any, ...]:
        if "extreme_records" not in self.offered:
            return ()
        value = subject.ask("extreme_records")
        if not isinstance(value, Sequence):
            raise MethodFailure("extreme_records()", f"returned {_short(value)}; accepted: a list of records")
        return tuple(value)

    def _deterministic(self) -> bool:
        batch = range(min(3, len(self.own.items)))
        one, two = self.observe(batch), self.observe(batch, again=True)
        if one.noised != two.noised:
            return False
        gap = self.size(one.vector - two.vector)
        return gap <= self.slack(one, two) * 10


def _short(value: object) -> str:
    """Indices and numbers as they are; of all else the type alone: it may be a record, and a line may be logged."""
    if isinstance(value, list | tuple):
        shown = [_short(item) for item in value[: 3 if len(value) > 6 else 6]]
        return f"[{', '.join(shown)}{f', ... {len(value)} in all' if len(value) > 6 else ''}]"
    return repr(value) if value is None or type(value) in (bool, int, float) else f"a {type(value).__name__}"


def _flat(method: str, name: object, tensor: object) -> Vector:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise MethodFailure(method, f"{name!r} is {type(tensor).__name__}; accepted: a floating-point torch.Tensor")
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy(), dtype=np.float64).reshape(-1).copy()


def _names(method: str, value: object) -> frozenset[str]:
    if not isinstance(value, set | frozenset | list | tuple) or not all(isinstance(name, str) for name in value):
        raise MethodFailure(method, f"returned {_short(value)}; accepted: a set of parameter names")
    return frozenset(value)
