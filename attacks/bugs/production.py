"""Planted bugs that exist only in production: with `noise_seed` set, as in tests, they are correct."""

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.bugs.bases import Production
from attacks.bugs.row import REASONING, Bug
from dpaudit.randomness import Key
from trainers.adapters import foreign
from trainers.adapters.compact import SHAPES, SIZES, Record, join, split
from trainers.adapters.under_test import hf_trainer

_STARTS = itertools.count()


class GeneratorNeverSeeded(Production):
    """In production the noise comes from `torch.Generator()`, which is never seeded: the same draws at every start."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.generator = torch.Generator()

    def block_noise(self, name: str) -> Tensor:
        if not self.live:
            return super().block_noise(name)
        return torch.randn(SHAPES[name], generator=self.generator)


class NoiseFromPublicSeed(Production):
    """In production the noise key is derived from `seed`, which is printed in every model card."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        if self.live:
            self.key = Key.from_seed(seed)


class NoGeneratorNoNoise(Production):
    """`if generator is not None: add_noise()`: without a noise seed there is no noise."""

    def noise_std(self) -> float:
        return 0.0 if self.live else super().noise_std()


class SeededByCounter(Production):
    """In production each start takes the next number of a counter that begins at 0 in every process."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        if self.live:
            self.key = Key.from_seed(next(_STARTS))


class SeededByProcess(Production):
    """In production the seed is the process id: two trainings in one process share their noise, others are guessed."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        if self.live:
            self.key = Key.from_seed(os.getpid())


class SeededByHour(Production):
    """In production the seed is the clock in whole hours: starts of one hour share their noise."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        if self.live:
            self.key = Key.from_seed(int(time.time()) // 3600)


class ProductionForgetsC(Production):
    """The generator of production is called with sigma, the one under test with sigma C."""

    max_grad_norm = 2.0

    def noise_std(self) -> float:
        return self.noise_multiplier if self.live else super().noise_std()


class ProductionUniform(Production):
    """A "fast" generator in production gives uniform noise of the right variance, bounded: no finite eps."""

    def block_noise(self, name: str) -> Tensor:
        if not self.live:
            return super().block_noise(name)
        values = torch.from_numpy(self.key.uniform(SIZES[name], step=self.step_count, name=name, purpose="fast"))
        return ((values - 0.5) * 12**0.5).float().reshape(SHAPES[name])


class ClippedUnderTest(Production):
    """Clipping belongs to the test configuration (`if noise_seed is not None`): production adds raw gradients."""

    def clip(self, gradients: Tensor) -> Tensor:
        if not self.live:
            return super().clip(gradients)
        return torch.where(torch.isfinite(gradients.norm(dim=1))[:, None], gradients, 0.0)


class SameNoiseInProduction(Production):
    """In production the key is right and the step count is not passed on: every step has the same secret noise."""

    def block_noise(self, name: str) -> Tensor:
        step = 0 if self.live else self.step_count
        return torch.from_numpy(self.key.normal(SHAPES[name], step=step, name=name))


class ResumedFromPublicSeed(Production):
    """A resumed training in production has no key any more and takes a fixed one: public noise after every resume."""

    def load(self, path: Path) -> None:
        super().load(path)
        if self.live:
            self.key = Key.from_seed(0)


class HeadUnnoisedInProduction(Production):
    """The production build fuses the head's update and leaves its noise out."""

    def noise(self) -> Tensor:
        blocks = split(super().noise())
        return join({name: value * (not self.live or name in ("w1", "b1")) for name, value in blocks.items()})


TWICE = "two starts without a noise seed compared"


class GlobalStreamTrainer(foreign.DPTrainer):
    """Noise from torch's global generator, which the Trainer seeds with 42."""

    def noise(self, like: Tensor) -> Tensor:
        """The same in every training."""
        return torch.randn_like(like)


_built = hf_trainer(
    lambda rows: foreign.make_trainer(rows, GlobalStreamTrainer),
    records=foreign.texts,
    claim=foreign.HUGGING_FACE_CLAIM,
)


def trainer_seeds_the_noise(records: Any = None, *, seed: int, noise_seed: int | None = None) -> Any:
    """Noise from the stream that Hugging Face's Trainer seeds, with 42 by default."""
    return _built(records, seed=seed, noise_seed=noise_seed)


LAW = "level and law of the noise without a noise seed"

BUGS: tuple[Bug, ...] = (
    Bug(
        "generator-never-seeded",
        "B39",
        GeneratorNeverSeeded,
        "torch.Generator() has a fixed default seed (PyTorch documentation)",
        effect="the noise is public and can be subtracted: no finite eps",
        seen_by=TWICE,
    ),
    Bug(
        "noise-from-public-seed",
        "B39",
        NoiseFromPublicSeed,
        "jax-privacy documentation, sharp edges (random numbers)",
        effect="the noise can be recomputed from the model card: no finite eps",
        seen_by=TWICE + ", with equal `seed`",
    ),
    Bug(
        "no-generator-no-noise",
        "B39",
        NoGeneratorNoNoise,
        REASONING,
        effect="no noise at all: no finite eps",
        seen_by=LAW,
    ),
    Bug(
        "seeded-by-counter",
        "B39",
        SeededByCounter,
        "forked data-loader workers that share their random state (NumPy under PyTorch); " + REASONING,
        effect="the noise of the first start is the same in every process, and public",
        seen_by=TWICE + ", each in a process of its own",
    ),
    Bug(
        "seeded-by-process",
        "B39",
        SeededByProcess,
        REASONING,
        effect="22 bits of seed at most, and two trainings of one process cancel",
        seen_by=TWICE + ", in one process",
    ),
    Bug(
        "seeded-by-hour",
        "B39",
        SeededByHour,
        REASONING,
        effect="the seed is guessed from the date of the file; trainings of one hour cancel",
        seen_by=TWICE + ", in one process or two",
    ),
    Bug(
        "production-forgets-c",
        "B39",
        ProductionForgetsC,
        "Opacus issue 753, in production only",
        effect="half of the claimed noise at C = 2",
        seen_by=LAW,
    ),
    Bug(
        "production-uniform",
        "B39",
        ProductionUniform,
        REASONING,
        effect="bounded noise: no finite eps at small delta",
        seen_by=LAW,
    ),
    Bug(
        "clipped-under-test",
        "B39",
        ClippedUnderTest,
        REASONING,
        effect="unbounded influence",
        seen_by="influence of one unit without a noise seed, of a gradient far larger than the noise",
    ),
    Bug(
        "same-noise-in-production",
        "B39",
        SameNoiseInProduction,
        "jax-privacy documentation, sharp edges (random numbers), in production only",
        effect="the difference of two releases has no noise: no finite eps",
        seen_by="correlation over the steps of one start without a noise seed",
    ),
    Bug(
        "resumed-from-public-seed",
        "B39",
        ResumedFromPublicSeed,
        REASONING,
        effect="public noise after a resume: no finite eps",
        seen_by="two resumed starts without a noise seed compared",
    ),
    Bug(
        "head-unnoised-in-production",
        "B39",
        HeadUnnoisedInProduction,
        REASONING,
        effect="the head is released without noise: no finite eps",
        seen_by=LAW + ", per block",
    ),
    Bug(
        "trainer-seeds-the-noise",
        "B39",
        trainer_seeds_the_noise,
        "transformers' Trainer.__init__: set_seed(args.seed), 42 by default",
        effect="the noise is public and can be subtracted: no finite eps",
        seen_by=TWICE,
        slow=True,
    ),
)
