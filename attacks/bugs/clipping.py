"""Planted bugs of clipping and of the privacy unit: one unit moves the sum by more than C."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.adapters.compact import SIZES, Compact, Record


class BatchMeanClipped(Compact):
    """The gradient of the whole batch is clipped instead of each unit's."""

    def clip(self, gradients: Tensor) -> Tensor:
        if not len(gradients):
            return gradients
        mean = gradients.mean(dim=0)
        factor = min(1.0, self.max_grad_norm / (float(mean.norm()) + 1e-12))
        return gradients * factor


class MicrobatchClipped(Compact):
    """Pairs of units form a microbatch whose mean is clipped; a unit turns the microbatch's vector by up to 2C."""

    def clip(self, gradients: Tensor) -> Tensor:
        if not len(gradients):
            return gradients
        pairs = torch.stack([part.mean(dim=0) for part in torch.split(gradients, 2)])
        return super().clip(pairs)


class ClippedUpwards(Compact):
    """The factor C / norm lacks its min(1, .): small gradients are scaled up to C."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1, keepdim=True)
        scaled = gradients * (self.max_grad_norm / (norms + 1e-12))
        return torch.where(torch.isfinite(norms), scaled, torch.zeros_like(scaled))


class NeverClipped(Compact):
    """min and max confused: the factor never falls below 1."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1, keepdim=True)
        scaled = gradients * (self.max_grad_norm / norms).clamp(min=1.0)
        return torch.where(torch.isfinite(norms), scaled, torch.zeros_like(scaled))


class PerLayerClipped(Compact):
    """Every block is clipped to C by itself: together sqrt(4) C, noise for C."""

    def clip(self, gradients: Tensor) -> Tensor:
        return torch.cat(
            [Compact.clip(self, part) for part in torch.split(gradients, list(SIZES.values()), dim=1)], dim=1
        )


class TwoTowersClipped(Compact):
    """First and second layer ("vision and text") clip to C each and share one noise for C."""

    def clip(self, gradients: Tensor) -> Tensor:
        first = SIZES["w1"] + SIZES["b1"]
        towers = (gradients[:, :first], gradients[:, first:])
        return torch.cat([Compact.clip(self, part) for part in towers], dim=1)


class NormWithoutHead(Compact):
    """The norm leaves out the output head, as a tied or lately unfrozen weight is left out of a ghost norm."""

    def clip(self, gradients: Tensor) -> Tensor:
        body = SIZES["w1"] + SIZES["b1"]
        norms = gradients[:, :body].norm(dim=1)
        factors = self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
        finite = torch.isfinite(gradients.norm(dim=1))
        return torch.where(finite[:, None], gradients * factors[:, None], torch.zeros_like(gradients))


class HalfPrecisionNorm(Compact):
    """Norm and factor in bfloat16: the rounded factor lets a unit exceed C by up to a percent."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.to(torch.bfloat16).norm(dim=1)
        factors = (self.max_grad_norm / norms.clamp(min=self.max_grad_norm)).float()
        finite = torch.isfinite(norms.float())
        return torch.where(finite[:, None], gradients * factors[:, None], torch.zeros_like(gradients))


class LossScaleLeftIn(Compact):
    """Mixed precision: gradients are clipped with the loss scale still in C's place, 8 C instead of C."""

    loss_scale = 8.0

    def clip(self, gradients: Tensor) -> Tensor:
        scaled = gradients * self.loss_scale
        limit = self.max_grad_norm * self.loss_scale**2
        norms = scaled.norm(dim=1)
        factors = limit / norms.clamp(min=limit)
        finite = torch.isfinite(norms)
        return torch.where(finite[:, None], scaled * factors[:, None], torch.zeros_like(scaled)) / self.loss_scale


class NanPasses(Compact):
    """A NaN norm makes a NaN factor and poisons the sum."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1, keepdim=True)
        scaled: Tensor = gradients * (self.max_grad_norm / norms.clamp(min=self.max_grad_norm))
        return scaled


class NanReplacedTooLate(Compact):
    """`norm > C` is false for NaN, so the unit is left unclipped; then its NaN and inf become finite numbers."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1, keepdim=True)
        clipped = torch.where(norms > self.max_grad_norm, gradients * (self.max_grad_norm / norms), gradients)
        return torch.nan_to_num(clipped, nan=1e4, posinf=1e4, neginf=-1e4)


class MedianClipped(Compact):
    """C is the median norm of the batch, computed without noise; the noise follows the public C."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1)
        finite = torch.isfinite(norms)
        limit = float(norms[finite].median()) if bool(finite.any()) else self.max_grad_norm
        factors = limit / norms.clamp(min=limit)
        return torch.where(finite[:, None], gradients * factors[:, None], torch.zeros_like(gradients))


class QuestionsClipped(Compact):
    """Each question (caption, augmentation) is clipped by itself, so an image with k of them counts k times."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        x, y, _, _ = self.rows(batch)
        return self.row_gradients(x, y)

    def gradient(self, record: Record) -> dict[str, Tensor]:
        return dict(Compact(self.records, seed=0).gradient(record))


class RepeatsCounted(Compact):
    """A unit that the loader repeats (repeat augmentation, oversampling) is clipped and added once per repeat."""

    def units_of(self, indices: Sequence[int]) -> list[int]:
        return sorted(indices)

    def sample(self) -> list[int]:
        return sorted(index for index in super().sample() for _ in range(2))


class NoiseThenClip(Compact):
    """Each unit's gradient is noised first and clipped afterwards: clipping bounds the noise, not the leak."""

    def clip(self, gradients: Tensor) -> Tensor:
        noise = super().noise() / max(1, len(gradients)) ** 0.5
        return super().clip(gradients + noise)

    def noise(self) -> Tensor:
        return torch.zeros(sum(SIZES.values()))
