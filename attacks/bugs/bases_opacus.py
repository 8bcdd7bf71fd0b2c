"""What the planted bugs around Opacus have in common: a correct loop of its parts, each of which can be bent.

People's own loops come through `dpaudit.under_test.opacus_loop`, unchanged. Here the noise generator is Opacus' own,
seeded anew from (noise_seed, step), so that neighbours can be compared under frozen noise; the noisy gradient is read
by Opacus' step hook, after noise and scaling and before the inner optimiser; and a canary gradient is one more row of
`grad_sample`, which Opacus clips next.

Opacus takes q = 1 / len(loader) and an expected batch size of int(n q) from the private n (issue 571); this loop
declares a public size instead, and sets both from it.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dpaudit import atomic, untrusted
from dpaudit.claims import StepClaim

Record = tuple[Tensor, Tensor]  # features (8,), class () int64

PUBLIC_SIZE, BATCH, CLIP, SIGMA = 40, 5, 1.0, 1.0
FEATURES, CLASSES = 8, 3


def own_records() -> list[Record]:
    """A synthetic data set, always the same."""
    generator = torch.Generator().manual_seed(571)
    features = 2 * torch.randn(PUBLIC_SIZE, FEATURES, generator=generator)
    return [(x, (x.sum() > 0).long() + (x[0] > 1).long()) for x in features]


def network(seed: int) -> nn.Module:
    """A small classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class OpacusLoop:
    """GradSampleModule, DPOptimizer and RDP accountant, as in the Opacus tutorial; SGD with momentum."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        self.records = list(records) if records is not None else own_records()
        self.noise_seed = noise_seed
        self.module = network(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.wrapped = GradSampleModule(self.module)
        self.generator = torch.Generator()
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.wrapped.parameters(), lr=0.1, momentum=0.9),
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP,
            expected_batch_size=BATCH,
            loss_reduction="mean",
            generator=self.generator,
        )
        self.accountant = RDPAccountant()
        self.optimizer.attach_step_hook(self._after_noise)
        self.sampler = np.random.default_rng([seed, 2])
        self.step_count = 0
        self.last: dict[str, Tensor] = {}
        self.injected: list[Mapping[str, Tensor]] = []

    @property
    def claim(self) -> StepClaim:
        """What `make_private` was told."""
        return StepClaim("gaussian", CLIP, SIGMA, "poisson", BATCH / PUBLIC_SIZE, float(BATCH), "add-remove", "example")

    def _after_noise(self, optimizer: DPOptimizer) -> None:
        self.accountant.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=BATCH / PUBLIC_SIZE)
        named = self.module.named_parameters()
        self.last = {name: value.grad.detach().clone() for name, value in named if value.grad is not None}

    def step(self, indices: Sequence[int]) -> None:
        """One logical batch."""
        self.step_count += 1
        if self.noise_seed is not None:
            text = f"{self.noise_seed}/{self.step_count}".encode()
            self.generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        else:
            self.generator.seed()
        chosen = [self.records[index] for index in sorted(set(indices))]
        x = torch.stack([x for x, _ in chosen]) if chosen else torch.zeros(0, FEATURES)
        y = torch.stack([y for _, y in chosen]) if chosen else torch.zeros(0, dtype=torch.int64)
        self.optimizer.zero_grad()
        losses = nn.functional.cross_entropy(self.wrapped(x), y, reduction="none")
        # With loss_reduction="mean" Opacus multiplies by the batch size again; an empty mean would be NaN.
        loss = losses.mean() if chosen else losses.sum()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(loss)
        self._add_injected()
        self.optimizer.step()

    def _add_injected(self) -> None:
        if not self.injected:
            return
        for name, parameter in self.module.named_parameters():
            rows = torch.stack([gradient[name] for gradient in self.injected])
            parameter.grad_sample = torch.cat([parameter.grad_sample, rows])  # type: ignore[attr-defined]
        self.injected = []

    def released(self) -> Mapping[str, Tensor | None]:
        """The noisy mean."""
        return self.last

    def parameters(self) -> Mapping[str, Tensor]:
        """Of the wrapped module."""
        return dict(self.module.named_parameters())

    def extreme_records(self) -> list[Record]:
        """Huge features with a wrong class, zeros."""
        ones = torch.ones(FEATURES)
        return [(1e4 * ones, torch.tensor(0)), (-1e4 * ones, torch.tensor(2)), (0 * ones, torch.tensor(1))]

    def sample(self) -> list[int]:
        """Poisson."""
        return [int(i) for i in np.flatnonzero(self.sampler.random(len(self.records)) < BATCH / PUBLIC_SIZE)]

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """By plain autograd on the unwrapped network."""
        x, y = record
        # A fresh network without Opacus' hooks, with the present weights.
        plain = network(0)
        plain.load_state_dict(self.module.state_dict())
        loss = nn.functional.cross_entropy(plain(x[None]), y[None])
        named = dict(plain.named_parameters())
        values = torch.autograd.grad(loss, list(named.values()))
        return dict(zip(named, values, strict=True))

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """One more unit for the next step, before clipping."""
        self.injected.append(gradient)

    def canaries(self, n: int, seed: int) -> list[Record]:
        """Ordinary features with a class drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        features = 2 * torch.randn(n, FEATURES, generator=generator)
        return list(zip(features, torch.randint(CLASSES, (n,), generator=generator), strict=True))

    @torch.no_grad()
    def score(self, record: Record) -> float:
        """Minus the loss."""
        x, y = record
        # Not through the wrapped module: its hooks would collect activations.
        plain = network(0)
        plain.load_state_dict(self.module.state_dict())
        return -float(nn.functional.cross_entropy(plain(x[None]), y[None]))

    def epsilon(self, delta: float) -> float:
        """Opacus' RDP accountant (an upper bound, looser than a PLD)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(self.accountant.get_epsilon(delta)) if self.step_count else 0.0

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """The weights; momentum, step count and accountant stay."""
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(parameters[name])

    def save(self, path: Path) -> None:
        """Weights, momentum, step count."""
        state = {f"weight/{name}": value.detach() for name, value in self.module.named_parameters()}
        inner = self.optimizer.original_optimizer.state
        for name, value in self.module.named_parameters():
            if "momentum_buffer" in inner.get(value, {}):
                state[f"momentum/{name}"] = inner[value]["momentum_buffer"]
        state["step"] = torch.tensor([self.step_count])
        atomic.write_tensors(path, state)

    def load(self, path: Path) -> None:
        """What `save` wrote; the accountant goes on from the steps spent."""
        state = untrusted.read_tensors(path)
        self.step_count = int(state["step"][0])
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(state[f"weight/{name}"])
                if f"momentum/{name}" in state:
                    self.optimizer.original_optimizer.state[value]["momentum_buffer"] = state[f"momentum/{name}"]
        for _ in range(self.step_count):
            self.accountant.step(noise_multiplier=SIGMA, sample_rate=BATCH / PUBLIC_SIZE)
