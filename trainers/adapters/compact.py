"""DP-SGD in one page: a tiny network on synthetic units, microseconds a step. The oracle that planted bugs vary.

A unit is one person's picture features with one to three questions about it, like the units of the real trainer: its
loss is the mean over its own questions, its gradient is clipped once. Every stage of a step is a method, so that a bug
is one method overridden.

    from trainers.adapters import compact
    trainer = compact.dp_sgd(seed=0)
    trainer.step([0, 3, 5])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit import accounting, atomic, untrusted
from dpaudit.claims import Sampling, StepClaim
from dpaudit.documents import Relation
from dpaudit.randomness import Key

FEATURES, HIDDEN = 8, 6
SHAPES: dict[str, tuple[int, ...]] = {"w1": (HIDDEN, FEATURES), "b1": (HIDDEN,), "w2": (HIDDEN,), "b2": (1,)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
PUBLIC_SIZE = 40
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Record:
    """One unit: x (k, FEATURES) features and y (k,) targets of its k questions."""

    x: Tensor
    y: Tensor


def own_records(count: int = PUBLIC_SIZE) -> list[Record]:
    """The synthetic data set, always the same."""
    generator = torch.Generator().manual_seed(20250608)
    sizes = torch.randint(1, 4, (count,), generator=generator).tolist()
    return [
        Record(torch.randn(k, FEATURES, generator=generator), 3.0 * torch.randn(k, generator=generator)) for k in sizes
    ]


def split(flat: Tensor) -> dict[str, Tensor]:
    """A (61,) vector as named blocks."""
    parts = torch.split(flat, list(SIZES.values()))
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def join(blocks: Mapping[str, Tensor]) -> Tensor:
    """Named blocks as one (61,) vector."""
    return torch.cat([blocks[name].reshape(-1) for name in SHAPES])


class Compact:
    """Plain DP-SGD with Poisson sampling; `keep` < 1 prunes blocks by the size of the noisy gradient."""

    max_grad_norm = 1.5
    noise_multiplier = 1.0
    expected_batch_size = 4.0
    sample_rate = expected_batch_size / PUBLIC_SIZE
    sampling: Sampling = "poisson"
    relation: Relation = "add-remove"
    steps: int | None = 200
    delta = 1e-5
    learning_rate = 0.05
    momentum = 0.5
    keep = 1.0

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        self.records = list(records) if records is not None else own_records()
        self.key = Key.fresh() if noise_seed is None else Key.from_seed(noise_seed)
        self.sampler = np.random.default_rng([seed, 1])
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.cat([0.5 * torch.randn(size, generator=generator) for size in SIZES.values()])
        self.velocity = torch.zeros_like(self.weights)
        self.step_count = 0
        self.injected: list[Tensor] = []
        self.last: dict[str, Tensor | None] = {}
        self.updated: set[str] = set()

    # -- what the contract asks for --------------------------------------------------------------------------------

    @property
    def claim(self) -> StepClaim:
        """Of one step."""
        return StepClaim(
            mechanism="gaussian",
            max_grad_norm=self.max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            sampling=self.sampling,
            sample_rate=self.sample_rate,
            expected_batch_size=self.expected_batch_size,
            relation=self.relation,
            unit="image (with all its questions)",
            steps=self.steps,
            delta=self.delta,
        )

    def step(self, indices: Sequence[int]) -> None:
        """Clip each unit, add, noise, normalise, prune, update."""
        self.step_count += 1
        batch = [self.records[index] for index in self.units_of(indices)]
        gradients = self.unit_gradients(batch)
        if self.injected:
            gradients = torch.cat([gradients, torch.stack(self.injected)])
            self.injected = []
        total = self.clip(gradients).sum(dim=0)
        noisy = self.normalise(total + self.noise(), len(gradients))
        self.last = dict(split(noisy))
        self.update(noisy, total)

    def released(self) -> Mapping[str, Tensor | None]:
        """The last noisy mean."""
        return self.last

    def parameters(self) -> Mapping[str, Tensor]:
        """Four blocks."""
        return split(self.weights)

    def extreme_records(self) -> list[Record]:
        """Huge both ways, zero, NaN, infinite; one and several questions."""
        one = torch.ones(1, FEATURES)
        many = torch.ones(3, FEATURES)
        return [
            Record(1e3 * one, torch.tensor([1e6])),
            Record(-1e3 * many, torch.tensor([1e6, 1e6, -1e5])),
            Record(3.0 * one, torch.tensor([-1e6])),
            Record(0.0 * one, torch.zeros(1)),
            Record(torch.full((1, FEATURES), torch.nan), torch.zeros(1)),
            Record(one, torch.tensor([torch.inf])),
        ]

    def sample(self) -> list[int]:
        """Each unit joins independently with probability q."""
        joined = self.sampler.random(len(self.records)) < self.sample_rate
        return [int(index) for index in np.flatnonzero(joined)]

    def applied(self) -> set[str]:
        """Blocks updated by the last step."""
        return self.updated

    def select(self, noisy: Mapping[str, Tensor]) -> set[str]:
        """The blocks with the largest noisy gradient per coordinate (Dual-Priv Pruning, arXiv 2506.07077)."""
        count = max(1, round(self.keep * len(SHAPES)))
        size = {name: float(noisy[name].norm()) / SIZES[name] ** 0.5 for name in SHAPES}
        return set(sorted(size, key=lambda name: (-size[name], name))[:count])

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """Before clipping."""
        return split(self.unit_gradients([record])[0])

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """One more unit for the next step."""
        self.injected.append(join(gradient))

    def epsilon(self, delta: float) -> float:
        """By the accountant, for the steps taken."""
        rate = 1.0 if self.sampling == "full" else self.sample_rate
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, rate, self.step_count, self.relation), delta)

    def save(self, path: Path) -> None:
        """Weights, momentum and step count; the noise of a step follows from the key and the count."""
        state = {"weights": self.weights, "velocity": self.velocity, "step": torch.tensor([self.step_count])}
        atomic.write_tensors(path, state)

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        state = untrusted.read_tensors(path)
        self.weights, self.velocity, self.step_count = state["weights"], state["velocity"], int(state["step"][0])

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """The weights and nothing else: momentum and step count stay."""
        self.weights = join(parameters).clone()

    # -- the stages of a step --------------------------------------------------------------------------------------

    def units_of(self, indices: Sequence[int]) -> list[int]:
        """A batch is a set of units."""
        return sorted(set(indices))

    def rows(self, batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (R, FEATURES), targets (R,), owner (R,) and weight (R,) = 1 / questions of the unit."""
        if not batch:
            return torch.zeros(0, FEATURES), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        owner = torch.cat([torch.full((len(record.y),), place) for place, record in enumerate(batch)])
        weight = torch.cat([torch.full((len(record.y),), 1.0 / len(record.y)) for record in batch])
        return torch.cat([record.x for record in batch]), torch.cat([record.y for record in batch]), owner, weight

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(R, 61) gradient of each row's loss (out - y)^2 / 2, by hand."""
        blocks = split(self.weights)
        hidden = torch.tanh(x @ blocks["w1"].T + blocks["b1"])
        error = hidden @ blocks["w2"] + blocks["b2"] - y
        back = error[:, None] * blocks["w2"] * (1 - hidden.square())
        w1 = torch.einsum("rh,rf->rhf", back, x).flatten(1)
        return torch.cat([w1, back, error[:, None] * hidden, error[:, None]], dim=1)

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        """(U, 61) gradient of each unit's mean loss, before clipping."""
        x, y, owner, weight = self.rows(batch)
        rows = self.row_gradients(x, y) * weight[:, None]
        return torch.zeros(len(batch), rows.shape[1]).index_add(0, owner, rows)

    def clip(self, gradients: Tensor) -> Tensor:
        """min(1, C / norm) per unit; a unit that is not finite contributes nothing."""
        norms = gradients.norm(dim=1)
        factors = self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
        finite = torch.isfinite(norms)
        return torch.where(finite[:, None], gradients * factors[:, None], torch.zeros_like(gradients))

    def block_noise(self, name: str) -> Tensor:
        """Standard normal noise of this step for one block."""
        return torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count, name=name))

    def noise_std(self) -> float:
        """Of the noise on the sum."""
        return self.noise_multiplier * self.max_grad_norm

    def noise(self) -> Tensor:
        """(61,) noise of this step."""
        return self.noise_std() * join({name: self.block_noise(name) for name in SHAPES})

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        """By the public expected batch size, never by the realised one."""
        return noisy_sum / self.expected_batch_size

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """Momentum SGD on the selected blocks. `clean_sum` is there for the bugs; correct code never looks at it."""
        blocks = split(noisy)
        self.updated = self.select(blocks)
        mask = join({name: torch.full(SHAPES[name], float(name in self.updated)) for name in SHAPES})
        self.velocity = torch.where(mask > 0, self.momentum * self.velocity + noisy, self.velocity)
        self.weights = self.weights - self.learning_rate * mask * self.velocity


