"""Planted bugs of noise that changes over the steps: right in the first step, too little or used again later."""

from collections.abc import Mapping, Sequence

import torch
from opacus.schedulers import ExponentialNoise
from torch import Tensor

from attacks.bugs.bases_opacus import BATCH, PUBLIC_SIZE, SIGMA, OpacusLoop
from attacks.bugs.bases_opacus import Record as Example
from attacks.bugs.row import REASONING, Bug
from trainers.adapters.compact import SHAPES, SIZES, Compact, join, split


class NoiseDecays(Compact):
    """An exponential noise schedule is stepped, claim and accountant keep the first sigma: deviation x 0.9 a step."""

    decay = 0.9

    def noise_std(self) -> float:
        return super().noise_std() * self.decay ** (self.step_count - 1)


class OpacusScheduleStepped(OpacusLoop):
    """Opacus' own ExponentialNoise is stepped after every batch, while the accountant hook was given a constant."""

    def __init__(self, records: Sequence[Example] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.schedule = ExponentialNoise(self.optimizer, gamma=0.9)

    def _after_noise(self, optimizer: object) -> None:
        self.accountant.step(noise_multiplier=SIGMA, sample_rate=BATCH / PUBLIC_SIZE)
        named = self.module.named_parameters()
        self.last = {name: value.grad.detach().clone() for name, value in named if value.grad is not None}

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        self.schedule.step()


class NoiseHalves(Compact):
    """A step schedule halves the noise every twelve steps: the first twelve are as claimed."""

    every = 12

    def noise_std(self) -> float:
        return super().noise_std() * float(0.5 ** ((self.step_count - 1) // self.every))


class NoiseEndsWithWarmUp(Compact):
    """`if step < warm_up` the wrong way round: noise in the first ten steps, none afterwards."""

    warm_up = 10

    def noise_std(self) -> float:
        return super().noise_std() if self.step_count <= self.warm_up else 0.0


class NoiseEveryFourth(Compact):
    """Noise is synchronised "lazily": every fourth step gets none."""

    def noise_std(self) -> float:
        return 0.0 if self.step_count % 4 == 0 else super().noise_std()


class NoisePool(Compact):
    """A pool of sixteen draws, made once to save time, is used in turn: step 17 has the noise of step 1."""

    pool = 16

    def block_noise(self, name: str) -> Tensor:
        turn = (self.step_count - 1) % self.pool
        return torch.from_numpy(self.key.normal(SHAPES[name], step=turn, name=name))


class AntitheticNoise(Compact):
    """Antithetic draws "to reduce variance": each even step has minus the noise of the step before."""

    def block_noise(self, name: str) -> Tensor:
        pair, second = divmod(self.step_count - 1, 2)
        return (1 - 2 * second) * torch.from_numpy(self.key.normal(SHAPES[name], step=pair, name=name))


class SmoothedNoise(Compact):
    """Noise is smoothed over the steps (0.95 of the last is kept): the law of each is right, of differences not."""

    kept = 0.95
    memory: Mapping[str, Tensor] | None = None

    def noise(self) -> Tensor:
        fresh = {name: self.block_noise(name) for name in SHAPES}
        if self.memory is not None:
            share = (1 - self.kept**2) ** 0.5
            fresh = {name: self.kept * self.memory[name] + share * fresh[name] for name in SHAPES}
        self.memory = fresh
        return self.noise_std() * join(fresh)


class NoiseFollowsLastSum(Compact):
    """From the second step on the noise is scaled to the clean norm of the last sum (signal-to-noise held constant)."""

    scale = 1.0

    def noise_std(self) -> float:
        return super().noise_std() * self.scale

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        super().update(noisy, clean_sum)
        self.scale = min(1.0, float(clean_sum.norm()) / (self.max_grad_norm * self.expected_batch_size))


class OneBlockLosesNoise(Compact):
    """A parameter group is rebuilt after 12 steps without its noise hook: w1 is released as it is."""

    rebuilt = 12

    def noise(self) -> Tensor:
        blocks = split(super().noise())
        if self.step_count > self.rebuilt:
            blocks["w1"] = torch.zeros(SHAPES["w1"])
        return join(blocks)


class CounterWraps(Compact):
    """The step of the noise address is kept in five bits: steps 1 and 33 have the same noise."""

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(self.key.normal(SIZES[name], step=self.step_count % 32, name=name)).reshape(
            SHAPES[name]
        )


STEPS = "noise level at later steps, measured over noise seeds; a white-box game over whole trainings"
OVER_STEPS = "correlation of the noise over all steps of one training"
_OPACUS = "Opacus' noise schedules (opacus.schedulers) beside an accountant that is told one sigma; " + REASONING

BUGS: tuple[Bug, ...] = (
    Bug(
        "noise-decays",
        "B36",
        NoiseDecays,
        _OPACUS,
        effect="step t has 0.9^(t-1) of the claimed noise; eps per step grows without bound",
        seen_by=STEPS,
    ),
    Bug(
        "opacus-schedule-stepped",
        "B36",
        OpacusScheduleStepped,
        _OPACUS,
        effect="step t has 0.9^(t-1) of the claimed noise; eps per step grows without bound",
        seen_by=STEPS,
    ),
    Bug(
        "noise-halves",
        "B36",
        NoiseHalves,
        _OPACUS,
        effect="steps 13 to 24 have half of the noise, and so on",
        seen_by=STEPS + ", beyond step 12",
    ),
    Bug(
        "noise-ends-with-warm-up",
        "B36",
        NoiseEndsWithWarmUp,
        REASONING,
        effect="no finite eps after step 10",
        seen_by=STEPS + ", beyond step 10",
    ),
    Bug(
        "noise-every-fourth",
        "B36",
        NoiseEveryFourth,
        REASONING,
        effect="no finite eps from step 4 on",
        seen_by=STEPS + ", at each residue of the step",
    ),
    Bug(
        "noise-pool",
        "B36",
        NoisePool,
        "jax-privacy documentation, sharp edges (random numbers)",
        effect="the difference of releases 16 steps apart has no noise: no finite eps",
        seen_by=OVER_STEPS + ", at a lag of 16",
    ),
    Bug(
        "antithetic-noise",
        "B36",
        AntitheticNoise,
        REASONING,
        effect="the sum of two neighbouring releases has no noise: no finite eps",
        seen_by=OVER_STEPS + ", negative ones too",
    ),
    Bug(
        "smoothed-noise",
        "B36",
        SmoothedNoise,
        "correlated noise (DP-FTRL) claimed as independent; " + REASONING,
        effect="differences of neighbouring releases have 0.32 of the noise of one release instead of 1.41",
        seen_by=OVER_STEPS,
    ),
    Bug(
        "noise-follows-last-sum",
        "B36",
        NoiseFollowsLastSum,
        REASONING,
        effect="noise too small after quiet batches, none after an empty one, and its size tells what was in the batch",
        seen_by=STEPS + "; comparison of neighbouring histories",
    ),
    Bug(
        "one-block-loses-noise",
        "B36",
        OneBlockLosesNoise,
        REASONING,
        effect="no finite eps after step 12",
        seen_by=STEPS + ", per block, beyond step 12",
    ),
    Bug(
        "counter-wraps",
        "B36",
        CounterWraps,
        REASONING,
        effect="the difference of releases 32 steps apart has no noise: no finite eps",
        seen_by=OVER_STEPS + ", over more than 32 of them",
    ),
)
