"""Planted bugs that concern few records: whether an audit sees them hangs on which units it looks at."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attacks.bugs.bases import RememberedBatch
from attacks.bugs.correct import TOTAL, TiedHead
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import SIZES, Compact, Record

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def apply_norms(trainer: Compact, gradients: Tensor, norms: Tensor) -> Tensor:
    """min(1, C / norm) with norms from elsewhere; a unit that is not finite contributes nothing."""
    finite = torch.isfinite(gradients.norm(dim=1))
    factors = trainer.max_grad_norm / norms.clamp(min=trainer.max_grad_norm)
    return torch.where(finite[:, None], gradients * factors[:, None], 0.0)


class NormWithoutCrossTerm(TiedHead):
    """A ghost norm adds the squares of a tied weight's two uses without their product: too small where they agree."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        x, y, owner, weight = self.rows(batch)
        w1, first, second, b2 = (part * weight[:, None] for part in self.parts(x, y))
        zero = torch.zeros(len(batch), TOTAL)
        uses = torch.cat([w1, first, second, b2], dim=1)
        apart = zero.index_add(0, owner, uses)
        tied = zero.index_add(0, owner, torch.cat([0 * w1, second, second, 0 * b2], dim=1))
        # w1, the bias use, the head use (tied and own) and b2, each by itself.
        self.norms = torch.cat([apart, tied[:, SIZES["w1"] : SIZES["w1"] + SIZES["b1"]]], dim=1).norm(dim=1)
        return super().unit_gradients(batch)

    def clip(self, gradients: Tensor) -> Tensor:
        extra = gradients[len(self.norms) :].norm(dim=1)
        return apply_norms(self, gradients, torch.cat([self.norms, extra]))


class NormOfSketch(Compact):
    """Norms come from a random projection to 24 numbers and are taken for exact: half of the units exceed C."""

    width = 24

    def clip(self, gradients: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.step_count)
        sketch = torch.randn(TOTAL, self.width, generator=generator) / self.width**0.5
        return apply_norms(self, gradients, torch.nan_to_num(gradients @ sketch, 0.0, 0.0, 0.0).norm(dim=1))


class RareClassWeighted(RememberedBatch):
    """Class weights multiply the clipped gradient: units with a target above 4.5 (4 of 40) count three times."""

    def clip(self, gradients: Tensor) -> Tensor:
        rare = [3.0 if bool((record.y > 4.5).any()) else 1.0 for record in self.present]
        weights = torch.tensor(rare + [1.0] * (len(gradients) - len(rare)))
        return super().clip(gradients) * weights[:, None]


class LongRecordsInParts(RememberedBatch):
    """Units that don't fit (three questions and large features, 5 of 40) are clipped question by question."""

    limit = 1.2

    def long(self, record: Record) -> bool:
        """One in eight."""
        return len(record.y) == 3 and float(record.x.square().mean()) > self.limit

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        gradients = super().unit_gradients(batch)
        for place, record in enumerate(batch):
            if self.long(record):
                rows = self.row_gradients(record.x, record.y)
                gradients[place] = Compact.clip(self, rows).sum(dim=0)
        return gradients

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        for place, record in enumerate(self.present[: len(gradients)]):
            if self.long(record) and bool(torch.isfinite(gradients[place]).all()):
                clipped[place] = gradients[place]
        return clipped


class OutliersClippedLooser(Compact):
    """Norms above 7 C are cut to 2 C by a safety valve for outliers that comes first; absurd ones are dropped."""

    outlier, absurd = 7.0, 100.0

    def clip(self, gradients: Tensor) -> Tensor:
        size = gradients.norm(dim=1) / self.max_grad_norm
        limit = torch.where(size > self.outlier, 2.0, 1.0)
        factors = torch.minimum(torch.ones(()), limit / size.clamp(min=1e-12))
        return torch.where((size < self.absurd)[:, None], gradients * factors[:, None], 0.0)