class Pruned(Compact):
    """DP-SGD that updates the three blocks with the largest noisy gradient."""

    keep = 0.75


class Adam(Compact):
    """DP-Adam (bias-corrected) on the noisy gradient."""

    learning_rate = 0.01

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.second = torch.zeros_like(self.weights)

    def moments(self, noisy: Tensor, clean_sum: Tensor) -> tuple[Tensor, Tensor]:
        """What the first and the second moment are fed with."""
        return noisy, noisy

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        """Post-processing of the noisy gradient."""
        self.updated = set(SHAPES)
        first, second = self.moments(noisy, clean_sum)
        self.velocity = 0.9 * self.velocity + 0.1 * first
        self.second = 0.999 * self.second + 0.001 * second.square()
        mean = self.velocity / (1 - 0.9**self.step_count)
        spread = (self.second / (1 - 0.999**self.step_count)).sqrt()
        self.weights = self.weights - self.learning_rate * mean / (spread + 1e-8)


class FixedSize(Compact):
    """Batches of a fixed size without replacement, claimed as such; quotes no eps, as no Poisson proof applies."""

    sampling: Sampling = "fixed"
    epsilon = None  # type: ignore[assignment]

    def sample(self) -> list[int]:
        """A uniform subset of the expected size."""
        size = int(self.expected_batch_size)
        return sorted(int(index) for index in self.sampler.choice(len(self.records), size=size, replace=False))


