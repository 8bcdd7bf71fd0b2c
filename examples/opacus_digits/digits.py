"""A small image classifier trained with Opacus, and what it takes to let dpaudit audit it.

    python digits.py                                          # train it
    dpaudit audit --trainer digits:factory                    # audit it
    dpaudit audit --trainer digits:factory --set bug=half-noise    # a mistake on purpose: refuted

The upper half is the training as anyone would write it. The lower half (from "For the audit") is what was added.
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpaudit.claims import StepClaim

Record = tuple[Tensor, int]  # a picture (64,) of 8 x 8 grey values, and its digit

# All of these are public: they follow from nothing in the data. CLIP is C, SIGMA the noise multiplier.
PUBLIC_SIZE, BATCH, STEPS = 500, 50, 50
CLIP, SIGMA, DELTA, RATE = 1.0, 0.8, 1e-5, BATCH / PUBLIC_SIZE
BUGS = ("none", "no-noise", "half-noise", "batch-clip")

warnings.filterwarnings("ignore", module="opacus")
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def own_records() -> tuple[list[Record], list[Record]]:
    """(train, test) of scikit-learn's handwritten digits."""
    pictures, digits = load_digits(return_X_y=True)
    rows = [(torch.tensor(x / 16.0, dtype=torch.float32), int(y)) for x, y in zip(pictures, digits, strict=True)]
    return rows[:PUBLIC_SIZE], rows[-300:]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))


class DigitsTrainer:
    """DP-SGD with Poisson sampling."""

    def __init__(
        self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None, bug: str = "none"
    ) -> None:
        if bug not in BUGS:
            raise ValueError(f"bug: got {bug!r}; accepted: {', '.join(BUGS)}")
        self.bug = bug
        self.records = list(own_records()[0] if records is None else records)
        self.network = network(seed)
        self.model = GradSampleModule(self.network)
        self.noise_seed, self.generator = noise_seed, torch.Generator()
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5),
            noise_multiplier={"no-noise": 0.0, "half-noise": SIGMA / 2}.get(bug, SIGMA),
            max_grad_norm=CLIP,
            expected_batch_size=BATCH,
            generator=self.generator,
        )
        self.accountant = RDPAccountant()
        self.sampler = np.random.default_rng(seed)
        self.steps_done = 0
        self.injected: list[Mapping[str, Tensor]] = []

    def sample(self) -> list[int]:
        """Every record joins a batch independently with probability RATE."""
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < RATE)]

    def step(self, indices: Sequence[int]) -> None:
        """One step of DP-SGD on these records."""
        self.steps_done += 1
        self._seed_noise()
        batch = [self.records[index] for index in sorted(set(indices))]
        x = torch.stack([picture for picture, _ in batch]) if batch else torch.zeros(0, 64)
        y = torch.tensor([digit for _, digit in batch], dtype=torch.int64)
        self.optimizer.zero_grad()
        losses = cross_entropy(self.model(x), y, reduction="none")
        torch.autograd.backward(losses.sum() / max(1, len(batch)))
        self._add_injected()
        if self.bug == "batch-clip":
            self._clip_the_batch()
        else:
            self.optimizer.step()
        self.accountant.step(noise_multiplier=SIGMA, sample_rate=RATE)

    # -- For the audit ---------------------------------------------------------------------------------------------

    @property
    def claim(self) -> StepClaim:
        """What this training says about each of its steps."""
        return StepClaim(
            mechanism="gaussian",
            max_grad_norm=CLIP,
            noise_multiplier=SIGMA,
            sampling="poisson",
            sample_rate=RATE,
            expected_batch_size=float(BATCH),
            relation="add-remove",
            unit="picture",
            steps=STEPS,
            delta=DELTA,
        )

    def parameters(self) -> Mapping[str, Tensor]:
        """What is trained, by name."""
        return dict(self.network.named_parameters())

    def released(self) -> Mapping[str, Tensor | None]:
        """The noisy mean gradient of the last step: Opacus leaves it in `.grad`."""
        return {name: value.grad for name, value in self.network.named_parameters()}

    def epsilon(self, delta: float) -> float:
        """Spent so far, by Opacus' accountant."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(self.accountant.get_epsilon(delta)) if self.steps_done else 0.0

    def canaries(self, n: int, seed: int) -> list[Record]:
        """Mislabelled noise: pictures and digits that no other record has."""
        rng = np.random.default_rng(seed)
        pictures = torch.tensor(rng.random((n, 64)), dtype=torch.float32)
        return list(zip(pictures, rng.integers(0, 10, n).tolist(), strict=True))

    @torch.no_grad()
    def score(self, record: Record) -> float:
        """Higher = "was in training": minus the loss."""
        picture, digit = record
        return -float(cross_entropy(self._plain()(picture[None]), torch.tensor([digit])))

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """One record's gradient, before clipping."""
        plain, (picture, digit) = self._plain(), record
        loss = cross_entropy(plain(picture[None]), torch.tensor([digit]))
        names = [name for name, _ in plain.named_parameters()]
        return dict(zip(names, torch.autograd.grad(loss, list(plain.parameters())), strict=True))

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """A canary gradient joins the next step like one more record: before clipping."""
        self.injected.append(gradient)

    def extreme_records(self) -> list[Record]:
        """Pictures far from the data."""
        ones = torch.ones(64)
        return [(1e4 * ones, 0), (-1e4 * ones, 9), (0 * ones, 5)]

    def _seed_noise(self) -> None:
        """The noise of a step depends on (noise_seed, step) alone, so that neighbouring data sets can be compared."""
        if self.noise_seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.noise_seed * 1_000_003 + self.steps_done)

    def _add_injected(self) -> None:
        """Opacus keeps one gradient a record in `grad_sample`: a canary is one more row."""
        for name, parameter in self.network.named_parameters() if self.injected else ():
            rows = torch.stack([gradient[name] for gradient in self.injected])
            parameter.grad_sample = torch.cat([parameter.grad_sample, rows])
        self.injected = []

    def _plain(self) -> nn.Module:
        """The network without Opacus' hooks."""
        plain = network(0)
        plain.load_state_dict(self.network.state_dict())
        return plain

    def _clip_the_batch(self) -> None:
        """The planted bug "batch-clip": the mean of the batch is clipped instead of each record."""
        parameters = list(self.network.parameters())
        means = [parameter.grad_sample.sum(dim=0) / BATCH for parameter in parameters]
        norm = torch.sqrt(sum(mean.square().sum() for mean in means))
        for parameter, mean in zip(parameters, means, strict=True):
            noise = torch.normal(0.0, SIGMA * CLIP / BATCH, mean.shape, generator=self.generator)
            parameter.grad = mean * float(CLIP / norm.clamp(min=CLIP)) + noise
        self.optimizer.original_optimizer.step()


factory = DigitsTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier.")
    parser.add_argument("--bug", choices=BUGS, default="none", help="a mistake on purpose")
    trainer = DigitsTrainer(seed=0, bug=parser.parse_args().bug)
    for _ in range(STEPS):
        trainer.step(trainer.sample())
    held_out = own_records()[1]
    right = sum(int(trainer._plain()(picture[None]).argmax()) == digit for picture, digit in held_out)
    print(f"accuracy {right / len(held_out):.1%} on {len(held_out)} pictures; eps = {trainer.epsilon(DELTA):.2f}")


if __name__ == "__main__":
    main()
