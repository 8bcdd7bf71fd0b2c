"""Planted bugs of state outside the parameters: what one step leaves reaches a later one, past clipping or noise."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from attacks.bugs.correct import ON_HEAD, LateHead
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import FEATURES, SHAPES, Compact, Record, join, split

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def losses(trainer: Compact, batch: Sequence[Record]) -> Tensor:
    """(U,) mean squared error of each unit under the present weights, at most 1e6."""
    x, y, owner, weight = Compact.rows(trainer, batch)
    blocks = split(trainer.weights)
    out = torch.tanh(x @ blocks["w1"].T + blocks["b1"]) @ blocks["w2"] + blocks["b2"]
    rows = torch.nan_to_num((out - y).square(), 1e6, 1e6, 1e6).clamp(max=1e6) * weight
    return torch.zeros(len(batch)).index_add(0, owner, rows)


class ClippedRestReturned(Compact):
    """Error feedback: what clipping cut off is kept and added, unclipped, to the sum of the next batch."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.rest = torch.zeros_like(self.weights)

    def clip(self, gradients: Tensor) -> Tensor:
        kept = super().clip(gradients)
        held, self.rest = self.rest, torch.nan_to_num(gradients - kept, 0.0, 0.0, 0.0).sum(dim=0)
        return torch.cat([kept, held[None]])


class RunningStatistics(Compact):
    """Features are centred by a running mean of the raw batches seen so far: a buffer, and no parameter."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.centre = torch.zeros(FEATURES)

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        return x - self.centre, y, owner, weight

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        x = Compact.rows(self, [self.records[index] for index in self.units_of(indices)])[0]
        if len(x):
            self.centre = 0.9 * self.centre + 0.1 * torch.nan_to_num(x, 0.0, 0.0, 0.0).mean(dim=0)


class RateFollowsLoss(Compact):
    """ReduceLROnPlateau on the exact loss of the training batch: halved when a batch is no better than the best."""

    best = float("inf")

    def step(self, indices: Sequence[int]) -> None:
        batch = [self.records[index] for index in self.units_of(indices)]
        if batch:
            loss = float(losses(self, batch).mean())
            if loss > self.best:
                self.learning_rate = max(1e-3, self.learning_rate / 2)
            self.best = min(self.best, loss)
        super().step(indices)


class BadStepsUndone(Compact):
    """A step after which the exact loss of the batch is higher is undone: whether the weights move tells the loss."""

    def step(self, indices: Sequence[int]) -> None:
        batch = [self.records[index] for index in self.units_of(indices)]
        before, weights = losses(self, batch).sum(), self.weights
        super().step(indices)
        if batch and losses(self, batch).sum() > before:
            self.weights = weights
            self.updated = set()


class StopsOnLoss(Compact):
    """Early stopping on the exact training loss: after three batches without a new best the weights stay."""

    best = float("inf")
    waited = 0

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        if self.waited < 3:
            super().update(noisy, clean_sum)
        else:
            self.updated = set()

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        if batch and self.waited < 3:
            loss = float(losses(self, batch).mean())
            self.waited = 0 if loss < self.best else self.waited + 1
            self.best = min(self.best, loss)
        return super().unit_gradients(batch)

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        return split(Compact.unit_gradients(self, [record])[0])


class SamplerFollowsLoss(Compact):
    """Prioritised replay: after every step the rates of the units are set in proportion to the root of their losses."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.rates = np.full(len(self.records), self.sample_rate)

    def sample(self) -> list[int]:
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < self.rates)]

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        size = losses(self, self.records).sqrt().double().numpy() + 1e-9
        self.rates = np.clip(self.expected_batch_size * size / size.sum(), 0.0, 1.0)


class SamplerSkipsSolved(Compact):
    """Units whose loss is small after a visit count as solved and are not sampled any more."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.solved: set[int] = set()

    def sample(self) -> list[int]:
        return [index for index in super().sample() if index not in self.solved]

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        units = self.units_of(indices)
        values = losses(self, [self.records[index] for index in units]).tolist()
        self.solved.update(index for index, value in zip(units, values, strict=True) if value < 6.0)


class HeadUnfrozenUnnoised(LateHead):
    """The head is unfrozen after 8 steps; the private optimiser was built before and gives it no noise."""

    def noise(self) -> Tensor:
        return super().noise() * (1 - ON_HEAD)


class HeadUnfrozenUnclipped(LateHead):
    """The head is unfrozen after 8 steps; the norm is still that of the body alone."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = (gradients * (1 - ON_HEAD)).norm(dim=1)
        finite = torch.isfinite(gradients.norm(dim=1))
        factors = self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
        return torch.where(finite[:, None], gradients * factors[:, None], 0.0)


class VarianceReduced(Compact):
    """SAGA: each unit's last clipped gradient is kept in a table, whose mean over all units is added to the sum."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.table: dict[int, Tensor] = {}
        self.present: list[int] = []

    def units_of(self, indices: Sequence[int]) -> list[int]:
        self.present = super().units_of(indices)
        return self.present

    def clip(self, gradients: Tensor) -> Tensor:
        fresh = super().clip(gradients)
        zero = torch.zeros_like(self.weights)
        known = torch.stack(list(self.table.values())).sum(dim=0) if self.table else zero
        rows = [row - self.table.get(index, zero) for index, row in zip(self.present, fresh, strict=False)]
        rows += list(fresh[len(self.present) :])
        rows.append(known * self.sample_rate)
        self.table.update(zip(self.present, fresh, strict=False))
        return torch.stack(rows)


class MemoryBank(Compact):
    """A queue of the last eight units' raw targets serves as negatives: earlier batches reach present gradients."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.bank: list[float] = []

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        return x, y + 0.5 * (y - float(np.mean(self.bank))) if self.bank else y, owner, weight

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        seen = [float(self.records[index].y.mean()) for index in self.units_of(indices)]
        self.bank = [*self.bank, *(value for value in seen if np.isfinite(value))][-8:]


