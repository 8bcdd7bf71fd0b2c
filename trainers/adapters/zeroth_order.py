"""Zeroth-order DP training: one private number per unit and step (Tang et al. 2024, arXiv 2401.04343; DPZero, ICML'24).

For a public random direction z each unit contributes the clipped difference of its loss at theta + mu z and
theta - mu z; their noisy sum times z is the update. The noise is one number, so it moves parameters along a line: that
is how the mechanism works, and the contract judges the number and the line instead of every coordinate.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpaudit.claims import StepClaim
from dpaudit.randomness import Key
from trainers.adapters.compact import Compact, Record, split


class DpZo(Compact):
    """DP-ZO on the compact network; `released()` is the noisy number, `direction()` the line."""

    max_grad_norm = 1.0
    learning_rate = 0.01
    radius = 1e-2

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.public = Key.from_seed(seed)

    @property
    def claim(self) -> StepClaim:
        """As DP-SGD, with a scalar release."""
        return StepClaim(**{**super().claim.__dict__, "mechanism": "zeroth-order"})

    # A scalar has no per-parameter gradient to show or to inject.
    gradient = None  # type: ignore[assignment]
    inject = None  # type: ignore[assignment]

    def losses(self, weights: Tensor, batch: Sequence[Record]) -> Tensor:
        """(U,) mean loss of each unit."""
        x, y, owner, weight = self.rows(batch)
        blocks = split(weights)
        out = torch.tanh(x @ blocks["w1"].T + blocks["b1"]) @ blocks["w2"] + blocks["b2"]
        return torch.zeros(len(batch)).index_add(0, owner, 0.5 * (out - y).square() * weight)

    def line(self) -> Tensor:
        """(61,) public direction of the present step: depends on seed and step only."""
        return torch.from_numpy(self.public.normal(61, step=self.step_count, name="direction"))

    def step(self, indices: Sequence[int]) -> None:
        """Two forward passes, clip the numbers, add one noise, move along the line."""
        self.step_count += 1
        batch = [self.records[index] for index in self.units_of(indices)]
        z = self.line()
        difference = self.losses(self.weights + self.radius * z, batch) - self.losses(
            self.weights - self.radius * z, batch
        )
        numbers = (difference / (2 * self.radius))[:, None]
        total = self.clip(numbers).sum(dim=0)
        noise = torch.from_numpy(self.key.normal(1, step=self.step_count, name="number"))
        number = (total + self.noise_std() * noise) / self.expected_batch_size
        self.last = {"number": number}
        self.weights = self.weights - self.learning_rate * number * z

    def direction(self) -> Mapping[str, Tensor]:
        """The line of the last step."""
        return split(self.line())

    applied = None  # type: ignore[assignment]
    select = None  # type: ignore[assignment]


dp_zo = DpZo