class Shuffled(Compact):
    """Epochs over a shuffled list, claimed as such, and accounted without amplification: one Gaussian per epoch."""

    sampling: Sampling = "shuffle"

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.queue: list[int] = []

    def sample(self) -> list[int]:
        """The next slice of the present epoch's order."""
        if not self.queue:
            self.queue = [int(index) for index in self.sampler.permutation(len(self.records))]
        size = int(self.expected_batch_size)
        batch, self.queue = self.queue[:size], self.queue[size:]
        return sorted(batch)

    def epsilon(self, delta: float) -> float:
        """A unit takes part once per epoch; batches are disjoint, so epochs compose as plain Gaussians."""
        epochs = -(-self.step_count * int(self.expected_batch_size) // PUBLIC_SIZE)
        return accounting.epsilon(accounting.DpSgd(self.noise_multiplier, 1.0, epochs, self.relation), delta)


class Allocated(Compact):
    """Random allocation: every unit draws its step of each epoch by itself, and nobody makes room for anybody."""

    sampling: Sampling = "allocation"
    epoch_steps: int | None = round(PUBLIC_SIZE / Compact.expected_batch_size)
    draws = 1

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.queue: list[list[int]] = []

    @property
    def claim(self) -> StepClaim:
        """With the steps of an epoch."""
        return replace(super().claim, epoch_steps=self.epoch_steps)

    def assigned(self, units: int, steps: int) -> Bools:
        """(units, steps) which steps of an epoch hold each unit: `draws` of them, by the smallest of random numbers."""
        return np.asarray(self.sampler.random((units, steps)).argsort(axis=1).argsort(axis=1) < self.draws)

    def sample(self) -> list[int]:
        """The next batch of the present epoch."""
        assert self.epoch_steps is not None
        if not self.queue:
            held = self.assigned(len(self.records), self.epoch_steps)
            self.queue = [[int(index) for index in np.flatnonzero(column)] for column in held.T]
        return self.queue.pop(0)

    def epsilon(self, delta: float) -> float:
        """By the accountant, an epoch that has begun as a whole one."""
        return accounting.epsilon(self.claim.allocated(self.step_count), delta)


class FullBatch(Compact):
    """Every unit in every step (DP gradient descent)."""

    sampling: Sampling = "full"
    sample_rate = 1.0
    expected_batch_size = float(PUBLIC_SIZE)

    def sample(self) -> list[int]:
        """All of them."""
        return list(range(len(self.records)))


class Laplace(Compact):
    """Clipping in L1 and Laplace noise of scale sigma * C."""

    @property
    def claim(self) -> StepClaim:
        """As a Laplace mechanism; no Gaussian accountant applies."""
        return StepClaim(**{**super().claim.__dict__, "mechanism": "laplace"})

    epsilon = None  # type: ignore[assignment]

    def clip(self, gradients: Tensor) -> Tensor:
        """min(1, C / L1 norm) per unit."""
        norms = gradients.abs().sum(dim=1)
        factors = self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
        finite = torch.isfinite(norms)
        return torch.where(finite[:, None], gradients * factors[:, None], torch.zeros_like(gradients))

    def block_noise(self, name: str) -> Tensor:
        """Standard Laplace: a random sign times an exponential."""
        uniform = self.key.uniform(SIZES[name], step=self.step_count, name=name, purpose="noise") - 0.5
        values = -np.sign(uniform) * np.log1p(-2 * np.abs(uniform))
        return torch.from_numpy(values.astype(np.float32)).reshape(SHAPES[name])


dp_sgd = Compact
pruned = Pruned
adam = Adam
fixed_size = FixedSize
shuffled = Shuffled
allocated = Allocated
full_batch = FullBatch
laplace = Laplace