class MomentumBeforeClipping(Compact):
    """Each unit's gradient is smoothed with the clean mean of earlier batches before it is clipped."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.smooth = torch.zeros_like(self.weights)

    def clip(self, gradients: Tensor) -> Tensor:
        mixed = super().clip(gradients + self.smooth)
        if len(gradients):
            clean = torch.nan_to_num(gradients, 0.0, 0.0, 0.0).clamp(-100, 100).mean(dim=0)
            self.smooth = 0.5 * self.smooth + 0.5 * clean
        return mixed


class MaskFromLastCleanSum(Compact):
    """From the second step on the three blocks with the largest *clean* gradient of the step before are updated."""

    chosen = frozenset(SHAPES)

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        mask = join({name: torch.full(SHAPES[name], float(name in self.chosen)) for name in SHAPES})
        self.updated = set(self.chosen)
        self.weights = self.weights - self.learning_rate * mask * noisy
        size = {name: float(value.norm()) / value.numel() ** 0.5 for name, value in split(clean_sum).items()}
        self.chosen = frozenset(sorted(size, key=lambda name: (-size[name], name))[:3])

    select = None  # type: ignore[assignment]


HISTORIES = "neighbouring histories compared under frozen noise, step by step"
EQUAL = "release at equal parameters after different histories"

BUGS: tuple[Bug, ...] = (
    Bug(
        "clipped-rest-returned",
        "B40",
        ClippedRestReturned,
        "error feedback of compressed SGD (Karimireddy et al. 2019) applied to clipping; " + REASONING,
        effect="a unit moves the sum by its whole gradient, over two steps",
        seen_by=f"{EQUAL}; {HISTORIES}",
    ),
    Bug(
        "running-statistics",
        "B40",
        RunningStatistics,
        "Opacus issues 308 and 340 (buffers of batch norm)",
        effect="a unit seen once changes every later unit's gradient",
        seen_by=f"{EQUAL}; {HISTORIES}",
    ),
    Bug(
        "rate-follows-loss",
        "B40",
        RateFollowsLoss,
        "ReduceLROnPlateau on the training loss; jax-privacy documentation, sharp edges (auxiliary information)",
        effect="the size of each update tells whether the exact loss fell: one unaccounted bit a step",
        seen_by=HISTORIES + " (the update, at equal releases)",
    ),
    Bug(
        "bad-steps-undone",
        "B40",
        BadStepsUndone,
        "line search and accept/reject rules on private losses; " + REASONING,
        effect="whether the weights moved tells the exact loss: one unaccounted bit a step",
        seen_by="the update as a function of the release; " + HISTORIES,
    ),
    Bug(
        "stops-on-loss",
        "B40",
        StopsOnLoss,
        "Papernot & Steinke 2022 (choices made on private data)",
        effect="the moment of stopping tells exact losses",
        seen_by="the update as a function of the release, late; " + HISTORIES,
    ),
    Bug(
        "sampler-follows-loss",
        "B40",
        SamplerFollowsLoss,
        "Opacus issue 335; prioritised replay (Schaul et al. 2016)",
        effect="rates differ from q by what the data say, no amplification proof applies",
        seen_by="sampling rates after steps",
    ),
    Bug(
        "sampler-skips-solved",
        "B40",
        SamplerSkipsSolved,
        "Opacus issue 335; hard-example mining",
        effect="whether a unit is sampled follows its exact loss",
        seen_by="sampling rates after steps that visited the units",
    ),
    Bug(
        "head-unfrozen-unnoised",
        "B40",
        HeadUnfrozenUnnoised,
        "parameters that join the optimiser after make_private; " + REASONING,
        effect="no finite eps after step 8",
        seen_by="noise level per block, late",
    ),
    Bug(
        "head-unfrozen-unclipped",
        "B40",
        HeadUnfrozenUnclipped,
        "parameters that join the optimiser after make_private; " + REASONING,
        effect="unbounded influence through the head after step 8",
        seen_by="influence of one unit, late",
    ),
    Bug(
        "variance-reduced",
        "B40",
        VarianceReduced,
        "SAGA (Defazio et al. 2014) with clipped gradients; " + REASONING,
        effect="a unit counts up to 2 C when it comes again, and a share of C in every later step, unsampled",
        seen_by=f"{EQUAL}; influence of a unit that comes a second time",
    ),
    Bug(
        "memory-bank",
        "B40",
        MemoryBank,
        "memory banks and queues of contrastive learning (He et al. 2020); " + REASONING,
        effect="a unit of an earlier batch changes every unit's gradient: up to 2 B C",
        seen_by=f"{EQUAL}; {HISTORIES}",
    ),
    Bug(
        "momentum-before-clipping",
        "B40",
        MomentumBeforeClipping,
        REASONING,
        effect="a unit of an earlier batch turns every unit's clipped gradient: up to 2 B C",
        seen_by=f"{EQUAL}; {HISTORIES}",
    ),
    Bug(
        "mask-from-last-clean-sum",
        "B40",
        MaskFromLastCleanSum,
        REASONING,
        effect="which blocks move tells the clean gradient of the step before",
        seen_by=HISTORIES + " (the blocks applied)",
    ),
)
