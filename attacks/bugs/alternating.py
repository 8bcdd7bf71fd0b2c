"""Planted bugs that show while draws and steps alternate, between two units, or in production after the release."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attacks.bugs.bases import Production
from attacks.bugs.row import REASONING, Bug
from dpaudit import accounting
from dpaudit.randomness import Key
from trainers.adapters.compact import SHAPES, SIZES, Compact, Record, join, split

RATE, SPREAD, UPDATE = "draws of a trainer that trains", "counts of every pair of units", "equal releases"


class LargestComesAgain(Compact):
    """The unit with the largest gradient of a batch is put into the next one, if that is drawn before another step."""

    again: int | None = None

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        units = self.units_of(indices)
        self.again = None
        if len(units) > 2:
            norms = self.unit_gradients([self.records[index] for index in units]).norm(dim=1)
            self.again = units[int(torch.nan_to_num(norms).argmax())]

    def sample(self) -> list[int]:
        drawn, again = set(super().sample()), self.again
        self.again = None
        return sorted(drawn if again is None else drawn | {again})


class RateGrowsWithSteps(Compact):
    """A curriculum: after 200 steps of a training the rate is 1.5 q, and draws without steps never show it."""

    def sample(self) -> list[int]:
        rate = self.sample_rate * (1.5 if self.step_count > 200 else 1.0)
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < rate)]


class CoupledPair(Compact):
    """Two units share a coin and nine pairs have opposite ones: every rate is q, and sizes vary as they should."""

    def sample(self) -> list[int]:
        coins = self.sampler.random(len(self.records))
        if coins.size >= 40:
            coins[2] = coins[1]
            coins[10:28:2] = 1 - coins[11:28:2]
        return [int(index) for index in np.flatnonzero(coins < self.sample_rate)]


class RateOfPrivateSize(Compact):
    """The claim has the public rate; the sampler draws at B / len(records)."""

    def sample(self) -> list[int]:
        rate = self.expected_batch_size / max(1, len(self.records))
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < rate)]


class CleanMeanInProduction(Production):
    """In production a fused optimiser applies the clean mean; what is logged as released is noisy."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        super().update(clean_sum / self.expected_batch_size if self.live else noisy, clean_sum)


class CleanMaskInProduction(Production):
    """In production blocks are pruned by their clean gradient."""

    keep = 0.75

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        if not self.live:
            super().update(noisy, clean_sum)
            return
        self.updated = self.select(split(clean_sum))
        mask = join({name: torch.full(SHAPES[name], float(name in self.updated)) for name in SHAPES})
        self.weights = self.weights - self.learning_rate * mask * noisy


class StandsStillInProduction(Production):
    """In production the optimiser holds other tensors: nothing moves."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        if self.live:
            self.updated = set(SHAPES)
        else:
            super().update(noisy, clean_sum)


class OtherEpsilonInProduction(Production):
    """In production eps is that of 1.5 times the noise."""

    def epsilon(self, delta: float) -> float:
        sigma = self.noise_multiplier * (1.5 if self.live else 1.0)
        return accounting.epsilon(accounting.DpSgd(sigma, self.sample_rate, self.step_count, self.relation), delta)


class ResumedNoiseAgain(Production):
    """In production a checkpoint holds the seed of the generator, and `load` starts it anew: noise of step 1 again."""

    saved: dict[str, Key] = {}  # noqa: RUF012  # stands for the file, which every trainer reads
    gone = 0

    def save(self, path: Path) -> None:
        super().save(path)
        ResumedNoiseAgain.saved[str(path)] = self.key

    def load(self, path: Path) -> None:
        super().load(path)
        if self.live:
            self.key, self.gone = ResumedNoiseAgain.saved[str(path)], self.step_count

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count - self.gone, name=name))


class LionOfCleanSums(Compact):
    """Lion whose momentum is fed with the clean sum: a sign of both, which is neither affine nor Adam."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)
        self.weights = self.weights - 0.01 * torch.sign(0.9 * self.velocity + 0.1 * noisy)
        self.velocity = 0.9 * self.velocity + 0.1 * clean_sum / self.expected_batch_size


class AdagradOfCleanSums(Compact):
    """Adagrad whose accumulator is fed with the clean sum from step 2 on."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.squares = torch.ones(sum(SIZES.values()))

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)
        fed = noisy if self.step_count == 1 else clean_sum / self.expected_batch_size
        self.squares = self.squares + fed.square()
        self.weights = self.weights - self.learning_rate * noisy / self.squares.sqrt()


class LessNoiseApplied(Compact):
    """The gradient that is applied has 0.98 of the released one's noise: their difference shows the noise."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        clean = clean_sum / self.expected_batch_size
        super().update(clean + 0.98 * (noisy - clean), clean_sum)


class EpsilonEndsWithThePlan(Compact):
    """eps stops growing at the number of steps that was claimed, however long the training goes on."""

    def epsilon(self, delta: float) -> float:
        assert self.steps is not None
        steps = min(self.step_count, self.steps)
        event = accounting.DpSgd(self.noise_multiplier, self.sample_rate, steps, self.relation)
        return accounting.epsilon(event, delta) if steps else 0.0


BUGS = (
    Bug("largest-comes-again", "B17", LargestComesAgain, REASONING,
        effect="the choice follows clean gradients, and the rate is 1.2 q", seen_by=RATE),
    Bug("rate-grows-with-steps", "B17", RateGrowsWithSteps, REASONING, effect="1.5 q is spent where q is accounted",
        seen_by=RATE),
    Bug("coupled-pair", "B17", CoupledPair, REASONING, effect="two units share one coin", seen_by=SPREAD),
    Bug("rate-of-private-size", "B17", RateOfPrivateSize, "Opacus issues 813 and 814",
        effect="the rate follows a private number", seen_by="draws over half of the records"),
    Bug("clean-mean-in-production", "B39", CleanMeanInProduction, REASONING, effect="no noise in what is trained",
        seen_by="moves without a seed"),
    Bug("clean-mask-in-production", "B39", CleanMaskInProduction, REASONING, effect="the mask has no noise",
        seen_by="masks without a seed"),
    Bug("stands-still-in-production", "B39", StandsStillInProduction, REASONING, effect="nothing is trained",
        seen_by="moves without a seed", violation=False),
    Bug("other-epsilon-in-production", "B39", OtherEpsilonInProduction, REASONING,
        effect="eps of more noise than there is", seen_by="eps without a seed"),
    Bug("resumed-noise-again", "B39", ResumedNoiseAgain, REASONING,
        effect="differences of releases before and after a checkpoint have no noise",
        seen_by="checkpoints without a seed"),
    Bug("lion-of-clean-sums", "B33", LionOfCleanSums, REASONING, effect="clean sums decide moves", seen_by=UPDATE),
    Bug("adagrad-of-clean-sums", "B33", AdagradOfCleanSums, REASONING, effect="clean sums scale moves", seen_by=UPDATE),
    Bug("less-noise-applied", "B33", LessNoiseApplied, REASONING,
        effect="release and move together show the sum without noise", seen_by=UPDATE),
    Bug("epsilon-ends-with-the-plan", "B18", EpsilonEndsWithThePlan, REASONING,
        effect="9.97 is quoted where 10.98 were spent", seen_by="eps beyond the claimed steps"),
)  # fmt: skip
