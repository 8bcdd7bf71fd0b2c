"""Planted bugs of isolation: one record reaches another record's gradient before clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.adapters.compact import Compact, Record

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


class BatchNorm(Compact):
    """Features are normalised by the mean and variance of the batch."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(x) > 1:
            x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
        return x, y, owner, weight


class TokenMeanLoss(Compact):
    """The loss is a mean over all rows (tokens) of the batch, so a long record shrinks everybody else's gradient."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, _ = super().rows(batch)
        return x, y, owner, torch.full((len(x),), len(batch) / max(1, len(x)))


class InBatchContrast(Compact):
    """A contrastive term pulls each unit away from the mean target of its batch."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(batch) > 1:
            y = y + 0.3 * (y - torch.nan_to_num(y, posinf=0.0).mean())
        return x, y, owner, weight


class BatchCentre(Compact):
    """Fused features: the centre that weak features are merged into is a mean over the batch (batch-mean centres)."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(batch) > 1:
            centre = x[:, 4:].mean(dim=0, keepdim=True)
            x = torch.cat([x[:, :4], x[:, 4:] + centre], dim=1)
        return x, y, owner, weight


class BatchThreshold(Compact):
    """How many features survive pruning is an outlier rule over the whole batch (as in a public PruMerge code)."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(x):
            limit = torch.quantile(torch.nan_to_num(x.abs()).flatten(), 0.75)
            x = torch.where(x.abs() >= limit, x, torch.zeros_like(x))
        return x, y, owner, weight


class DataSetStatistics(Compact):
    """Features are standardised by mean and deviation of the whole private data set."""

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(x):
            every = torch.cat([record.x for record in self.records])
            x = (x - every.mean(dim=0)) / (every.std(dim=0) + 1e-6)
        return x, y, owner, weight


class StaleGradient(Compact):
    """No zero_grad: the clipped sum of the last step is still there and is used again."""

    stale: Tensor | None = None

    def clip(self, gradients: Tensor) -> Tensor:
        total = super().clip(gradients).sum(dim=0, keepdim=True)
        if self.stale is not None:
            total = total + self.stale
        self.stale = total
        return total
