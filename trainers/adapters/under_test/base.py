"""What the three kinds of foreign training share: the trainer of the protocol around something that makes steps.

Whatever can't be worked out is not offered: the method is then None, and `unavailable` says why, so that a check can
print the reason instead of "not offered".
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test.backward import Passes
from trainers.adapters.under_test.frozen import FrozenNoise, Met, Public, Streams, thread_of
from trainers.adapters.under_test.loop import Feed, Loop
from trainers.adapters.under_test.releases import Releases

Records = Sequence[Any]
Gradient = dict[str, Tensor]
RecordSource = Records | Callable[[], Records]

CHECKPOINT = "how this code writes checkpoints is not known; pass save=(lambda state, path: ...) and load=(...)"
CANARIES = "no canaries(n, seed) was given: a function that makes n records to insert"
EXTREMES = "no extreme_records was given: records that push gradients as far as they go"


@dataclass(frozen=True)
class Extras:
    """What only the owner of the code can say; each opens further checks.

    canaries(n, seed) -> records. extreme_records: a list, or a function that makes it. save(state, path) and
    load(state, path): the owner's own checkpoints; `state` is what the adapter's kind of code has (see there).
    """

    canaries: Callable[[int, int], Records] | None = None
    extreme_records: RecordSource | None = None
    save: Callable[[Any, Path], None] | None = None
    load: Callable[[Any, Path], None] | None = None


class Source:
    """The owner's records, asked for once."""

    def __init__(self, records: RecordSource) -> None:
        self._given, self._list = records, list[Any]()

    def own(self) -> list[Any]:
        """All of them. Raises UsageError for what is no list of records."""
        if not self._list:
            value = self._given() if callable(self._given) else self._given
            if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
                raise rejected("records", type(value).__name__, "a list of records, a map-style dataset, or a function")
            self._list = [value[index] for index in range(len(value))]
        return self._list


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters with gradients by name, and the floating buffers that a checkpoint holds (running statistics)."""
    found: dict[str, Tensor] = {name: value for name, value in module.named_parameters() if value.requires_grad}
    kept = module.state_dict(keep_vars=True)
    found |= {
        name: value
        for name, value in module.named_buffers()
        if name in kept and value is not None and value.is_floating_point()
    }
    return found


class UnderTest:
    """Base of the trainers. Subclasses set `records`, `_claim` and `_parameters`, and say how a step is made."""

    kind = "training"

    def __init__(
        self, records: Records, *, seed: int, noise_seed: int | None, extras: Extras, public: Public | None = None
    ) -> None:
        self.records = list(records)
        self.seed, self.noise_seed, self._extras = seed, noise_seed, extras
        self.unavailable: dict[str, str] = {}
        self._streams = Streams(seed)
        self._frozen = None if noise_seed is None else FrozenNoise(noise_seed, public)
        self._end: Callable[[], object] | None = None
        self._releases, self._passes = Releases(), Passes()
        self._steps_done = 0
        self._injected: list[Mapping[str, Tensor]] = []
        self._last: dict[str, Tensor | None] = {}
        self._parameters: dict[str, Tensor] = {}
        self._claim: StepClaim
        for name, given, why in (
            ("canaries", extras.canaries, CANARIES),
            ("extreme_records", extras.extreme_records, EXTREMES),
            ("save", extras.save, CHECKPOINT),
            ("load", extras.load, CHECKPOINT),
        ):
            if given is None:
                self._refuse(name, why)

    def _refuse(self, name: str, why: str) -> None:
        """Not offered, for this reason."""
        self.unavailable[name] = why
        setattr(self, name, None)

    # -- The protocol ----------------------------------------------------------------------------------------------

    @property
    def claim(self) -> StepClaim:
        """What the code says of one of its steps."""
        return self._claim

    def parameters(self) -> Mapping[str, Tensor]:
        """Trained parameters, and floating buffers that a checkpoint holds."""
        return {name: value.detach() for name, value in self._parameters.items()}

    def released(self) -> Mapping[str, Tensor | None]:
        """Of the last step."""
        return self._last

    def step(self, indices: Sequence[int]) -> None:
        """One logical step of the loop on these records, as a set."""
        chosen = sorted(set(indices))
        injected, self._injected = self._injected, []
        self._steps_done += 1
        with self._streams.active():
            if self._frozen is not None:
                self._frozen.begin(self._steps_done)
            self._advance(chosen, injected)

    def _advance(self, chosen: list[int], injected: list[Mapping[str, Tensor]]) -> None:
        raise NotImplementedError

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """One more unit for the next step, before clipping."""
        self._injected.append(gradient)

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the trained parameters and nothing else."""
        with torch.no_grad():
            for name, value in parameters.items():
                self._parameters[name].copy_(value)

    def canaries(self, n: int, seed: int) -> Sequence[Any]:
        """The owner's."""
        assert self._extras.canaries is not None
        return list(self._extras.canaries(n, seed))

    def extreme_records(self) -> Sequence[Any]:
        """The owner's."""
        given = self._extras.extreme_records
        return list(given() if callable(given) else given or ())

    # -- For subclasses --------------------------------------------------------------------------------------------

    def _keep_released(self, chosen: list[int], *, divide: float = 1.0) -> None:
        """From what the optimisers read; a parameter that none of them read has no noise."""
        if self._releases.steps > 1:
            count = self._releases.steps
            raise UsageError(f"{self.kind}: {count} optimiser steps on one batch; accepted: one a batch that it takes")
        seen = self._releases.seen
        if not seen and chosen:
            raise UsageError(
                f"{self.kind}: asked for the next batch without an optimiser step on this one; accepted: a loop with "
                "one torch optimiser step a batch"
            )
        self._last = {
            name: seen[id(value)] / divide if id(value) in seen else None for name, value in self._parameters.items()
        }

    def _full(self, gradient: Mapping[str, Tensor]) -> Gradient:
        """With zeros for what has no gradient (buffers, unused parameters)."""
        return {
            name: gradient[name].detach().to(value.dtype) if name in gradient else torch.zeros_like(value)
            for name, value in self.parameters().items()
        }

    def _in_thread(self, body: Callable[[Feed], Any]) -> Loop:
        """The loop, ended when this trainer is collected."""
        passes, frozen = self._passes, self._frozen

        def wrap(function: Callable[[], None]) -> Callable[[], None]:
            return thread_of(frozen, _entered(passes, function))

        loop = Loop(self.kind, body, wrap)
        self._end = weakref.finalize(self, loop.close)
        return loop

    def note(self, met: Met) -> None:
        """Make this trainer a rehearsal."""
        assert self._frozen is not None
        self._frozen.met = met

    def close(self) -> None:
        """End its loop; no step can follow."""
        if self._end is not None:
            self._end()


