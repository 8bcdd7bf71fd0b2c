"""Correct trainers whose update looks suspicious: all of it is post-processing of the noisy gradient."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpaudit import atomic
from trainers.adapters.compact import SHAPES, Adam, Compact, Record, join, split


class Nesterov(Compact):
    """Nesterov momentum of 0.9 on the noisy gradient: a step moves on long after its batch. Post-processing."""

    momentum = 0.9

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """Looks ahead along the velocity."""
        self.updated = set(SHAPES)
        self.velocity = self.momentum * self.velocity + noisy
        self.weights = self.weights - self.learning_rate * (noisy + self.momentum * self.velocity)


class AdamW(Adam):
    """DP-AdamW: bias-corrected moments of the noisy gradient, decoupled weight decay of 0.05."""

    decay = 0.05

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """Weights shrink in every step, with or without a batch."""
        self.weights = self.weights * (1 - self.learning_rate * self.decay)
        super().update(noisy, clean_sum)


class WarmUp(Compact):
    """The learning rate rises over ten steps from a tenth, then falls by a cosine: a public schedule."""

    peak = 0.1

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """By the step count alone."""
        left = min(1.0, max(0, self.step_count - 10) / 190)
        rate = self.peak * min(1.0, self.step_count / 10) * 0.5 * (1 + math.cos(math.pi * left))
        self.learning_rate = rate
        super().update(noisy, clean_sum)


class SignOfNoisy(Compact):
    """Only the sign of the noisy gradient is applied, and the size of the step never tells what the batch held."""

    learning_rate = 0.01

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """signSGD."""
        self.updated = set(SHAPES)
        self.weights = self.weights - self.learning_rate * noisy.sign()


class NoisyFeedback(Compact):
    """The update is rounded to a grid, the rest kept for the next step: error feedback of the noisy gradient."""

    grid = 0.25

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """`velocity` holds what rounding left over, so checkpoints carry it."""
        self.updated = set(SHAPES)
        wanted = noisy + self.velocity
        sent = (wanted / self.grid).round() * self.grid
        self.velocity = wanted - sent
        self.weights = self.weights - self.learning_rate * sent


class RateFollowsNoisy(Compact):
    """The learning rate falls when the *noisy* gradient is large: it follows what is released, not the data."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """Post-processing."""
        self.updated = set(SHAPES)
        self.weights = self.weights - 0.2 * noisy / (1 + noisy.norm())


class Averaged(Compact):
    """What is published is an exponential average of the noisy weights; training goes on from the weights."""

    rate = 0.9

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.average = self.weights.clone()

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """The average moves by a tenth of the way."""
        super().update(noisy, clean_sum)
        self.average = self.rate * self.average + (1 - self.rate) * self.weights

    def parameters(self) -> Mapping[str, Tensor]:
        """The average."""
        return split(self.average)

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Weights and average alike."""
        self.weights = join(parameters)
        self.average = self.weights.clone()

    def save(self, path: Path) -> None:
        """With the average."""
        state = {"weights": self.weights, "velocity": self.velocity, "average": self.average}
        atomic.write_tensors(path, {**state, "step": torch.tensor([self.step_count])})

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        super().load(path)
        self.average = load_file(path)["average"]


class LatePolyak(Averaged):
    """Polyak averaging that starts after step 8: until then the weights are published, afterwards their mean."""

    start = 8

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """A running mean of the noisy weights."""
        Compact.update(self, noisy, clean_sum)
        count = max(1, self.step_count - self.start)
        self.average = self.average + (self.weights - self.average) / count
