"""Planted bugs that show at one size of batch, in a few numbers, late, at another delta, or only in the tails."""

import numpy as np
import torch
from torch import Tensor

from attacks.bugs.bases import Production
from attacks.bugs.row import REASONING, Bug
from dpaudit import accounting
from trainers.adapters.compact import SHAPES, Compact, split

LEVEL, LAW, OVER_STEPS = "levels over many steps together", "extremes of the noise", "correlations a block"


class LateAnneal(Compact):
    """From step 60 of 200 on the noise is 0.7 of what is claimed."""

    def noise_std(self) -> float:
        return super().noise_std() * (0.7 if self.step_count >= 60 else 1.0)


class BiasNoiseKept(Compact):
    """The noise of the two biases, 7 of 61 numbers, is drawn in odd steps and used once more in even ones."""

    def block_noise(self, name: str) -> Tensor:
        step = self.step_count - (name.startswith("b") and self.step_count % 2 == 0)
        return torch.from_numpy(self.key.normal(SHAPES[name], step=step, name=name))


class SizesKept(Compact):
    """Signs are drawn in every step, sizes every second one: no correlation, and the noise of two steps is not two."""

    def block_noise(self, name: str) -> Tensor:
        size = self.key.normal(SHAPES[name], step=self.step_count // 2, name=name + " size")
        return torch.sign(super().block_noise(name)) * torch.from_numpy(np.abs(size))


class RowOfTheStepBefore(Compact):
    """A ring buffer: w1's last row takes the noise that its first row had in the step before."""

    def block_noise(self, name: str) -> Tensor:
        noise = super().block_noise(name)
        if name == "w1":
            noise[-1] = torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count - 1, name=name))[0]
        return noise


class NoiseClamped(Compact):
    """Noise is clamped at 3 sigma, for stability."""

    def block_noise(self, name: str) -> Tensor:
        return super().block_noise(name).clamp(-3.0, 3.0)


class NoiseOnAGrid(Compact):
    """Noise lies on a grid of sigma / 10, the sum does not: a release modulo the grid shows the sum's own rest."""

    def block_noise(self, name: str) -> Tensor:
        return (10 * super().block_noise(name)).round() / 10


class ToleratedExcess(Compact):
    """Only gradients longer than 1.1 C are scaled down."""

    def clip(self, gradients: Tensor) -> Tensor:
        norms, kept = gradients.norm(dim=1), super().clip(gradients)
        return torch.where((norms <= 1.1 * self.max_grad_norm)[:, None], gradients, kept)


class OneSizeDividesByLess(Compact):
    """A batch of exactly three units takes a path whose mean is over B - 1."""

    def clip(self, gradients: Tensor) -> Tensor:
        kept = super().clip(gradients)
        return kept * 1.5 if len(gradients) == 3 else kept


class StaleCopy(Compact):
    """Gradients are taken at a copy of the weights that is renewed every 100 steps."""

    copied: Tensor | None = None

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        if self.copied is None or self.step_count % 100 == 0:
            self.copied = self.weights.clone()
        now, self.weights = self.weights, self.copied
        try:
            return super().row_gradients(x, y)
        finally:
            self.weights = now


class BodyDetached(Compact):
    """The body's output is detached: w1 and b1 are noised and updated, and never have a gradient."""

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        rows = super().row_gradients(x, y).clone()
        names = list(SHAPES)
        sizes = [int(np.prod(SHAPES[name])) for name in names]
        rows[:, : sizes[names.index("w1")] + sizes[names.index("b1")]] = 0
        return rows


