"""What the games on one trainer share: its factory, its records, its claim, and the randomness of the audit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attacks.contract.guard import MethodFailure
from attacks.external.claims import claimed_delta, claimed_steps
from attacks.external.options import TrainerOptions
from attacks.external.subject import Subject
from dpaudit.claims import StepClaim
from dpaudit.randomness import Key
from trainers.progress import Reporter, StepReport

OWN_SAMPLING = ("poisson", "full")  # schemes that a game can draw by itself for a trainer without sample()


@dataclass(frozen=True)
class Setting:
    """A trainer under audit. `key`: all randomness of the audit; `steps`: T of every training."""

    factory: Callable[..., Any]
    options: TrainerOptions
    key: Key
    first: Subject  # built to be asked, never trained
    records: tuple[Any, ...]
    step_claim: StepClaim
    steps: int
    delta: float

    @classmethod
    def of(cls, factory: Callable[..., Any], options: TrainerOptions, key: Key) -> "Setting":
        """Build one trainer and ask what it has and claims. Raises UsageError."""
        first = Subject.build(factory, None, seed=seed_of(key, "first"), noise_seed=None, limit=options.time_limit)
        claim = first.claim()
        records = tuple(first.records())
        if not records:
            raise MethodFailure("records", "is empty; accepted: at least one record")
        if claim.noise_multiplier == 0:
            raise MethodFailure("claim", "noise_multiplier is 0, an infinite eps: there is no claim to test")
        steps, delta = claimed_steps(claim, options.steps), claimed_delta(claim, options.delta)
        return cls(factory, options, key, first, records, claim, steps, delta)

    def trainer(self, purpose: str, records: Sequence[Any] | None = None) -> Subject:
        """A fresh trainer with a seed of its own, and secret noise (noise from the audit's seed where it has one)."""
        noise = seed_of(self.key, f"noise: {purpose}") if self.key.seeded else None
        items = self.records if records is None else records
        limit = self.options.time_limit
        subject = Subject.build(self.factory, items, seed=seed_of(self.key, purpose), noise_seed=noise, limit=limit)
        if subject.claim() != self.step_claim:
            raise MethodFailure("claim", "differs with the records; C, sigma, q, T and the batch size are public")
        return subject

    def frozen(self, purpose: str) -> Subject:
        """A fresh trainer with frozen noise: two of the same purpose make the same steps."""
        seeds = {"seed": seed_of(self.key, purpose), "noise_seed": seed_of(self.key, f"frozen noise: {purpose}")}
        return Subject.build(self.factory, self.records, limit=self.options.time_limit, **seeds)

    @property
    def drives(self) -> str | None:
        """None when a training can be driven; otherwise why not."""
        if self.first.offers("sample") or self.step_claim.sampling in OWN_SAMPLING:
            return None
        return f"sample() is not offered, and dpaudit can't draw {self.step_claim.sampling} batches itself"

    def batches(self, subject: Subject, purpose: str, reporter: Reporter) -> Iterator[tuple[int, list[int]]]:
        """(step, indices) of a whole training, from the trainer's own sampler where it has one."""
        units = len(subject.records())
        own = subject.offers("sample")
        rate = 1.0 if self.step_claim.sampling == "full" else self.step_claim.sample_rate
        rng = self.key.generator(purpose=f"batches: {purpose}")
        try:
            for step in range(1, self.steps + 1):
                indices = subject.sample() if own else [int(i) for i in np.flatnonzero(rng.random(units) < rate)]
                yield step, indices
                reporter.step(StepReport(step, self.steps, None, None, None))
        finally:
            reporter.close()

    def stated_epsilon(self, subject: Subject) -> float | None:
        """What a trainer that has made its steps says it spent; --epsilon comes first; None when nobody says."""
        if self.options.epsilon is not None:
            return self.options.epsilon
        return subject.epsilon(self.delta) if subject.offers("epsilon") else None


def seed_of(key: Key, purpose: str) -> int:
    """A seed for foreign code: a function of the key and the purpose."""
    return int(key.generator(purpose=f"trainer: {purpose}").integers(2**31))