def _entered(mode: Any, function: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with mode:
            function()

    return run


class Scratch:
    """A second construction, on which gradients and losses are read off without touching the first.

    Built for a data set once; before each question it gets the parameters of the trainer that asks. A record that is
    not in the data set takes the place of its first one, in a construction of its own.
    """

    def __init__(self, build: Callable[[Records], UnderTest]) -> None:
        self._build = build
        self._built: list[tuple[list[Any], UnderTest]] = []

    def ready(self, trainer: UnderTest, record: Any) -> tuple[UnderTest, int]:
        """(trainer with the asker's parameters, index of the record in it)."""
        items = trainer.records
        index = next((place for place, item in enumerate(items) if item is record), None)
        if index is None:
            index, items = 0, [record, *items[1:]]
        found = next((built for held, built in self._built if _same(held, items)), None)
        if found is None:
            found = self._build(items)
            self._built = [*self._built[-3:], (items, found)]
        found.assign(trainer.parameters())
        return found, index


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))


def unit_from(claim: StepClaim | None, changes: Mapping[str, Any]) -> StepClaim | None:
    """A stated claim; both at once make no sense."""
    if claim is not None and changes:
        raise UsageError(f"claim: stated, so {next(iter(changes))}= has no effect; accepted: one of the two")
    return claim


def names(values: Iterable[object]) -> str:
    """For messages."""
    return ", ".join(type(value).__name__ for value in values)
