"""Planted bugs behind the noise: what is updated, and from which gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainers.adapters.compact import SHAPES, Adam, Compact, Pruned, Record, join, split


class CleanMask(Pruned):
    """The blocks to update are chosen by the clean gradient; the values are noised."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.clean = split(clean_sum)
        super().update(noisy, clean_sum)

    def select(self, noisy: Mapping[str, Tensor]) -> set[str]:
        return super().select(getattr(self, "clean", noisy))


class CleanMaskHidden(CleanMask):
    """The same, and `select` is not offered: only the updated blocks can be watched."""

    keep = 0.5

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        chosen = Compact.select(self, split(clean_sum))
        self.updated = chosen
        mask = join({name: torch.full(SHAPES[name], float(name in chosen)) for name in SHAPES})
        self.weights = self.weights - self.learning_rate * mask * noisy

    select = None  # type: ignore[assignment]


class OnlyKeptNoised(Compact):
    """The strongest blocks are chosen by the clean gradient and only they get noise (Mechanism 2, wrong way round)."""

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        self.noisy_sum = noisy_sum
        return super().normalise(noisy_sum, realised)

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        blocks = split(clean_sum)
        order = sorted(SHAPES, key=lambda name: -float(blocks[name].norm()) / blocks[name].numel() ** 0.5)
        self.updated = set(order[:3])
        mask = join({name: torch.full(SHAPES[name], float(name in self.updated)) for name in SHAPES})
        self.last = {name: self.last[name] if name in self.updated else None for name in SHAPES}
        self.weights = self.weights - self.learning_rate * mask * noisy

    select = None  # type: ignore[assignment]


class CleanMomentum(Compact):
    """Momentum is fed with the clean gradient; noise is added to what is applied."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)
        clean = clean_sum / self.expected_batch_size
        self.weights = self.weights - self.learning_rate * (self.momentum * self.velocity + noisy)
        self.velocity = self.momentum * self.velocity + clean


class CleanSecondMoment(Adam):
    """Adam's second moment is computed from the clean gradient."""

    def moments(self, noisy: Tensor, clean_sum: Tensor) -> tuple[Tensor, Tensor]:
        return noisy, clean_sum / self.expected_batch_size + 1e-3


class NoiseNotApplied(Compact):
    """The noisy gradient is logged, the optimiser still holds a reference to the clean one."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        super().update(clean_sum / self.expected_batch_size, clean_sum)


class PrivateLearningRate(Compact):
    """The learning rate was tuned on the private records and the search is not accounted."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        targets = torch.cat([record.y for record in self.records])
        self.learning_rate = 0.05 if float(targets.std()) > 2 else 0.1


class LossLogged(Compact):
    """The exact loss of every batch goes to a log that is published."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        self.log = [*getattr(self, "log", []), sum(float(record.y.square().mean()) for record in batch)]
        return super().unit_gradients(batch)
