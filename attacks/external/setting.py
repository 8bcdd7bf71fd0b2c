"""What the games on one trainer share: its factory, its records, its claim, and the randomness of the audit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.canaries import Coins
from attacks.contract.guard import MethodFailure
from attacks.external.claims import claimed_delta, claimed_steps, epoch_of, make_claim, mechanism_epsilon
from attacks.external.folder import AuditFolder
from attacks.external.options import TrainerOptions
from attacks.external.subject import Subject
from attacks.games.played import Played
from attacks.games.reading import SIGMA_REDUCTION, read_scores
from attacks.scores import join_coins
from dpaudit.analysis.claim import describe_alternative
from dpaudit.claims import StepClaim
from dpaudit.documents import Check, Claim, Test
from dpaudit.evidence.channel import Channel
from dpaudit.executors import Executor
from dpaudit.randomness import Key
from trainers.progress import Reporter, StepReport

Floats = npt.NDArray[np.float64]
OWN_SAMPLING = (
    "poisson",
    "full",
    "allocation",
)  # schemes that a game can draw by itself for a trainer without sample()


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

    @property
    def no_records(self) -> str | None:
        """None when a game that inserts records can be played; otherwise why not."""
        missing = next((name for name in ("canaries", "score") if not self.first.offers(name)), None)
        return self.drives if missing is None else self.first.lacking(missing)

    @property
    def levels(self) -> dict[str, float]:
        """Confidence and alpha, as the planning of guesses takes them."""
        return {"confidence": self.options.confidence, "alpha": self.options.alpha}

    def claim(self, stated: float | None) -> Claim:
        """The claim; --epsilon comes before the eps that a trainer states after its steps."""
        own = self.options.epsilon
        return make_claim(self.step_claim, steps=self.steps, delta=self.delta, stated=stated if own is None else own)

    @property
    def provisional_claim(self) -> Claim:
        """The claim as far as it is known before training; the guesses are planned from its mechanism and delta.

        A trainer whose mechanism has no accountant here states its eps after its steps: any eps stands in until then.
        """
        claim = make_claim(self.step_claim, steps=self.steps, delta=self.delta, stated=1.0)
        if self.options.epsilon is None and self.first.offers("epsilon") and mechanism_epsilon(claim) is None:
            return claim
        return self.claim(None)

    def batches(self, subject: Subject, purpose: str, reporter: Reporter) -> Iterator[tuple[int, list[int]]]:
        """(step, indices) of a whole training, from the trainer's own sampler where it has one."""
        units = len(subject.records())
        own = subject.offers("sample")
        rate = 1.0 if self.step_claim.sampling == "full" else self.step_claim.sample_rate
        rng, epoch = self.key.generator(purpose=f"batches: {purpose}"), epoch_of(self.step_claim)
        channel = None if epoch is None else Channel(1.0, rate, epoch, epoch)
        try:
            for step in range(1, self.steps + 1):
                if channel is not None and (step - 1) % channel.steps == 0:
                    drawn = channel.sampled(units, rng)
                joined = rng.random(units) < rate if channel is None else drawn[:, (step - 1) % channel.steps]
                indices = subject.sample() if own else [int(i) for i in np.flatnonzero(joined)]
                yield step, indices
                reporter.step(StepReport(step, self.steps, None, None, None))
        finally:
            reporter.close()

    def stated_epsilon(self, subject: Subject) -> float | None:
        """What a trainer that has made its steps says it spent; --epsilon comes first; None when nobody says."""
        if self.options.epsilon is not None:
            return self.options.epsilon
        return subject.epsilon(self.delta) if subject.offers("epsilon") else None


@dataclass(frozen=True)
class Playing:
    """What the games of one audit share once the coins are tossed. reporter: makes a progress reporter of a name.
    executor: for the trainings of `--runs` (None: here, one by one)."""

    setting: Setting
    folder: AuditFolder
    coins: Coins
    reporter: Callable[[str], Reporter]
    log: Callable[[str], None]
    executor: Executor | None

    def heads(self, kind: str) -> npt.NDArray[np.bool_]:
        """(m,) coins of one game."""
        mine = self.coins.frame[self.coins.frame["kind"] == kind]
        return np.asarray(mine["member"].to_numpy(dtype=bool))

    def scored(self, kind: str, scores: Floats) -> pd.DataFrame:
        """Scores (m,) of one game with its coins, written to the private part."""
        mine = self.coins.frame[self.coins.frame["kind"] == kind]
        frame = join_coins(pd.DataFrame({"id": mine["id"].to_numpy(), "score": scores}), mine)
        self.folder.save_scores(kind, frame)
        return frame

    def read(
        self, frame: pd.DataFrame, checks: Sequence[Check], title: str, tests: Callable[[], tuple[Test, ...]]
    ) -> Played:
        """Scores as evidence."""
        about = {"coins": str(frame["kind"].iloc[0]), "alternative": describe_alternative(1 - SIGMA_REDUCTION)}
        return read_scores(frame, checks, tests, title=title, coins_sha256=self.coins.sha256, **about)


class Game(Protocol):
    """A game on a trainer. name: of its document. label: in words. kind: of its coins. frame: its coin file's rows.
    guesses: of its tests."""

    name: str
    label: str
    kind: str
    frame: pd.DataFrame
    guesses: dict[str, tuple[int, int]]

    @staticmethod
    def why_not(setting: Setting) -> str | None:
        """None when it can be played; otherwise why not."""

    def __init__(self, setting: Setting, claim: Claim) -> None:
        """Draw candidates, then coins, and plan the guesses."""

    def play(self, at: Playing, confidence: float) -> tuple[Played, Claim]:
        """Train, score and read; the claim has the eps that the trainer then states. confidence: of all its bounds."""


def seed_of(key: Key, purpose: str) -> int:
    """A seed for foreign code: a function of the key and the purpose."""
    return int(key.generator(purpose=f"trainer: {purpose}").integers(2**31))
