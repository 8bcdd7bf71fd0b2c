"""A trainer whose whole training is a noisy sum of clipped vectors: milliseconds, and its leak is known in closed form.

Record x has the gradient -x whatever the weights are, so the final weights are the sum over steps of (clipped records
of the batch + noise) / B, and <w, x> is a sufficient score for records on directions of their own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpaudit import accounting
from dpaudit.claims import StepClaim

WIDTH, PUBLIC_SIZE, BATCH = 2500, 20, 5.0


class Toy:
    """DP-SGD on <x, w>; `noise` times the claimed noise is really added, and nothing is clipped without `clip`."""

    rate, steps = BATCH / PUBLIC_SIZE, 25

    def __init__(
        self,
        records: Sequence[Tensor] | None = None,
        *,
        seed: int,
        noise_seed: int | None = None,
        sigma: float = 1.0,
        noise: float = 1.0,
        clip: bool = True,
    ) -> None:
        own = torch.Generator().manual_seed(5)
        self.records = list(torch.randn(PUBLIC_SIZE, WIDTH, generator=own)) if records is None else list(records)
        self.sigma, self.noise, self.clip = sigma, noise, clip
        self.sampler = np.random.default_rng([seed, 1])
        self.noise_rng = np.random.default_rng(noise_seed)
        self.w = torch.zeros(WIDTH)
        self.done = 0
        self.injected: list[Tensor] = []
        self.last = torch.zeros(WIDTH)

    @property
    def claim(self) -> StepClaim:
        return StepClaim(
            "gaussian", 1.0, self.sigma, "poisson", self.rate, BATCH, "add-remove", "vector", self.steps, 1e-5
        )

    def sample(self) -> list[int]:
        return np.flatnonzero(self.sampler.random(len(self.records)) < self.rate).tolist()

    def step(self, indices: Sequence[int]) -> None:
        self.done += 1
        rows = [-self.records[index] for index in indices] + self.injected
        self.injected = []
        total = torch.zeros(WIDTH)
        if rows:
            total = torch.stack([row / (max(1.0, float(row.norm())) if self.clip else 1.0) for row in rows]).sum(dim=0)
        noise = torch.from_numpy(self.noise_rng.normal(size=WIDTH)).float()
        self.last = (total + self.noise * self.sigma * noise) / BATCH
        self.w = self.w - self.last

    def released(self) -> Mapping[str, Tensor | None]:
        return {"w": self.last}

    def parameters(self) -> Mapping[str, Tensor]:
        return {"w": self.w}

    def gradient(self, record: Tensor) -> Mapping[str, Tensor]:
        return {"w": -record}

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        self.injected.append(gradient["w"])

    def canaries(self, n: int, seed: int) -> list[Tensor]:
        drawn = np.random.default_rng(seed).normal(size=(WIDTH, n)).astype(np.float32)
        return list(torch.from_numpy(np.linalg.qr(drawn)[0].T.copy()))

    def score(self, record: Tensor) -> float:
        return float(self.w @ record)

    def epsilon(self, delta: float) -> float:
        return accounting.epsilon(accounting.DpSgd(self.sigma, self.rate, self.done), delta)


class Boastful(Toy):
    """States half of the eps that its steps cost."""

    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) / 2


class Bare(Toy):
    """Offers nothing but what it must."""

    sample = gradient = inject = canaries = score = epsilon = None  # type: ignore[assignment]


factory, boastful, bare = Toy, Boastful, Bare
