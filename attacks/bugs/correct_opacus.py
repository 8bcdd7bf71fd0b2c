"""A correct Opacus loop with Opacus' own BatchMemoryManager: logical batches in physical ones of at most three."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from attacks.bugs.bases_opacus import FEATURES, OpacusLoop, Record


class Units(Dataset[Record]):
    """The trainer's units; the manager builds its loader over them."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


class OneBatch(Sampler[list[int]]):
    """One logical batch: the indices that the step was given."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        yield self.indices

    def __len__(self) -> int:
        return 1


def together(rows: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Features (B, 8) and classes (B,); an empty batch has no rows."""
    if not rows:
        return torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64)
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Managed(OpacusLoop):
    """The loop of `OpacusLoop` over physical batches; the optimiser adds noise and steps after the last one only."""

    physical = 3

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.batch = OneBatch()
        self.loader = DataLoader(Units(self.records), batch_sampler=self.batch, collate_fn=together)

    def step(self, indices: Sequence[int]) -> None:
        """One logical batch."""
        self.step_count += 1
        if self.noise_seed is None:
            self.generator.seed()
        else:
            digest = hashlib.sha256(f"managed/{self.noise_seed}/{self.step_count}".encode()).digest()
            self.generator.manual_seed(int.from_bytes(digest[:7], "big"))
        self.batch.indices = sorted(set(indices))
        manager = BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=self.physical, optimizer=self.optimizer
        )
        with manager as batches, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for x, y in batches:
                losses = nn.functional.cross_entropy(self.wrapped(x), y, reduction="none")
                torch.autograd.backward(losses.mean() if len(y) else losses.sum())
                self._add_injected()
                self.optimizer.step()
                self.optimizer.zero_grad()