class BlockLost(Compact):
    """From step 8 on the optimiser holds another tensor for w1: it is noised, released and never moved again."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        before = split(self.weights)["w1"].clone()
        super().update(noisy, clean_sum)
        if self.step_count >= 8:
            split(self.weights)["w1"].copy_(before)


class EpsilonEveryTen(Compact):
    """The accountant is asked in step 1 and then every ten steps; between, its last answer stands."""

    def epsilon(self, delta: float) -> float:
        return _after(self, max(1, self.step_count // 10 * 10), delta)


class EpsilonTableEnds(Compact):
    """A table of eps over the steps ends at 100 of 200, and its last value is returned."""

    def epsilon(self, delta: float) -> float:
        return _after(self, min(100, self.step_count), delta)


class EpsilonAtOneDelta(Compact):
    """epsilon(delta) is that of delta = 1e-5, whatever delta is asked for."""

    def epsilon(self, delta: float) -> float:
        return super().epsilon(1e-5)


class PoolInProduction(Production):
    """In production noise comes from a buffer of 16 steps that is used in turn."""

    def block_noise(self, name: str) -> Tensor:
        step = self.step_count % 16 if self.live else self.step_count
        return torch.from_numpy(self.key.normal(SHAPES[name], step=step, name=name))


class BiasNoiseKeptInProduction(Production):
    """In production the noise of the biases is drawn in odd steps and used once more in even ones."""

    def block_noise(self, name: str) -> Tensor:
        step = self.step_count - (self.live and name.startswith("b") and self.step_count % 2 == 0)
        return torch.from_numpy(self.key.normal(SHAPES[name], step=step, name=name))


class RowsShareNoiseInProduction(Production):
    """In production a tiled kernel gives odd rows of w1 the noise of even ones."""

    def block_noise(self, name: str) -> Tensor:
        noise = super().block_noise(name)
        if self.live and name == "w1":
            noise[1::2] = noise[0::2]
        return noise


class BucketsInProduction(Production):
    """In production the sampler draws buckets of four neighbours, each at rate q."""

    def sample(self) -> list[int]:
        if not self.live:
            return super().sample()
        joined = np.repeat(self.sampler.random(-(-len(self.records) // 4)) < self.sample_rate, 4)
        return [int(index) for index in np.flatnonzero(joined[: len(self.records)])]


def _after(trainer: Compact, steps: int, delta: float) -> float:
    if trainer.step_count == 0:
        return 0.0
    event = accounting.DpSgd(trainer.noise_multiplier, trainer.sample_rate, steps, trainer.relation)
    return accounting.epsilon(event, delta)


BUGS = (
    Bug("late-anneal", "B36", LateAnneal, REASONING, effect="0.7 of the claimed noise from step 60 on", seen_by=LEVEL),
    Bug("bias-noise-kept", "B36", BiasNoiseKept, REASONING,
        effect="differences of two releases show the biases without noise: no finite eps", seen_by=OVER_STEPS),
    Bug("noise-sizes-kept", "B36", SizesKept, REASONING,
        effect="half of the sums or differences of two neighbouring releases have no noise", seen_by="sizes of noise"),
    Bug("row-of-the-step-before", "B36", RowOfTheStepBefore, REASONING,
        effect="a difference of two rows of two releases has no noise", seen_by="equal numbers anywhere"),
    Bug("noise-clamped", "B10", NoiseClamped, "clamped noise; " + REASONING,
        effect="bounded noise: no finite eps at small delta", seen_by=LAW),
    Bug("noise-on-a-grid", "B10", NoiseOnAGrid, "Mironov 2012 (least significant bits), made coarse",
        effect="the sum can be read modulo sigma / 10: no finite eps", seen_by="distinct values"),
    Bug("tolerated-excess", "B26", ToleratedExcess, REASONING, effect="sensitivity 1.1 C",
        seen_by="influence of units just above C"),
    Bug("one-size-divides-by-less", "B20", OneSizeDividesByLess, REASONING,
        effect="sensitivity above C in batches of three", seen_by="every small size of batch"),
    Bug("stale-copy", "B37", StaleCopy, REASONING, effect="trains at weights of 100 steps ago",
        seen_by="contributions in the middle of a training", violation=False),
    Bug("body-detached", "B37", BodyDetached, REASONING, effect="the body is updated by noise alone",
        seen_by="contributions a block", violation=False),
    Bug("block-lost", "B37", BlockLost, "PEFT under Opacus; a parameter replaced after the optimiser was built",
        effect="a block stops training", seen_by="moves in the last third", violation=False),
    Bug("epsilon-every-ten", "B18", EpsilonEveryTen, REASONING, effect="up to nine steps are missing in eps",
        seen_by="eps off the beat"),
    Bug("epsilon-table-ends", "B18", EpsilonTableEnds, REASONING, effect="7.05 is quoted where 9.97 were spent",
        seen_by="eps at all claimed steps"),
    Bug("epsilon-at-one-delta", "B18", EpsilonAtOneDelta, REASONING, effect="eps too small at every smaller delta",
        seen_by="eps at two deltas"),
    Bug("pool-in-production", "B36", PoolInProduction, REASONING,
        effect="differences of releases 16 steps apart have no noise", seen_by="many steps without a seed"),
    Bug("bias-noise-kept-in-production", "B36", BiasNoiseKeptInProduction, REASONING,
        effect="differences of two releases show the biases without noise", seen_by="equal numbers anywhere"),
    Bug("rows-share-noise-in-production", "B36", RowsShareNoiseInProduction, REASONING,
        effect="differences of rows have no noise", seen_by="rows without a seed"),
    Bug("buckets-in-production", "B17", BucketsInProduction, REASONING,
        effect="four units share one coin", seen_by="draws without a seed"),
)  # fmt: skip
