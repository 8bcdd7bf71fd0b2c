"""Zeroth-order DP training (DP-ZO, Tang et al. 2024, arXiv 2401.04343; DPZero, Zhang et al., ICML 2024).

A step draws K public directions z_1 … z_K ~ N(0, I) over the trained parameters. Unit i contributes K numbers, the
central differences

    d_ik = (L_i(theta + mu z_k) - L_i(theta - mu z_k)) / (2 mu),

its loss's derivative along each direction up to O(mu^2). Two forward passes a direction, no graph, no gradient of any
unit. The vector d_i is clipped as one thing, summed over the Poisson batch, noised and divided by the expected batch
size; the update is the mean over k of number_k z_k, handed to SGD or AdamW (post-processing).

Why it is private. The directions are a function of (key, step, name) and of nothing else: public, and independent of
the noise. Given them and the present parameters a step releases one vector in R^K.

- Gaussian: the L2 norm of d_i is clipped to C, so a unit moves the sum by at most C and the step is the ordinary
  Poisson-subsampled Gaussian mechanism with multiplier sigma in R^K. By rotation invariance its privacy does not depend
  on K. Accounting K scalar queries as T*K subsampled steps would be wrong: they share one batch, so they are not
  subsampled independently.
- Laplace: the L1 norm of d_i is clipped to C and every number gets Laplace noise of scale sigma C. The trade-off
  function T of a shift (s_1 … s_K) with sum |s_k| <= C is at least that of one number moved by C: walking from P to Q
  one coordinate at a time, T(P, Q) >= f_K o (1 - f_{K-1}) o … with f_k = T(Lap(0), Lap(s_k)) (Dong, Roth & Su 2022,
  lemma A.5), and for a log-concave law on the line these chains are exactly T(Lap(0), Lap(sum |s_k|)). Poisson
  subsampling keeps the order (Zhu, Dong & Wang 2022, theorem 11). So a step is the subsampled one-dimensional Laplace
  mechanism, whatever K.

A batch without units releases noise alone. A unit whose numbers are not finite contributes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dpaudit.config import ZerothOrderConfig
from dpaudit.randomness import Key
from trainers.gradients import ClipRule, Gradient, UnitSum, clip_factors, unit_losses
from trainers.inputs import Rows
from trainers.vlm import VisionLanguageModel

NUMBERS = "numbers"
PURPOSE = "direction"


def directions(key: Key, parameters: Mapping[str, nn.Parameter], *, step: int, count: int) -> list[Gradient]:
    """The `count` directions of `step`: standard normal tensors shaped like the parameters, PRF(key, step, k, name)."""
    return [
        {
            name: torch.from_numpy(key.normal(tuple(value.shape), step=step, name=f"{k}/{name}", purpose=PURPOSE)).to(
                value.device
            )
            for name, value in parameters.items()
        }
        for k in range(count)
    ]


def laplace(key: Key, count: int, *, step: int, name: str) -> Tensor:
    """(count,) standard Laplace numbers (scale 1) in float32, from the key's uniforms by inversion."""
    uniform = key.uniform(count, step=step, name=name, purpose="laplace noise") + 2.0**-54  # never 0, never 1
    centred = uniform - 0.5
    return torch.from_numpy((-np.sign(centred) * np.log1p(-2.0 * np.abs(centred))).astype(np.float32))


@dataclass
class ZerothOrder:
    """The numbers of each unit, their clipped sum, and the update that a noisy sum stands for.

    Keeps the directions of one step and, while it works, a copy of the trained parameters: 1 + K times the adapter, and
    no activations beyond those of one forward pass.
    """

    model: VisionLanguageModel
    parameters: Mapping[str, nn.Parameter]
    config: ZerothOrderConfig
    clip: ClipRule = clip_factors
    _step: tuple[bytes, int] | None = field(default=None, repr=False)
    _lines: list[Gradient] = field(default_factory=list, repr=False)

    @property
    def released(self) -> dict[str, Tensor]:
        """What receives noise, by name, as zeros: K numbers."""
        return {NUMBERS: torch.zeros(self.config.directions, device=self.model.device)}

    def lines(self, key: Key, step: int) -> list[Gradient]:
        """The public directions of `step`."""
        if self._step != (key.material, step):
            self._lines = directions(key, self.parameters, step=step, count=self.config.directions)
            self._step = (key.material, step)
        return self._lines

    def per_unit(self, rows: Rows, lines: Sequence[Gradient]) -> tuple[Tensor, Tensor]:
        """Numbers of each unit before clipping, (U, K), and losses (U,): the mean of the two sides of all directions.

        The parameters are put back bit for bit.
        """
        mu = self.config.perturbation
        start = {name: value.detach().clone() for name, value in self.parameters.items()}
        numbers, losses = [], []
        try:
            with torch.no_grad():
                for line in lines:
                    sides = []
                    for sign in (mu, -mu):
                        for name, value in self.parameters.items():
                            value.copy_(start[name] + sign * line[name])
                        sides.append(unit_losses(self.model, rows))
                    numbers.append((sides[0] - sides[1]) / (2 * mu))
                    losses.append((sides[0] + sides[1]) / 2)
        finally:
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(start[name])
        return torch.stack(numbers, dim=1), torch.stack(losses).mean(dim=0)

    def clipped_sum(self, rows: Rows, max_grad_norm: float, lines: Sequence[Gradient]) -> UnitSum:
        """Sum over units of min(1, C / norm) d_i, a tensor of K numbers; the norm is L2, or L1 for Laplace noise."""
        numbers, losses = self.per_unit(rows, lines)
        norms = numbers.norm(p=1 if self.config.noise == "laplace" else 2, dim=1)
        factors = self.clip(norms, max_grad_norm)
        clean = torch.where((factors > 0)[:, None], numbers, torch.zeros_like(numbers))
        return UnitSum({NUMBERS: factors @ clean}, norms, losses)

    def update(self, noisy: Mapping[str, Tensor], lines: Sequence[Gradient]) -> Gradient:
        """The noisy numbers as a gradient of the trained parameters: the mean over k of number_k z_k."""
        weights = (noisy[NUMBERS] / len(lines)).tolist()
        return {
            name: torch.stack([weight * line[name] for weight, line in zip(weights, lines, strict=True)]).sum(dim=0)
            for name in self.parameters
        }
