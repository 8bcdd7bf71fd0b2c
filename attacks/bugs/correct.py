"""Correct trainers that look suspicious: each keeps the guarantee, and no check may alarm on any of them.

Several are the correct twin of a planted bug: `Accumulated` of the faults between logical and physical batches,
`TiedHead` of the norm without a cross term, `LateHead` of a head unfrozen without noise. The docstrings say why the
guarantee holds; tests/attacks/bugs/test_correct.py computes it independently of the step contract.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpaudit.documents import Relation
from trainers.adapters.compact import (
    FEATURES,
    PUBLIC_SIZE,
    SHAPES,
    SIZES,
    Allocated,
    Bools,
    Compact,
    Record,
    join,
    split,
)

TOTAL = sum(SIZES.values())
HEAD = ("w2", "b2")
ON_HEAD = torch.cat([torch.full((size,), float(name in HEAD)) for name, size in SIZES.items()])


# -- the step --------------------------------------------------------------------------------------------------------


class Accumulated(Compact):
    """Physical batches of at most `physical` units: every unit clipped by itself, sums added, noise once."""

    physical = 8

    def step(self, indices: Sequence[int]) -> None:
        """One logical batch."""
        self.step_count += 1
        batch = [self.records[index] for index in self.units_of(indices)]
        chunks = [batch[start : start + self.physical] for start in range(0, len(batch), self.physical)] or [[]]
        self.chunks = len(chunks)
        total = torch.zeros(TOTAL)
        for place, chunk in enumerate(chunks):
            gradients = self.unit_gradients(chunk)
            if self.injected and place == len(chunks) - 1:
                gradients = torch.cat([gradients, torch.stack(self.injected)])
                self.injected = []
            total = self.add(total, self.chunk_sum(gradients, place), place)
        noisy = self.normalise(total + self.noise(), len(batch))
        self.last = dict(split(noisy))
        self.update(noisy, total)

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        """What one physical batch adds to the sum; `place` counts from 0."""
        return self.clip(gradients).sum(dim=0)

    def add(self, total: Tensor, part: Tensor, place: int) -> Tensor:
        """The sum so far and one more physical batch."""
        return total + part


class Autocast(Compact):
    """bf16 autocast: forward and backward in bfloat16, per-unit gradients cast up, norm, sum and noise in float32."""

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """As the parent's, with products rounded to bfloat16."""
        low = torch.bfloat16
        blocks = {name: value.to(low) for name, value in split(self.weights).items()}
        hidden = torch.tanh(x.to(low) @ blocks["w1"].T + blocks["b1"])
        error = ((hidden @ blocks["w2"] + blocks["b2"]).float() - y).to(low)
        back = error[:, None] * blocks["w2"] * (1 - hidden.square())
        w1 = torch.einsum("rh,rf->rhf", back, x.to(low)).flatten(1)
        return torch.cat([w1, back, error[:, None] * hidden, error[:, None]], dim=1).float()


class SharesOfNoise(Compact):
    """Four workers add sigma C / 2 each, every one from a stream of its own: variances add up to (sigma C)^2."""

    workers = 4

    def block_noise(self, name: str) -> Tensor:
        """The sum of the workers' shares, of variance 1."""
        shares = [
            torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=name, rank=rank))
            for rank in range(self.workers)
        ]
        return torch.stack(shares).sum(dim=0) / math.sqrt(self.workers)


class SystemSeeded(Compact):
    """A torch generator: seeded by the operating system in production, by (noise_seed, step) when under test."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.frozen = noise_seed is not None
        self.generator = torch.Generator()
        self.generator.seed()

    def noise(self) -> Tensor:
        """(61,) from the generator, in the order of the blocks."""
        if self.frozen:
            entropy = self.key.uniform(1, step=self.step_count, name="", purpose="torch")[0]
            self.generator.manual_seed(int(entropy * 2**53))
        return self.noise_std() * torch.randn(TOTAL, generator=self.generator)


class TiedHead(Compact):
    """The head uses b1 a second time (tied), plus a correction w2; gradients of both uses add up, then clip."""

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(R, 61): out = tanh(x w1' + b1) (b1 + w2) + b2."""
        w1, first, second, b2 = self.parts(x, y)
        return torch.cat([w1, first + second, second, b2], dim=1)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of w1, of b1 as a bias, of b1 (and of w2) as a head, of b2."""
        blocks = split(self.weights)
        hidden = torch.tanh(x @ blocks["w1"].T + blocks["b1"])
        head = blocks["b1"] + blocks["w2"]
        error = hidden @ head + blocks["b2"] - y
        back = error[:, None] * head * (1 - hidden.square())
        w1 = torch.einsum("rh,rf->rhf", back, x).flatten(1)
        return w1, back, error[:, None] * hidden, error[:, None]


class BlockBudgets(Compact):
    """Each of the four blocks is clipped to C / 2: together at most C, whatever the gradient."""

    def clip(self, gradients: Tensor) -> Tensor:
        """Block by block; a unit that is not finite contributes nothing."""
        finite = torch.isfinite(gradients.norm(dim=1))[:, None]
        kept = torch.where(finite, gradients, torch.zeros_like(gradients))
        limit = self.max_grad_norm / math.sqrt(len(SIZES))
        parts = torch.split(kept, list(SIZES.values()), dim=1)
        return torch.cat([part * (limit / part.norm(dim=1).clamp(min=limit))[:, None] for part in parts], dim=1)


class AugmentedInside(Compact):
    """Each question comes with three augmented copies of its own; their mean is the unit's gradient, clipped once."""

    shifts = (0.0, 0.1, -0.1)

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        """Mean over the copies, before clipping."""
        copies = [super(AugmentedInside, self).unit_gradients(self.shifted(batch, shift)) for shift in self.shifts]
        return torch.stack(copies).mean(dim=0)

    @staticmethod
    def shifted(batch: Sequence[Record], shift: float) -> list[Record]:
        """Brighter or darker: a function of the record alone."""
        return [Record(record.x + shift, record.y) for record in batch]


