"""Planted bugs between the logical batch and the physical batches (micro-batches) that it is computed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.bugs.correct import Accumulated
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import SHAPES, Compact, Record, split

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


class NoiseOverChunks(Accumulated):
    """The sum is noised as if it were a mean over the micro-batches: noise sigma C / (number of micro-batches)."""

    def noise(self) -> Tensor:
        return super().noise() / self.chunks


class DeviationsAdded(Accumulated):
    """Every micro-batch of 5 adds its share sigma C / k from a stream of its own, as if deviations added up."""

    physical = 5

    def block_noise(self, name: str) -> Tensor:
        shares = [
            torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=name, rank=rank))
            for rank in range(self.chunks)
        ]
        return torch.stack(shares).sum(dim=0) / self.chunks


class ManagerAddsUp(Accumulated):
    """A memory manager accumulates into `.grad` a sum that runs already: the first of k batches counts k times."""

    physical = 6
    running: Tensor

    def add(self, total: Tensor, part: Tensor, place: int) -> Tensor:
        self.running = part if place == 0 else self.running + part
        return total + self.running


class PaddedByRepeating(Accumulated):
    """The last physical batch is padded to its full size by repeating its units, which are counted again."""

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        if place and 0 < len(gradients) < self.physical:
            repeats = -(-self.physical // len(gradients))
            gradients = gradients.repeat(repeats, 1)[: self.physical]
        return super().chunk_sum(gradients, place)


class FastPathMean(Compact):
    """Above 10 units a fast path takes over that clips the mean gradient of the batch, not each unit's."""

    threshold = 10

    def clip(self, gradients: Tensor) -> Tensor:
        if len(gradients) <= self.threshold:
            return super().clip(gradients)
        kept = torch.nan_to_num(gradients, 0.0, 0.0, 0.0)
        return kept * min(1.0, self.max_grad_norm / (float(kept.mean(dim=0).norm()) + 1e-12))


class NormalisedInLargeChunks(Compact):
    """The physical batch of a fused kernel is normalised by its own statistics, which starts above 8 units."""

    threshold = 8

    def rows(self, batch: Sequence[Record]) -> Rows:
        x, y, owner, weight = super().rows(batch)
        if len(batch) > self.threshold:
            x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
        return x, y, owner, weight


class EveryChunkApplied(Accumulated):
    """The optimiser steps after every physical batch of 6, noise is added to the last only: weights move unnoised."""

    physical = 6

    def chunk_sum(self, gradients: Tensor, place: int) -> Tensor:
        part = super().chunk_sum(gradients, place)
        if place < self.chunks - 1:
            self.weights = self.weights - self.learning_rate * part / self.expected_batch_size
            return torch.zeros_like(part)
        return part


class DividedByChunks(Accumulated):
    """The noisy sum is divided by the realised number of physical batches as well ("accumulation steps")."""

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        return super().normalise(noisy_sum, realised) / self.chunks


class LastChunkWithoutNoise(Accumulated):
    """Noise is drawn with the first physical batch; the block b1 is overwritten when a second one comes."""

    def noise(self) -> Tensor:
        noise = super().noise()
        if self.chunks > 1:
            split(noise)["b1"].zero_()
        return noise


SIZE = "the noise level in batches of more than one physical batch"
LARGER = "influence of one unit in batches of more than one physical batch"

BUGS: tuple[Bug, ...] = (
    Bug(
        "noise-over-chunks",
        "B38",
        NoiseOverChunks,
        "Opacus PR 203; jax-privacy documentation, sharp edges",
        effect="a logical batch of k physical ones has 1/k of the noise, and its size shows",
        seen_by=SIZE,
    ),
    Bug(
        "deviations-added",
        "B38",
        DeviationsAdded,
        "Opacus PR 203; jax-privacy documentation, sharp edges",
        effect="a logical batch of k physical ones has 1/sqrt(k) of the noise",
        seen_by=SIZE,
    ),
    Bug(
        "manager-adds-up",
        "B38",
        ManagerAddsUp,
        "Opacus PR 203",
        effect="a unit of the first of k physical batches counts k C",
        seen_by=LARGER,
    ),
    Bug(
        "padded-by-repeating",
        "B38",
        PaddedByRepeating,
        "fixed shapes of compiled code; " + REASONING,
        effect="a unit that is alone in the last physical batch counts 8 C",
        seen_by=LARGER,
    ),
    Bug(
        "fast-path-mean",
        "B38",
        FastPathMean,
        "Tramèr et al. 2022 (the mean clipped), in large batches only",
        effect="a unit turns the whole sum of a batch above 10 units",
        seen_by="influence of one unit in batches of 2.5 x the expected size",
    ),
    Bug(
        "normalised-in-large-chunks",
        "B38",
        NormalisedInLargeChunks,
        "Opacus issues 308 and 340, in large batches only",
        effect="a unit changes every other's gradient in batches above 8 units: up to (2B-1) C",
        seen_by="isolation in batches of more than twice the expected size",
    ),
    Bug(
        "every-chunk-applied",
        "B38",
        EveryChunkApplied,
        "Opacus BatchMemoryManager re-implemented by hand; " + REASONING,
        effect="the weights show clipped sums without noise: no finite eps",
        seen_by="the update against the release in batches of more than one physical batch",
    ),
    Bug(
        "divided-by-chunks",
        "B38",
        DividedByChunks,
        "Opacus issues 420, 571 and 819 (realised batch size)",
        effect="one unit more or less changes the scale of the release by up to 2: noise no longer covers it",
        seen_by="normalisation in batches of more than one physical batch",
    ),
    Bug(
        "last-chunk-without-noise",
        "B38",
        LastChunkWithoutNoise,
        REASONING,
        effect="b1 is released without noise in batches above 8 units: no finite eps",
        seen_by=SIZE + ", per block",
    ),
)
