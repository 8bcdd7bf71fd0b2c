"""Planted bugs of noise that has the claimed level and law number by number, and structure all the same; and of sizes
of batches between the powers of two."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attacks.bugs.bases import TOTAL, Structured
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import join, split

DIRECTIONS = "directions predicted from other draws"


class NoiseOfASubspace(Structured):
    """Noise lies in 31 of 61 random public dimensions, new in each step, and has the claimed power in all."""

    def noise(self) -> Tensor:
        basis = torch.linalg.qr(self.public(TOTAL, 31))[0]
        noised: Tensor = self.noise_std() * (TOTAL / 31) ** 0.5 * (basis @ (basis.T @ self.flat(self.step_count)))
        return noised


class NoiseMissesADirection(Structured):
    """One random public direction, new in each step, has no noise."""

    def noise(self) -> Tensor:
        direction, noise = self.public(TOTAL), self.flat(self.step_count)
        direction = direction / direction.norm()
        noised: Tensor = self.noise_std() * (noise - (noise @ direction) * direction)
        return noised


class NoiseRotated(Structured):
    """Even steps take the noise of the step before under a public rotation: half of the randomness, no number twice."""

    def noise(self) -> Tensor:
        if self.step_count % 2:
            return self.noise_std() * self.flat(self.step_count)
        rotation = torch.linalg.qr(self.public(TOTAL, TOTAL))[0]
        noised: Tensor = self.noise_std() * (rotation @ self.flat(self.step_count - 1))
        return noised


class NoiseOnASphere(Structured):
    """The noise vector is scaled to the norm that it has on average."""

    def noise(self) -> Tensor:
        noise = self.flat(self.step_count)
        noised: Tensor = self.noise_std() * TOTAL**0.5 * noise / noise.norm()
        return noised


class NoiseCentred(Structured):
    """w1's noise is centred and scaled back to the claimed variance: its sum is released without noise."""

    def noise(self) -> Tensor:
        blocks = split(self.flat(self.step_count))
        size = blocks["w1"].numel()
        blocks["w1"] = (blocks["w1"] - blocks["w1"].mean()) * (size / (size - 1)) ** 0.5
        return self.noise_std() * join(blocks)


class ColumnNoiseCentred(Structured):
    """Every column of w1's noise is centred and scaled back: six sums of the gradient are released without noise."""

    def noise(self) -> Tensor:
        blocks = split(self.flat(self.step_count))
        rows = blocks["w1"].shape[0]
        blocks["w1"] = (blocks["w1"] - blocks["w1"].mean(dim=0)) * (rows / (rows - 1)) ** 0.5
        return self.noise_std() * join(blocks)


class NoiseSumsToZero(Structured):
    """Balanced noise: over each ten steps it adds up to nothing."""

    steps_balanced = 10

    def noise(self) -> Tensor:
        count = self.steps_balanced
        epoch, place = divmod(self.step_count - 1, count)
        drawn = torch.stack([self.flat(epoch * count + step + 1) for step in range(count)])
        noised: Tensor = self.noise_std() * (count / (count - 1)) ** 0.5 * (drawn[place] - drawn.mean(dim=0))
        return noised


class NoiseInBfloat16(Structured):
    """Noise is drawn in bfloat16 and added to a sum in float32, whose low bits stay to be read."""

    def block_noise(self, name: str) -> Tensor:
        return super().block_noise(name).to(torch.bfloat16).float()


class NoiseInFloat16(Structured):
    """Noise is drawn in float16 by a library of its own and added to a sum in float32."""

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(super().block_noise(name).numpy().astype(np.float16).astype(np.float32))


class LessNoiseInARemainder(Structured):
    """A second physical batch of 16 that is not full, and no multiple of four, gets 0.7 of the noise."""

    realised = 0

    def step(self, indices: Sequence[int]) -> None:
        self.realised = len(set(indices))
        super().step(indices)

    def noise_std(self) -> float:
        short = 16 < self.realised < 32 and self.realised % 4 > 0
        return super().noise_std() * (0.7 if short else 1.0)


class LastOfARemainderTwice(Structured):
    """Above 16 units a batch is padded to a multiple of four by its last unit, which then counts more than once."""

    def clip(self, gradients: Tensor) -> Tensor:
        kept = super().clip(gradients)
        if len(kept) > 16 and len(kept) % 4:
            kept = torch.cat([kept, kept[-1:].repeat(4 - len(kept) % 4, 1)])
        return kept


BUGS = (
    Bug("noise-of-a-subspace", "B36", NoiseOfASubspace, REASONING,
        effect="30 of 61 directions are released without noise: no finite eps", seen_by=DIRECTIONS),
    Bug("noise-misses-a-direction", "B36", NoiseMissesADirection, REASONING,
        effect="one direction is released without noise: no finite eps", seen_by=DIRECTIONS),
    Bug("noise-rotated", "B36", NoiseRotated, REASONING,
        effect="one release, turned back, minus the next has no noise", seen_by="directions over two steps"),
    Bug("noise-on-a-sphere", "B10", NoiseOnASphere, REASONING,
        effect="the norm of release minus candidate sum tells the sum: no finite eps", seen_by="norms of noise"),
    Bug("noise-centred", "B36", NoiseCentred, REASONING,
        effect="the sum over a block is released without noise: no finite eps", seen_by="sums over a block"),
    Bug("column-noise-centred", "B36", ColumnNoiseCentred, REASONING,
        effect="sums over columns are released without noise: no finite eps", seen_by="sums over rows and columns"),
    Bug("noise-sums-to-zero", "B36", NoiseSumsToZero, REASONING,
        effect="the sum of ten releases has no noise: no finite eps", seen_by="sums over windows of steps"),
    Bug("noise-in-bfloat16", "B10", NoiseInBfloat16, "Mironov 2012 (least significant bits)",
        effect="the sum can be read modulo the noise's grid: no finite eps", seen_by="equal numbers in a step"),
    Bug("noise-in-float16", "B10", NoiseInFloat16, "Mironov 2012 (least significant bits)",
        effect="the sum can be read modulo the noise's grid: no finite eps", seen_by="equal numbers in a step"),
    Bug("less-noise-in-a-remainder", "B20", LessNoiseInARemainder, REASONING,
        effect="0.7 of the claimed noise at some sizes of batch", seen_by="every size of batch"),
    Bug("last-of-a-remainder-twice", "B20", LastOfARemainderTwice, REASONING,
        effect="sensitivity up to 4 C at some sizes of batch", seen_by="every size of batch"),
)  # fmt: skip
