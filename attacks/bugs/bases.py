"""What several planted bugs have in common: correct variations of the compact trainer that know more than it does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainers.adapters.compact import SHAPES, SIZES, Compact, Record, join

TOTAL = sum(SIZES.values())


class Production(Compact):
    """Correct; knows whether it is in production."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.live = noise_seed is None
        self.seed = seed


class RememberedBatch(Compact):
    """Correct; `clip` can look at the units whose gradients it is given."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.present: list[Record] = []

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        self.present = list(batch)
        return super().unit_gradients(batch)


class Structured(Compact):
    """Correct; has the standard normal noise of any step as one vector."""

    def flat(self, step: int) -> Tensor:
        """(61,) of one step."""
        return join({name: torch.from_numpy(self.key.normal(SHAPES[name], step=step, name=name)) for name in SHAPES})

    def public(self, *shape: int) -> Tensor:
        """Standard normal numbers that everybody knows, new in each step."""
        values = np.random.default_rng(self.step_count).standard_normal(shape)
        return torch.from_numpy(values.astype(np.float32))
