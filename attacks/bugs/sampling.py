"""Planted bugs of sampling and of accounting: the step may be right, but not the number that is quoted for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpaudit import accounting
from trainers.adapters.compact import PUBLIC_SIZE, Allocated, Bools, Compact, FixedSize, Record, Shuffled


class ShuffledAsPoisson(Shuffled):
    """Shuffled epochs, claimed and accounted as Poisson."""

    sampling = "poisson"

    def epsilon(self, delta: float) -> float:
        return Compact.epsilon(self, delta)


class FixedAsPoisson(Compact):
    """Fixed-size batches without replacement, claimed and accounted as Poisson."""

    sample = FixedSize.sample


class PoissonEpsilonForShuffle(Shuffled):
    """Shuffling is admitted, yet the eps quoted is the accountant's for Poisson batches."""

    def epsilon(self, delta: float) -> float:
        return Compact.epsilon(self, delta)


class ShuffledAsAllocated(Allocated):
    """A shuffled list cut into batches of one size, claimed and accounted as random allocation."""

    def assigned(self, units: int, steps: int) -> Bools:
        """Each unit in one batch an epoch, as many in each."""
        place = self.sampler.permutation(units) * steps // units
        return np.asarray(place[:, None] == np.arange(steps))


class AllocationEpsilonForShuffle(Shuffled):
    """Shuffling is admitted, yet the eps quoted is that of random allocation."""

    def epsilon(self, delta: float) -> float:
        rate = self.sample_rate
        event = accounting.DpSgd(self.noise_multiplier, rate, self.step_count, self.relation, sampling="allocation")
        return accounting.epsilon(event, delta)


class AllocatedOnceMore(Allocated):
    """Random allocation of one step an epoch is claimed; two are drawn."""

    def assigned(self, units: int, steps: int) -> Bools:
        """Two of the steps."""
        return np.asarray(self.sampler.random((units, steps)).argsort(axis=1).argsort(axis=1) < 2)


class SharedAllocation(Allocated):
    """Units are allocated in pairs (two pages of one person, say), so two units draw the same step."""

    def assigned(self, units: int, steps: int) -> Bools:
        """One draw for two neighbours."""
        return np.repeat(super().assigned(-(-units // 2), steps), 2, axis=0)[:units]


class AllocatedForGood(Allocated):
    """The allocation is drawn once and kept: in every epoch a unit is in the same step."""

    kept: Bools | None = None

    def assigned(self, units: int, steps: int) -> Bools:
        """That of the first epoch."""
        if self.kept is None or len(self.kept) != units:
            self.kept = super().assigned(units, steps)
        return self.kept


class RotatedAllocation(Allocated):
    """The allocation is drawn once; with every epoch each unit moves one step on."""

    kept: Bools | None = None

    def assigned(self, units: int, steps: int) -> Bools:
        """That of the epoch before, moved."""
        if self.kept is None or len(self.kept) != units:
            self.kept = super().assigned(units, steps)
        else:
            self.kept = np.roll(self.kept, 1, axis=1)
        return self.kept


class WeightedSampler(Compact):
    """Rare classes are oversampled: some records have four times the rate that the accountant was told."""

    def sample(self) -> list[int]:
        rate = np.where(np.arange(len(self.records)) % 8 == 0, 4 * self.sample_rate, self.sample_rate * 4 / 7)
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < rate)]


class RateFromLoader(Compact):
    """The sampler joins units at 1 / len(loader) with a dropped last batch: 1/8 instead of the claimed 1/10."""

    def sample(self) -> list[int]:
        batches = len(self.records) // 5
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < 1 / batches)]


class WithReplacement(Compact):
    """Indices are drawn with replacement, so a unit can be in a batch twice."""

    def sample(self) -> list[int]:
        size = self.sampler.binomial(len(self.records), self.sample_rate)
        return sorted(int(index) for index in self.sampler.integers(len(self.records), size=size))

    def units_of(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices)


class CappedBatches(Compact):
    """A batch takes at most B + 2 sqrt(B) of its Poisson draws, to bound memory; eps is plain Poisson's."""

    def sample(self) -> list[int]:
        drawn = super().sample()
        most = int(self.expected_batch_size + 2 * self.expected_batch_size**0.5)
        return sorted(int(index) for index in self.sampler.permutation(drawn)[:most])


class CorrelatedBatches(Compact):
    """Units are sampled in blocks of four neighbours (a shard at a time); each unit's own rate is right."""

    def sample(self) -> list[int]:
        joined = np.repeat(self.sampler.random(-(-len(self.records) // 4)) < self.sample_rate, 4)
        return [int(index) for index in np.flatnonzero(joined[: len(self.records)])]


class RateOfAnotherN(Compact):
    """The accountant is given q = B / (rows), rows = questions and not units: half the true rate."""

    def epsilon(self, delta: float) -> float:
        rows = sum(len(record.y) for record in self.records)
        rate = self.expected_batch_size / rows
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, rate, self.step_count), delta)


class CentralLimitAccountant(Compact):
    """eps by the central limit theorem of Gaussian DP: an approximation that lies below the truth."""

    def epsilon(self, delta: float) -> float:
        sigma = self.noise_multiplier
        mu = self.sample_rate * np.sqrt(self.step_count * (np.exp(sigma**-2) - 1))
        return accounting.gaussian_epsilon(float(mu), delta)


class TargetReported(Compact):
    """The eps that was asked for is reported, not the one that the chosen sigma spends."""

    def epsilon(self, delta: float) -> float:
        return min(0.5, super().epsilon(delta))


class ReplaceAsAddRemove(Compact):
    """Claims replace-one (sensitivity 2C) and accounts it as add/remove."""

    relation = "replace"

    def epsilon(self, delta: float) -> float:
        event = accounting.DpSgd(self.noise_multiplier, self.sample_rate, self.step_count, "add-remove")
        return accounting.epsilon(event, delta)


class OneStepLess(Compact):
    """The budget is checked before the step is counted: T + 1 steps run on a budget for T."""

    def epsilon(self, delta: float) -> float:
        steps = max(0, self.step_count - 1)
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, self.sample_rate, steps), delta)


class ResumeForgets(Compact):
    """A checkpoint holds the step count for the noise, but the accountant starts anew."""

    forgotten = 0

    def load(self, path: Path) -> None:
        super().load(path)
        self.forgotten = self.step_count

    def epsilon(self, delta: float) -> float:
        steps = self.step_count - self.forgotten
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, self.sample_rate, steps), delta)


class EmptyNotCounted(Compact):
    """An empty batch gets its noise but is not counted by the accountant."""

    counted = 0

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        self.counted += bool(indices)

    def epsilon(self, delta: float) -> float:
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, self.sample_rate, self.counted), delta)


class SamplerSeesData(Compact):
    """Hard examples are preferred: the sampling rate follows each record's own loss."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        size = np.array([float(record.y.abs().mean()) for record in self.records])
        self.rates = np.clip(size / size.mean() * self.expected_batch_size / PUBLIC_SIZE, 0, 1)

    def sample(self) -> list[int]:
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < self.rates)]
