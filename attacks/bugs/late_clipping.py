"""Planted bugs of clipping that changes over the steps or over the physical batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.bugs.bases import RememberedBatch
from attacks.bugs.correct import Accumulated
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import Compact, Record


def clipped_to(gradients: Tensor, limit: float) -> Tensor:
    """min(1, limit / norm) per unit; a unit that is not finite contributes nothing."""
    norms = gradients.norm(dim=1)
    finite = torch.isfinite(norms)
    return torch.where(finite[:, None], gradients * (limit / norms.clamp(min=limit))[:, None], 0.0)


class ClipFollowsNorms(Compact):
    """From the second step on C is the median norm of the batch before, measured without noise; the noise stays."""

    limit = Compact.max_grad_norm

    def clip(self, gradients: Tensor) -> Tensor:
        kept = clipped_to(gradients, self.limit)
        norms = gradients.norm(dim=1)
        norms = norms[torch.isfinite(norms)]
        self.limit = float(norms.median()) if len(norms) else self.limit
        return kept


class ClipGrows(Compact):
    """A schedule raises C by 5 % a step, the noise was computed once from the first C."""

    growth = 1.05

    def clip(self, gradients: Tensor) -> Tensor:
        return clipped_to(gradients, self.max_grad_norm * self.growth ** (self.step_count - 1))


class ClipEndsWithWarmUp(Compact):
    """Clipping is part of the warm-up "against exploding gradients" and is taken out after ten steps."""

    warm_up = 10

    def clip(self, gradients: Tensor) -> Tensor:
        if self.step_count <= self.warm_up:
            return super().clip(gradients)
        return torch.where(torch.isfinite(gradients.norm(dim=1))[:, None], gradients, 0.0)


class FirstChunkClipped(Accumulated):
    """Only the first physical batch of 8 is clipped: the hook removes itself after its first call."""

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        if place == 0:
            return super().chunk_sum(gradients, place)
        return torch.nan_to_num(gradients, 0.0, 0.0, 0.0).sum(dim=0)


class StaleFirstChunk(Accumulated):
    """Per-unit gradients of the first physical batch are not cleared and counted again in the second."""

    stale: Tensor | None = None

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        if place == 1 and self.stale is not None:
            gradients = torch.cat([self.stale, gradients])
        self.stale = gradients if place == 0 else None
        return super().chunk_sum(gradients, place)


class LaterChunksClippedAsOne(Accumulated):
    """From the second physical batch on the summed gradient of the batch is clipped, to C times its units."""

    physical = 6

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        if place == 0:
            return super().chunk_sum(gradients, place)
        total = torch.nan_to_num(gradients, 0.0, 0.0, 0.0).sum(dim=0, keepdim=True)
        return clipped_to(total, self.max_grad_norm * len(gradients))[0]


class FactorsCached(RememberedBatch):
    """Clip factors are cached per unit at its first visit and used for ever, while its gradient grows."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.factors: dict[int, Tensor] = {}

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        rows = []
        for place, (row, whole) in enumerate(zip(clipped, gradients, strict=True)):
            if place < len(self.present) and bool(torch.isfinite(whole).all()):
                factor = row.norm() / whole.norm().clamp(min=1e-12)
                rows.append(whole * self.factors.setdefault(id(self.present[place]), factor))
            else:
                rows.append(row)
        return torch.stack(rows) if rows else clipped


class SecondVisitTrusted(RememberedBatch):
    """A unit whose gradient was within C once is on the list of harmless ones and not clipped when it comes again."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.visits: set[int] = set()

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        for place, record in enumerate(self.present[: len(gradients)]):
            if id(record) in self.visits and bool(torch.isfinite(gradients[place]).all()):
                clipped[place] = gradients[place]
        self.visits.update(id(record) for record in self.present)
        return clipped


LATER = "influence of one unit at later steps"
LARGER = "influence of one unit in batches of more than one physical batch"

BUGS: tuple[Bug, ...] = (
    Bug(
        "clip-follows-norms",
        "B37",
        ClipFollowsNorms,
        "Andrew et al. 2021 without their noise",
        effect="a unit counts by the batch's own median norm, several C, under noise for C",
        seen_by=LATER + "; comparison of neighbouring histories",
    ),
    Bug(
        "clip-grows",
        "B37",
        ClipGrows,
        "Opacus' clipping schedules (opacus.schedulers) with the noise of the first C; " + REASONING,
        effect="a unit moves the sum of step t by 1.05^(t-1) C: 3.1 C at step 24",
        seen_by=LATER,
    ),
    Bug(
        "clip-ends-with-warm-up",
        "B37",
        ClipEndsWithWarmUp,
        REASONING,
        effect="unbounded influence after step 10",
        seen_by=LATER + ", beyond step 10",
    ),
    Bug(
        "first-chunk-clipped",
        "B37, B38",
        FirstChunkClipped,
        "Opacus BatchMemoryManager re-implemented by hand; " + REASONING,
        effect="unbounded influence of all units but the first 8",
        seen_by=LARGER,
    ),
    Bug(
        "stale-first-chunk",
        "B37, B38",
        StaleFirstChunk,
        "Opacus PR 203",
        effect="a unit of the first physical batch counts 2 C",
        seen_by=LARGER,
    ),
    Bug(
        "later-chunks-clipped-as-one",
        "B37, B38",
        LaterChunksClippedAsOne,
        "TensorFlow Privacy issues 81 and 620 (micro-batches)",
        effect="a unit of a later physical batch of k units can turn k C of the sum",
        seen_by=LARGER,
    ),
    Bug(
        "factors-cached",
        "B37",
        FactorsCached,
        REASONING,
        effect="a unit whose gradient grew since its first visit moves the sum by more than C",
        seen_by="influence of a unit that comes a second time, at parameters other than those of the first",
    ),
    Bug(
        "second-visit-trusted",
        "B37",
        SecondVisitTrusted,
        REASONING,
        effect="unbounded influence of every unit from its second visit on",
        seen_by="influence of a unit that comes a second time",
    ),
)