class StepDropout(Compact):
    """Dropout of input features with one public mask a step, the same for every unit: no unit reaches another's."""

    def rows(self, batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With masked features."""
        x, y, owner, weight = super().rows(batch)
        mask = np.random.default_rng([41, self.step_count]).random(FEATURES) < 0.8
        return x * torch.from_numpy(mask / 0.8).float(), y, owner, weight

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """Of the next step."""
        self.step_count += 1
        try:
            return super().gradient(record)
        finally:
            self.step_count -= 1


class DoublePrecision(Compact):
    """The sum, the noise and the weights in float64."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.weights = self.weights.double()
        self.velocity = self.velocity.double()

    def rows(self, batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, targets and weights as float64."""
        x, y, owner, weight = super().rows(batch)
        return x.double(), y.double(), owner, weight.double()

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        """(U, 61) float64."""
        x, y, owner, weight = self.rows(batch)
        rows = self.row_gradients(x, y) * weight[:, None]
        return torch.zeros(len(batch), TOTAL, dtype=torch.float64).index_add(0, owner, rows)

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """In float64."""
        self.weights = join(parameters).double()


class ReplaceOne(Compact):
    """Claims replace-one, for which a unit moves the sum by 2C, and is accounted as that; n is public."""

    relation: Relation = "replace"


class LateHead(Compact):
    """The head is frozen for 8 steps and trained afterwards; it then counts in the norm and is noised like the rest."""

    start = 8

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        """Nothing for the head while it is frozen."""
        gradients = super().unit_gradients(batch)
        frozen = self.step_count <= self.start
        return torch.where(ON_HEAD > 0, torch.zeros_like(gradients), gradients) if frozen else gradients

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """Of the next step."""
        self.step_count += 1
        try:
            return super().gradient(record)
        finally:
            self.step_count -= 1

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """A frozen head gets no noise, is not released and does not move."""
        if self.step_count <= self.start:
            self.last = {name: None if name in HEAD else value for name, value in self.last.items()}
            noisy = noisy * (1 - ON_HEAD)
        super().update(noisy, clean_sum)
        if self.step_count <= self.start:
            self.updated = self.updated - set(HEAD)


class FrozenBody(Compact):
    """Only the head is trained, as with an adapter: the body is no parameter, is not released and never moves."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        """(U, 61), zero for the body."""
        gradients = super().unit_gradients(batch)
        return torch.where(ON_HEAD > 0, gradients, torch.zeros_like(gradients))

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """Of the head."""
        return only_head(super().gradient(record))

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """A gradient of the head."""
        super().inject({name: gradient.get(name, torch.zeros(SHAPES[name])) for name in SHAPES})

    def parameters(self) -> Mapping[str, Tensor]:
        """Of the head."""
        return only_head(super().parameters())

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Of the head; the body keeps its weights."""
        self.weights = join({**split(self.weights), **parameters})

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """The body keeps its weights."""
        self.last = {name: self.last[name] for name in HEAD}
        self.updated = set(HEAD)
        self.weights = self.weights - self.learning_rate * ON_HEAD * noisy

    select = None  # type: ignore[assignment]


def only_head(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's blocks."""
    return {name: blocks[name] for name in HEAD}


# -- sampling --------------------------------------------------------------------------------------------------------


class SizeThenSubset(Compact):
    """A size from Binomial(n, q), then a uniform subset of that size: exactly Poisson sampling. In no order."""

    def sample(self) -> list[int]:
        """Unsorted."""
        size = self.sampler.binomial(len(self.records), self.sample_rate)
        return [int(index) for index in self.sampler.choice(len(self.records), size=size, replace=False)]


class AllocatedTwice(Allocated):
    """Random allocation of two of the twenty steps of an epoch, by drawing both one after the other."""

    epoch_steps = 20
    draws = 2

    def assigned(self, units: int, steps: int) -> Bools:
        """The second draw is among the steps that the first one left."""
        held = np.zeros((units, steps), dtype=bool)
        first, second = self.sampler.integers(steps, size=units), self.sampler.integers(steps - 1, size=units)
        held[np.arange(units), first] = held[np.arange(units), second + (second >= first)] = True
        return held


class GeometricGaps(Compact):
    """Poisson sampling by skipping: gaps between members are Geometric(q). Sorted, one draw a member."""

    def sample(self) -> list[int]:
        """Sorted by construction."""
        chosen, place = [], -1
        while (place := place + int(self.sampler.geometric(self.sample_rate))) < len(self.records):
            chosen.append(place)
        return chosen


class PublicSlots(Compact):
    """A sampler over 1.5 x the declared size: slots that hold no record stay empty, so q and B follow no private n."""

    slots = 3 * PUBLIC_SIZE // 2

    def sample(self) -> list[int]:
        """Slots beyond the records in use are drawn and dropped."""
        drawn = np.flatnonzero(self.sampler.random(max(self.slots, len(self.records))) < self.sample_rate)
        return [int(index) for index in drawn[::-1] if index < len(self.records)]
