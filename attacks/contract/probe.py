"""Asking a trainer under test: fresh trainers, one observation a question, everything validated at the door.

An observation is what one step released, under given records, batch, noise seed and earlier batches. No trainer that
was asked one question is asked another one that it could remember the first by, so that parameters are equal whenever
the contract says so; answers are memoised. Where a trainer can be copied (and the copy was seen to behave like the
original) a slow factory is called once a data set and noise seed, and a training is branched off instead of repeated.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.contract.guard import TIME_LIMIT, MethodFailure, call
from attacks.contract.subject import Subject, flat, short
from attacks.contract.subject import Vector as Vector
from dpaudit.errors import UsageError
from trainers.protocol import OPTIONAL, lacking

# What a released number may lose, in units of its type's own precision (float32: 1e-6, some operations on 2^-23), and
# what a contribution may differ by, relatively.
ROUNDING = 8.0
AGREEMENT = 1e-3

# About 250 observations are remembered, 16 bytes a number each.
MOST_NUMBERS = 3_000_000
MOST_REMEMBERED = 400_000_000  # numbers in all; what is seen beyond is asked again when it is needed again
SLOW_BUILD = 0.02  # seconds; a factory that takes longer is called once for each data set and noise seed
MOST_COPIED = 500_000_000  # bytes of a trainer; a larger one is built anew
STRIDE = 10_007  # between noise seeds, so that seed + step of one training does not meet that of another


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

    @property
    def numbers(self) -> int:
        """How many are remembered."""
        return sum(part.size for part in self.moved.values()) * 2


Key = tuple[str, int | None]
Batch = tuple[int, ...]


class Probe:
    """A factory with its seeds, limits and the memory of what was asked.

    target: the factory as `module:name`, by which a process of its own can build it; None = only this process can.
    """

    def __init__(
        self, factory: Callable[..., Any], *, seed: int = 0, limit: float = TIME_LIMIT, target: str | None = None
    ) -> None:
        if not callable(factory):
            raise UsageError(f"factory: got {short(factory)}; accepted: a callable factory(records=None, *, seed)")
        self.factory, self.seed, self.limit, self.target = factory, seed, limit, target
        self.mechanism: str = "gaussian"
        self.appeared: set[str] = set()
        self.unanswered: str | None = None  # what epsilon() said nothing to within its time limit
        self.unheard: str | None = None  # what parameters() showed after they were set, where that was something else
        self.builds, self.build_seconds, self.steps = 0, 0.0, 0
        self._memory: dict[tuple[object, ...], Observation] = {}
        self._remembered = 0
        self._pristine: dict[Key, Subject] = {}
        self._grown: dict[tuple[Key, tuple[Batch, ...]], Subject] = {}
        self.copyable = False
        first = self.build()
        self.claim = first.claim()
        self.mechanism = self.claim.mechanism
        self.own = Records("own records", first.records())
        self.shapes = first.shapes()
        numbers = sum(int(np.prod(shape)) for shape in self.shapes.values())
        if numbers > MOST_NUMBERS:
            wanted = f"at most {MOST_NUMBERS:,}: the contract is about code, so check it on a smaller model"
            raise MethodFailure("parameters()", f"holds {numbers:,} trained numbers; accepted: {wanted}")
        self.start = first.parameters()
        self.precision = float(torch.finfo(torch.float32).eps)
        self.offered = frozenset(name for name in OPTIONAL if first.offers(name))
        self.lacking = {name: lacking(first.trainer, name) for name in OPTIONAL if name not in self.offered}
        self.extremes = self._extremes(first)
        self.copyable = self._copyable(first)
        self.deterministic = self._deterministic()
        self.coarsest = self._coarsest()

    @property
    def agreement(self) -> float:
        """What a unit's contribution may differ by, relatively, when it is computed beside others.

        The same gradient in a larger batch is rounded differently, which counts where a step computes in bfloat16.
        """
        return max(AGREEMENT, 2.0 * self.coarsest)

    @property
    def slow(self) -> bool:
        """Whether the factory's time counts."""
        return self.builds > 0 and self.build_seconds / self.builds > SLOW_BUILD

    def noise_seed(self, noise: int | None) -> int | None:
        """What the factory is handed for the noise seed number `noise`."""
        return None if noise is None else self.seed * 1_000_003 + 1 + noise * STRIDE

    def build(self, records: Records | None = None, noise: int | None = 0) -> Subject:
        """A fresh trainer; `noise` counts noise seeds from 0, None = fresh noise."""
        key = (records.name if records is not None else "", noise)
        if self.copyable and self.slow and noise is not None:
            if key not in self._pristine:
                self._pristine[key] = self._built(records, noise)
            return self._pristine[key].twin()
        return self._built(records, noise)

    def _built(self, records: Records | None, noise: int | None) -> Subject:
        items = list(records.items) if records is not None else None
        began = time.monotonic()
        seeds = {"seed": self.seed, "noise_seed": self.noise_seed(noise)}
        trainer = call("factory", self.factory, items, limit=self.limit, **seeds)
        self.builds, self.build_seconds = self.builds + 1, self.build_seconds + time.monotonic() - began
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
        path = tuple(tuple(part) for part in earlier)
        key = (chosen.name, tuple(batch), noise, path)
        if key in self._memory and not again and noise is not None:
            return self._memory[key]
        seen = self.watch(self.grown(path, chosen, noise), batch)
        if self._remembered < MOST_REMEMBERED:
            self._memory[key] = seen
            self._remembered += seen.numbers
        return seen

    def grown(self, path: tuple[Batch, ...], records: Records | None = None, noise: int | None = 0) -> Subject:
        """A trainer of its own that has made the steps `path`."""
        chosen = records or self.own
        if not path:
            return self.build(chosen, noise)
        key = ((chosen.name, noise), path)
        if key in self._grown:
            return self._grown[key].twin()
        subject = self.build(chosen, noise)
        for part in path:
            subject.ask("step", list(part))
            self.steps += 1
        if self.copyable and noise is not None and len(path) > 1:
            if len(self._grown) >= 24:
                del self._grown[next(iter(self._grown))]
            self._grown[key] = subject.twin()
        return subject

    def course(
        self, path: Sequence[Sequence[int]], *, records: Records | None = None, noise: int | None = 0
    ) -> list[Observation]:
        """A whole training of a fresh trainer on the batches `path`, observed at every step."""
        subject = self.build(records or self.own, noise)
        return [self.watch(subject, batch) for batch in path]

    def watch(self, subject: Subject, batch: Sequence[int]) -> Observation:
        """One step of a given trainer."""
        before = subject.parameters()
        subject.ask("step", list(batch))
        self.steps += 1
        after = subject.parameters()
        if any(after[name].shape != value.shape for name, value in before.items() if name in after):
            raise MethodFailure("parameters()", "returned other shapes after a step than before")
        if missing := before.keys() - after.keys():
            raise MethodFailure("parameters()", f"no longer names {min(missing)!r} after a step")
        self.appeared |= after.keys() - self.shapes.keys()
        moved = {name: after[name] - before[name] for name in before if name in self.shapes}
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
        line = {str(name): flat("direction()", name, tensor) for name, tensor in subject.ask("direction").items()}
        if set(line) != set(self.shapes):
            raise MethodFailure("direction()", "names other blocks than parameters()")
        z = np.concatenate([line[name] for name in sorted(line)])
        parts = [released[name] for name in sorted(line)]
        if any(part is None for part in parts):
            return dict.fromkeys(["number"])
        whole = np.concatenate([part for part in parts if part is not None])
        return {"number": np.array([float(whole @ z / (z @ z))])}

    def gradient(self, record: Any, subject: Subject | None = None) -> Vector:
        """One record's gradient at the initial parameters, or at those of `subject`; blocks in name order."""
        value = (subject or self.build(self.own)).ask("gradient", record)
        if not isinstance(value, Mapping) or set(value) != set(self.shapes):
            raise MethodFailure("gradient(record)", "must return one tensor for every name of parameters()")
        return np.concatenate([flat("gradient(record)", name, value[name]) for name in sorted(value)])

    def replaced(self, index: int, stand_in: Any, name: str) -> Records:
        """The own data set with one record replaced."""
        items = list(self.own.items)
        items[index] = stand_in
        return Records(f"{index} -> {name}", tuple(items))

    def dropped(self, index: int) -> Records:
        """The own data set without one record."""
        return Records(f"without {index}", self.own.items[:index] + self.own.items[index + 1 :])

    @property
    def public_size(self) -> bool:
        """Whether the number of units is public under the claimed relation: neighbours then have equal sizes."""
        return self.claim.relation in ("replace", "zero-out")

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
            raise MethodFailure("extreme_records()", f"returned {short(value)}; accepted: a list of records")
        return tuple(value)

    def _deterministic(self) -> bool:
        batch = range(min(3, len(self.own.items)))
        # By two builds: copies of one trainer would agree whatever the factory does.
        one, two = self.observe(batch), self.watch(self._built(self.own, 0), batch)
        if one.noised != two.noised:
            return False
        gap = self.size(one.vector - two.vector)
        return gap <= self.slack(one, two) * 10

    def _copyable(self, original: Subject) -> bool:
        """Whether two copies, made after a step, go on exactly as the original does afterwards."""
        try:
            if original.bytes() > MOST_COPIED:
                return False
            self.watch(original, [0, 1])
            copies = [original.twin(), original.twin()]
            seen = [[self.watch(one, batch) for batch in ([0, 2], [1])] for one in (*copies, original)]
        # Foreign objects decide what copying them raises; a step that fails will fail again when it counts.
        except Exception:
            return False
        return all(_same(mine, theirs) for pair in seen[:2] for mine, theirs in zip(pair, seen[2], strict=True))

    def _coarsest(self) -> float:
        """The precision of the coarsest floating-point type that a step computes in, as far as PyTorch shows it."""
        watcher = _Types()
        try:
            subject = self.build(self.own)
            with watcher:
                subject.ask("step", [0, 1])
        except MethodFailure:  # a step that can't run under a dispatch mode runs without one elsewhere
            return self.precision
        return max(self.precision, watcher.coarsest)


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest floating-point type of a result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: hiding this mode from torch.compile would import all of it, which takes seconds in every process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float16, torch.bfloat16) and result.numel() > 1:
            self.coarsest = max(self.coarsest, float(torch.finfo(result.dtype).eps))
        return result


def _same(one: Observation, two: Observation) -> bool:
    if one.noised != two.noised or one.applied != two.applied or not np.array_equal(one.vector, two.vector):
        return False
    return all(np.array_equal(value, two.moved[name]) for name, value in one.moved.items())
