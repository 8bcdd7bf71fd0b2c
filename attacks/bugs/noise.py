"""Planted bugs of the noise: too little, the wrong law, used twice, missing, or following the data."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpaudit.randomness import Key
from trainers.adapters.compact import SHAPES, SIZES, Compact, Record, join, split


class SigmaWithoutC(Compact):
    """The noise has standard deviation sigma instead of sigma * C."""

    def noise_std(self) -> float:
        return self.noise_multiplier


class SensitivityOverBatch(Compact):
    """The sensitivity of the mean, C / B, is used for noise on the sum, which is divided by B once more."""

    def noise_std(self) -> float:
        return super().noise_std() / self.expected_batch_size


class MicroStepNoise(Compact):
    """Gradient accumulation: each of 4 micro-steps adds noise sigma C / 4, as if deviations added up."""

    micro_steps = 4

    def block_noise(self, name: str) -> Tensor:
        parts = [
            torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=name, rank=rank))
            for rank in range(self.micro_steps)
        ]
        return torch.stack(parts).sum(dim=0) / self.micro_steps


class WorkersShareNoise(Compact):
    """Two workers add sigma C / sqrt(2) each, but both seed their generator alike: the noise is sqrt(2) too large."""

    def block_noise(self, name: str) -> Tensor:
        one = torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=name, rank=0))
        return (one + one) / 2**0.5


class OneWorkerNoised(Compact):
    """Only rank 0 adds its share sigma C / sqrt(2); the other worker forgets."""

    def noise_std(self) -> float:
        return super().noise_std() / 2**0.5


class SameNoiseEveryStep(Compact):
    """The generator is seeded anew in every step."""

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(self.key.normal(SHAPES[name], step=0, name=name))


class SameNoiseEveryBlock(Compact):
    """The generator is seeded anew for every parameter."""

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=""))


class BroadcastNoise(Compact):
    """One row of noise is drawn for a matrix and broadcast over its rows."""

    def block_noise(self, name: str) -> Tensor:
        whole = super().block_noise(name)
        return whole[:1].expand(SHAPES[name]) if name == "w1" else whole


class NoNoise(Compact):
    """A missing noise_multiplier key is read as 0, silently."""

    def noise_std(self) -> float:
        settings: dict[str, float] = {"max_grad_norm": self.max_grad_norm}
        return settings.get("noise_multiplier", 0.0) * self.max_grad_norm


class UniformNoise(Compact):
    """rand for randn: uniform noise of the same variance, bounded, hence no finite eps at all."""

    def block_noise(self, name: str) -> Tensor:
        values = self.key.uniform(SIZES[name], step=self.step_count, name=name, purpose="noise")
        return torch.from_numpy(((values - 0.5) * np.sqrt(12.0)).astype(np.float32)).reshape(SHAPES[name])


class NoiseFollowsData(Compact):
    """The noise is scaled to the largest norm seen in the batch instead of to C ("local sensitivity")."""

    scale = 1.0

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        self.scale = float(clipped.norm(dim=1).max()) / self.max_grad_norm if len(clipped) else 1.0
        return clipped

    def noise_std(self) -> float:
        return super().noise_std() * self.scale


class FirstGroupNoised(Compact):
    """Only the optimiser's first parameter group gets noise; the second (unfrozen later) is released as it is."""

    def noise(self) -> Tensor:
        blocks = split(super().noise())
        return join({name: blocks[name] if name in ("w1", "b1") else torch.zeros(SHAPES[name]) for name in SHAPES})


class HeadWithoutNoise(Compact):
    """A new head, outside the private optimiser, is trained with its clipped gradient and no noise."""

    def noise(self) -> Tensor:
        blocks = split(super().noise())
        return join({name: blocks[name] if name in ("w1", "b1") else torch.zeros(SHAPES[name]) for name in SHAPES})

    def released(self) -> Mapping[str, Tensor | None]:
        return {name: self.last.get(name) if name in ("w1", "b1") else None for name in SHAPES}


class ActualBatchSize(Compact):
    """The noisy sum is divided by the realised Poisson batch size."""

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        return noisy_sum / max(1, realised)


class PrivateSize(Compact):
    """The expected batch size is floor(n q) of the private n."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.expected_batch_size = float(max(1, int(len(self.records) * self.sample_rate)))


class HiddenPrivateSize(Compact):
    """The claim names the public batch size, the code divides by n q of the private n."""

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        return noisy_sum / (len(self.records) * self.sample_rate)


class EmptySkipped(Compact):
    """An empty batch is skipped: no noise, and no accounting."""

    def step(self, indices: Sequence[int]) -> None:
        if not indices:
            self.last = dict.fromkeys(SHAPES)
            self.updated = set()
            return
        super().step(indices)


class EmptyCrashes(Compact):
    """An empty batch reaches the model, which can't reshape 0 rows."""

    def rows(self, batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().rows(batch) if batch else torch.zeros(0).reshape(1, -1, 0)  # type: ignore[return-value]


class EmptyFaked(Compact):
    """An empty batch is replaced by one random record, which is clipped to C like a real one."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        if not batch:
            generator = torch.Generator().manual_seed(1)
            batch = [Record(torch.randn(1, 8, generator=generator), torch.randn(1, generator=generator) * 10)]
        return super().unit_gradients(batch)


class ResumeReplaysNoise(Compact):
    """A checkpoint restores weights and generator but not the step count: the first steps' noise comes again."""

    spent = 0

    def load(self, path: Path) -> None:
        super().load(path)
        self.spent += self.step_count
        self.step_count = 0

    def epsilon(self, delta: float) -> float:
        now, self.step_count = self.step_count, self.step_count + self.spent
        value = super().epsilon(delta)
        self.step_count = now
        return value


class WeakGenerator(Compact):
    """Noise from a generator with 16 bits of seed: 65,536 guesses recover it. Nothing in its law shows that."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.key = Key.from_seed(int(self.key.uniform(1, step=0, name="", purpose="weak")[0] * 65536))