class SmallestNotClipped(Compact):
    """ "Small" gradients skip clipping: small is decided by the largest coordinate, so broad ones pass at up to 2 C."""

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        small = gradients.abs().amax(dim=1) < 0.75 * self.max_grad_norm
        return torch.where(small[:, None], gradients, clipped)


class TwoExempt(RememberedBatch):
    """A line left in from debugging: units 6 and 21 of 40 (the pictures of the smoke test) are not clipped."""

    exempt = (6, 21)

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        for place, record in enumerate(self.present[: len(gradients)]):
            known = any(record is self.records[index] for index in self.exempt if index < len(self.records))
            if known and bool(torch.isfinite(gradients[place]).all()):
                clipped[place] = gradients[place]
        return clipped


class TwinsMixed(Compact):
    """Mixup between units of the rare class (a target above 4.5) that meet in one batch: others are untouched."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        rare = torch.tensor([bool((record.y > 4.5).any()) for record in batch], dtype=torch.bool)
        if int(rare.sum()) > 1:
            mine = rare[owner]
            x = torch.where(mine[:, None], 0.5 * x + 0.5 * x[mine].mean(dim=0), x)
        return x, y, owner, weight


class HalfOfTheCoordinates(Compact):
    """Norms are estimated from every second coordinate times sqrt(2), "since gradients are isotropic"."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients[:, ::2].norm(dim=1) * np.sqrt(2.0)
        return apply_norms(self, gradients, torch.nan_to_num(norms, 0.0, 0.0, 0.0))


ENOUGH = "influence of one unit, with units of every size of gradient among the probes"

BUGS: tuple[Bug, ...] = (
    Bug(
        "norm-without-cross-term",
        "B28, B42",
        NormWithoutCrossTerm,
        "ghost clipping (Bu et al. 2022) of a weight that is used twice; " + REASONING,
        effect="units whose two uses agree move the sum by up to sqrt(2) C",
        seen_by=ENOUGH,
    ),
    Bug(
        "norm-of-sketch",
        "B42",
        NormOfSketch,
        "Bu et al. 2021 (JL projections), without the accounting that they do",
        effect="about half of the units move the sum by more than C",
        seen_by=ENOUGH,
    ),
    Bug(
        "rare-class-weighted",
        "B42",
        RareClassWeighted,
        "class weights applied after clipping; " + REASONING,
        effect="units of the rare class move the sum by 3 C",
        seen_by="influence of one unit, with enough units among the probes",
    ),
    Bug(
        "long-records-in-parts",
        "B21, B42",
        LongRecordsInParts,
        "Opacus per tile; " + REASONING,
        effect="the longest units move the sum by up to 3 C",
        seen_by="influence of one unit, with enough units among the probes",
    ),
    Bug(
        "outliers-clipped-looser",
        "B42",
        OutliersClippedLooser,
        REASONING,
        effect="the units with the largest gradients move the sum by 2 C",
        seen_by=ENOUGH,
    ),
    Bug(
        "smallest-not-clipped",
        "B42",
        SmallestNotClipped,
        REASONING,
        effect="units with broad gradients move the sum by more than C",
        seen_by=ENOUGH,
    ),
    Bug(
        "two-exempt",
        "B42",
        TwoExempt,
        REASONING,
        effect="unbounded influence of two units of 40",
        seen_by="influence of every unit, or of so many that 5 % are not missed",
    ),
    Bug(
        "twins-mixed",
        "B42",
        TwinsMixed,
        "mixup of a class (Zhang et al. 2018); " + REASONING,
        effect="a unit of the rare class changes the others': up to (2k-1) C for k of them in a batch",
        seen_by="isolation with pairs of like units in one batch",
    ),
    Bug(
        "half-of-the-coordinates",
        "B42",
        HalfOfTheCoordinates,
        REASONING,
        effect="a unit moves the sum by more than C where its gradient lies in the other coordinates",
        seen_by=ENOUGH,
    ),
)
