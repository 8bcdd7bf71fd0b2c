"""Whole trainings on fixed batches: the noise of every step, two histories, and steps that branch off from them.

Under one noise seed an empty batch releases the noise of its step and nothing else, whatever the parameters. So the
releases of a training on empty batches alone are the noise of every step, and what any other training releases under
that seed, minus that noise, is its clipped sum: exactly, at every step, without a second trainer at equal parameters.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Batch, Observation, Probe, Records, Vector

STEPS = 24
STAGES = {"in the middle": 12, "late": 24}  # step of a history that is branched; "early" is step 1
NOISE_STEPS, LONGEST, FAST = 24, 500, 0.004  # steps, steps, seconds of one
QUICK_TRIES = 20  # steps that are timed; the fastest counts
FAST_BATCH, BATCH_TRIES = 0.05, 3  # seconds of a batch of the expected size, of which more than a thousand may follow
FREE = 120  # steps that a quick trainer takes where its claim names fewer, or none
MOST_HELD = 40_000_000  # numbers of the noise of every step
LARGEST = 64  # a quick trainer's batch of this size costs little; all are looked at up to REACH x the expected size
REACH = 3.0
LEAST_BRANCHES = 3  # fewer are looked at by as many trainers

# Sizes of the batches of a history; "large" and "expected" follow the claim. A unit comes again and again.
PATTERN = (1, "expected", 2, 0, "large", 0, 5, 1, "expected", 0, 2, "large", 1, 0, "expected", 5, 1, 0, "large", 2)


class Training:
    """Batches of two histories over `records`, none of which holds the unit `outside`.

    longest: steps of the longest training that is compared with noise. empties: whether an empty batch is a step.
    """

    def __init__(self, probe: Probe, outside: int, longest: int, *, empties: bool) -> None:
        self.probe, self.outside, self.empties = probe, outside, empties
        expected = probe.claim.expected_batch_size
        varying = probe.claim.sampling in ("poisson", "allocation")
        self.wanted = max(1, math.ceil(REACH * expected if varying else expected))
        self.copies, self.records = 1, probe.own
        self._enlarge()
        order = np.random.default_rng([probe.seed, 23]).permutation(len(self.records.items))
        self.pool = [int(index) for index in order if index != outside]
        self.largest = min(len(self.pool), max(self.wanted, LARGEST if varying and self.quick_batches else 6))
        self.longest = longest

    def _enlarge(self) -> None:
        """Repeat the records, as units of their own, where they are fewer than the largest batch."""
        own = self.probe.own
        copies = math.ceil(self.wanted / len(own.items))
        if copies > 1:
            records = Records(f"own records x {copies}", own.items * copies)
            # A trainer may hold no more than its declared public size.
            with contextlib.suppress(MethodFailure):
                self.probe.observe([0, len(own.items)], records=records)
                self.copies, self.records = copies, records

    def beside(self, neighbour: Records | None) -> Records:
        """The records of the trainings, with the first copy of the own ones changed into a neighbour of theirs."""
        if neighbour is None:
            return self.records
        if self.copies == 1:
            return neighbour
        return Records(f"{neighbour.name}, x {self.copies}", neighbour.items + self.probe.own.items * (self.copies - 1))

    @property
    def reached(self) -> bool:
        """Whether the largest batch is as large as the claim's."""
        return self.largest >= math.ceil(self.probe.claim.expected_batch_size) - 1

    @cached_property
    def sizes(self) -> list[int]:
        """Batch sizes that are looked at: 1, 2, 4, ... up to the largest."""
        sizes = [1]
        while sizes[-1] < self.largest:
            sizes.append(min(2 * sizes[-1], self.largest))
        return sizes

    @cached_property
    def every_size(self) -> list[list[int]]:
        """A quick trainer's batches of 1, 2, 3, ... up to `largest` units, each with one unit more; none of others."""
        return [sorted(self.pool[:size]) for size in range(1, self.largest + 1)] if self.quick_batches else []

    @property
    def looked_at(self) -> str:
        """The sizes of batches in the first step, for a line."""
        return (
            f"of every size up to {self.largest}"
            if self.quick_batches
            else f"of {', '.join(map(str, self.sizes))} units"
        )

    @cached_property
    def batches(self) -> list[list[int]]:
        """STEPS batches of several sizes."""
        return self._batches(0)

    @cached_property
    def others(self) -> list[list[int]]:
        """The same sizes with other units."""
        return self._batches(len(self.pool) // 2)

    def _batches(self, first: int) -> list[list[int]]:
        expected = round(self.probe.claim.expected_batch_size)
        large = min(self.largest, max(5, math.ceil(2.5 * self.probe.claim.expected_batch_size)))
        rolled = [*self.pool[first:], *self.pool[:first]]
        batches, start = [], 0
        for step in range(STEPS):
            size = PATTERN[step % len(PATTERN)]
            if size == 0 and not self.empties:
                size = 1
            if size == "large":
                size = large if step != 4 else self.largest
            elif size == "expected":
                size = min(self.largest, max(1, expected))
            start = start if isinstance(size, int) and size <= 2 else start + 3  # small batches meet the same units
            batches.append([rolled[(start + place) % len(rolled)] for place in range(min(int(size), len(rolled)))])
        return batches

    @cached_property
    def noise(self) -> list[Observation]:
        """The training on empty batches under the first noise seed: the noise of every step.

        As long as the longest sweep, and as all claimed steps where steps are quick. A trainer may end where its claim
        does, with its learning-rate schedule or its loader: what it takes is then all that is looked at.
        """
        subject, least, seen = self.probe.build(self.probe.own, 0), max(NOISE_STEPS, self.probe.claim.steps or 0), []
        for step in range(1, self._length + 1):
            try:
                seen.append(self.probe.watch(subject, []))
            except MethodFailure as failure:
                if step > least:
                    break
                needed = f"the contract takes {least} steps, whatever number the claim names"
                raise MethodFailure(failure.method, f"{failure.problem}; in step {step}, and {needed}") from failure
        return seen

    @cached_property
    def quick(self) -> bool:
        """Whether a step takes so little that hundreds of them may be watched: by the fastest of several, since another
        process can only make a step slower."""
        if not self.empties:
            return False
        subject = self.probe.build(self.probe.own)
        subject.ask("step", [])
        taken = []
        for _ in range(QUICK_TRIES):
            began = time.process_time()
            try:
                self.probe.watch(subject, [])
            except MethodFailure:  # the claim has no more steps
                break
            taken.append(time.process_time() - began)
        return min(taken, default=math.inf) < FAST

    @cached_property
    def quick_batches(self) -> bool:
        """Whether batches take so little as well that more than a thousand of them may be watched.

        An empty one may cost nothing where a batch takes seconds. By the clock: an accelerator works while the process
        waits.
        """
        if not self.quick:
            return False
        expected = min(len(self.pool), max(1, round(self.probe.claim.expected_batch_size)))
        subject, taken = self.probe.build(self.records), []
        for _ in range(BATCH_TRIES):
            began = time.perf_counter()
            try:
                self.probe.watch(subject, sorted(self.pool[:expected]))
            except MethodFailure:
                break
            taken.append(time.perf_counter() - began)
        return min(taken, default=math.inf) < FAST_BATCH

    @property
    def _length(self) -> int:
        held = max(NOISE_STEPS, MOST_HELD // max(1, sum(value.size for value in self.probe.start.values())))
        claimed = min(LONGEST, max(FREE, self.probe.claim.steps or FREE))
        return min(held, max(NOISE_STEPS, self.longest + 1, claimed if self.quick else 0))

    @cached_property
    def first(self) -> list[Observation]:
        """The first history."""
        return self.probe.course(self.batches, records=self.records)

    @cached_property
    def second(self) -> list[Observation]:
        """The second history."""
        return self.probe.course(self.others, records=self.records)

    def at(
        self, step: int, batch: Sequence[int], *, records: Records | None = None, noise: int | None = 0
    ) -> Observation:
        """The release of `batch` in step `step` of the first history; `records`: a neighbour of the own ones."""
        earlier = self.batches[: step - 1]
        return self.probe.observe(batch, records=self.beside(records), noise=noise, earlier=earlier)

    def releases(self, step: int, batches: Sequence[Sequence[int]]) -> list[Observation]:
        """What each of `batches` releases in `step` of the first history. How parameters move is not meant to be read.

        A trainer that can't be copied would repeat the history for each of them. One that repeats it once is set back
        to the parameters of that step before every batch instead; each release then has the noise of a later step,
        which is known, in place of that of `step`. The largest batch comes first and again last: unless both agree,
        something else than the parameters was left behind, and the history is repeated after all.
        """
        wanted = list(dict.fromkeys(tuple(batch) for batch in batches))
        found: dict[Batch, Observation] = {}
        room = len(self.noise) - step - 1 if self.empties and not self.probe.copyable else 0  # later steps, known noise
        if room > 0 and step > 1 and len(wanted) >= LEAST_BRANCHES:
            control = max(wanted, key=len)
            others = [batch for batch in wanted if batch != control]
            for start in range(0, len(others), room):
                found |= self._set_back(step, [control, *others[start : start + room], control])
        return [found[key] if (key := tuple(batch)) in found else self.at(step, batch) for batch in batches]

    def _set_back(self, step: int, batches: Sequence[Batch]) -> dict[Batch, Observation]:
        """Each of `batches` in `step`, by one trainer; nothing where the first and the last, which are one, differ."""
        subject = self.probe.grown(tuple(map(tuple, self.batches[: step - 1])), self.records)
        meant, own = subject.parameters(), self.noise[step - 1]
        found: list[Observation] = []
        for place, batch in enumerate(batches):
            if place and not subject.put(meant):
                return {}
            seen, noise = self.probe.watch(subject, batch), self.noise[step - 1 + place]
            if not seen.noised == noise.noised == own.noised:
                return {}
            found.append(_with_noise(seen, noise, own))
        if not self.probe.size(found[0].vector - found[-1].vector) <= self.slack(step, found[0], found[-1]):
            return {}
        return dict(zip(batches[:-1], found[:-1], strict=True))

    def signal(self, step: int, seen: Observation) -> Vector:
        """Clipped sum: release minus noise, on the blocks that were noised in both; others count as they are."""
        return seen.vector - self.noise[step - 1].vector

    def slack(self, step: int, *seen: Observation) -> float:
        """Rounding of a signal."""
        return self.probe.slack(self.noise[step - 1], *seen)

    def comparable(self, step: int, *seen: Observation) -> bool:
        """Whether the same blocks were noised in all of them (which ones may follow earlier releases)."""
        return all(item.noised == self.noise[step - 1].noised for item in seen)


def _with_noise(seen: Observation, noise: Observation, other: Observation) -> Observation:
    """An observation with the noise of another step in place of its own; all have the same noised blocks."""

    def changed(name: str, value: Vector | None) -> Vector | None:
        out, into = noise.released[name], other.released[name]
        return value if value is None or out is None or into is None else value - out + into

    return replace(seen, released={name: changed(name, value) for name, value in seen.released.items()})
