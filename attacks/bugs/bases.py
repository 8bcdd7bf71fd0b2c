"""What several planted bugs have in common: correct variations of the compact trainer that know more than it does."""

from collections.abc import Sequence

from torch import Tensor

from trainers.adapters.compact import Compact, Record


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
