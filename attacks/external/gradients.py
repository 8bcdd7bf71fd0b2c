"""The white-box game on a foreign trainer: canary gradients through `inject`, every noisy gradient seen.

Game, evidence and controls are those of attacks.games.gradients. A training takes its ordinary batches; beside them
each inserted canary joins a step when a Poisson coin of the claimed rate takes it, through the trainer's own clipping
and noise. Where the trainer offers `gradient`, the auditor subtracts what the batch's known records contribute (their
clipped gradients): the adversary of differential privacy knows them. Without it they stay in the residual, the coins'
posterior is not known, and the game reads counts and the noise level alone, without a power.

Before the training, pairs of trainers with equal seeds and frozen noise show that an injected gradient arrives: in a
first step without records, in a first step with a batch, and in a later step with two canaries at once. A trainer that
takes no empty batch (which the contract says) is asked in steps with records alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.contract.guard import MethodFailure
from attacks.external.claims import epoch_of
from attacks.external.conduct import Blocks, batch_sizes
from attacks.external.setting import Playing, Setting
from attacks.external.subject import Subject
from attacks.games.controls import Liveness
from attacks.games.gradients import DEFAULT_COUNT, KIND, PARAMETERS_PER_CANARY, GradientGame
from attacks.games.played import Played, unsound
from attacks.games.white_box import read_game
from dpaudit.documents import Claim
from dpaudit.errors import rejected
from trainers.progress import Reporter
from trainers.sampling import allocated

LEAST_COUNT = 20
MOST_NUMBERS = 250_000_000  # of all directions together: one gigabyte


def room(parameters: int) -> int:
    """How many gradient canaries a model of so many trained parameters has room for."""
    return min(parameters // PARAMETERS_PER_CANARY, MOST_NUMBERS // max(1, parameters))


class InjectionGame:
    """Canary gradients; directions and coins are functions of the audit's key."""

    name, label, kind = "white-box", "white-box game", KIND

    def __init__(self, setting: Setting, claim: Claim) -> None:
        step = setting.step_claim
        rate = 1.0 if step.sampling == "full" else step.sample_rate
        numbers = (step.max_grad_norm, step.noise_multiplier, rate, step.expected_batch_size)
        known = setting.first.offers("gradient")
        epoch = epoch_of(step)
        self.game = GradientGame(_count(setting), setting.key, *numbers, known=known, epoch=epoch)
        self.frame = self.game.frame()
        self.guesses = {KIND: self.game.plan.guesses[KIND]}

    @staticmethod
    def why_not(setting: Setting) -> str | None:
        """None when it can be played; otherwise why not."""
        step = setting.step_claim
        if not setting.first.offers("inject"):
            return setting.first.lacking("inject")
        if step.mechanism != "gaussian" or step.sampling not in ("poisson", "full", "allocation"):
            what = f"{step.mechanism} noise with {step.sampling} batches"
            return f"{what}; the game knows gaussian noise with poisson, allocation or full"
        if setting.drives is not None:
            return setting.drives
        if room(setting.first.size()) < LEAST_COUNT:
            needed = LEAST_COUNT * PARAMETERS_PER_CANARY
            return f"{setting.first.size()} trained parameters; {LEAST_COUNT} gradient canaries need {needed}"
        return None

    def play(self, at: Playing, confidence: float) -> tuple[Played, Claim]:
        """Train once and read what every step showed."""
        stated = train(at.setting, self.game, at.reporter("white box"))
        if self.game.unreadable is None:
            at.scored(KIND, self.game.scores())
        claim, count = at.setting.claim(stated), self.game.count
        if not 0 < self.game.members.sum() < count:
            return unsound("gradient coins", f"all {count} coins fell on one side; audit again"), claim
        levels: dict[str, Any] = {"confidence": confidence, "alpha": at.setting.options.alpha}
        return read_game(self.game, claim, coins_sha256=at.coins.sha256, **levels), claim


def _joined(game: GradientGame, count: int, step: int) -> npt.NDArray[np.intp]:
    """Which of the inserted canaries join this step: by coins of the claimed rate, or k of an epoch's steps each."""
    if game.epoch is None:
        draws = game.key.uniform(count, step=step, name="gradient canaries", purpose="poisson")
        return np.flatnonzero(draws < game.sample_rate)
    epoch, turn = divmod(step - 1, game.epoch)
    return np.flatnonzero((allocated(game.key, epoch, count, game.epoch, game.channel.draws) == turn).any(axis=1))


def _count(setting: Setting) -> int:
    """--count, or as many as fit up to DEFAULT_COUNT. Raises UsageError when --count does not fit."""
    parameters, wanted = setting.first.size(), setting.options.count
    most = room(parameters)
    if wanted is None:
        return min(DEFAULT_COUNT, most)
    if wanted > most:
        why = f"{parameters} trained parameters, {PARAMETERS_PER_CANARY} for each gradient canary"
        raise rejected("--count", wanted, f"at most {most} ({why})")
    return wanted


@dataclass
class _Known:
    """What the records of a batch contribute, as far as the auditor can know it."""

    subject: Subject
    max_grad_norm: float
    shapes: Mapping[str, tuple[int, ...]]

    def contribution(self, indices: list[int]) -> dict[str, Tensor]:
        """Sum of clipped gradients; zeros where the trainer shows no gradients."""
        total = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        if not self.subject.offers("gradient"):
            return total
        records = self.subject.records()
        for index in sorted(set(indices)):
            gradient = self.subject.gradient(records[index])
            norm = float(
                torch.sqrt(sum((value.double().square().sum() for value in gradient.values()), torch.zeros(())))
            )
            if np.isfinite(norm):
                for name, value in gradient.items():
                    total[name] += value * min(1.0, self.max_grad_norm / max(norm, 1e-30))
        return total


class _Rows:
    """Gradients over all parameters in name order, handed to `inject` block by block."""

    def __init__(self, game: GradientGame, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.names = sorted(shapes)
        self.shapes = shapes
        self.sizes = [int(np.prod(shapes[name])) for name in self.names]
        self.rows = game.rows(sum(self.sizes))

    def inject(self, subject: Subject, row: Tensor) -> None:
        parts = zip(self.names, torch.split(row, self.sizes), strict=True)
        subject.inject({name: part.reshape(self.shapes[name]).clone() for name, part in parts})

    def seen(self, subject: Subject, missing: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """What the last step released, and the blocks that it did not: nothing of their canaries is shown, and
        `missing` stands for them."""
        noisy = subject.released()
        absent = [name for name in self.names if noisy.get(name) is None]
        found = {name: missing(name) if (value := noisy.get(name)) is None else value for name in self.names}
        return found, absent


def live(setting: Setting, game: GradientGame, rows: _Rows) -> Iterator[Liveness]:
    """Under frozen noise: how far injected gradients of 100 C and of C move the release. Nothing where two steps with
    equal seeds differ (the trainer does not freeze its noise), or no canary is inserted."""
    inserted = game.inserted
    if not len(inserted):
        return
    loud = [place for place, number in enumerate(inserted) if game.loud[number]][:1] or [0]
    quiet = [place for place, number in enumerate(inserted) if not game.loud[number]][:1]
    batch = list(range(min(len(setting.records), max(1, round(setting.step_claim.expected_batch_size)))))
    empty: list[list[int]] = [[]] if _takes_an_empty_batch(setting) else []
    plays: list[tuple[str, list[list[int]], list[int]]] = [
        *[("a first step without records", [none], loud) for none in empty],
        ("a first step with a batch", [batch], loud),
        ("a later step, several canaries at once", [batch[:2], *empty, batch], sorted({*loud, *quiet})),
    ]
    for where, batches, taken in plays:
        shown = []
        for injected in (True, False, False):
            subject = setting.frozen(f"liveness: {where}")
            for number, indices in enumerate(batches, start=1):
                if injected and number == len(batches):
                    for place in taken:
                        rows.inject(subject, rows.rows[place])
                subject.step(indices)
            shown.append(rows.seen(subject, lambda name: torch.zeros(rows.shapes[name]))[0])
        noise = game.project({name: shown[1][name] - shown[2][name] for name in shown[1]})
        if not np.isfinite(noise).all() or np.abs(noise).max() > 1e-3:
            return
        moved = game.project({name: shown[0][name] - shown[1][name] for name in shown[0]})
        yield Liveness.of(moved, inserted[np.array(taken)], where)


def _takes_an_empty_batch(setting: Setting) -> bool:
    """Some code can't (a group count of 0); where none is ever drawn, the game needs none."""
    try:
        setting.frozen("liveness: an empty batch").step([])
    except MethodFailure:
        return False
    return True


def train(setting: Setting, game: GradientGame, reporter: Reporter) -> float | None:
    """Check that injected gradients arrive, then train once; `game` has seen every step afterwards.

    Returns the eps that the trainer states; None where a release was not finite, which ends the training.
    """
    subject = setting.trainer("white box")
    shapes = subject.parameters()
    rows = _Rows(game, shapes)
    reporter.phase("checking that injected gradients arrive")
    game.liveness.extend(live(setting, game, rows))
    known = _Known(subject, game.max_grad_norm, shapes)
    blocks, sizes = Blocks(subject.values()), list[int]()
    reporter.phase(f"training with {len(rows.rows)} of {game.count} canary gradients")
    for step, indices in setting.batches(subject, "white box", reporter):
        contribution = known.contribution(indices)
        taken = _joined(game, len(rows.rows), step)
        for place in taken:
            rows.inject(subject, rows.rows[place])
        subject.step(indices)
        noisy, absent = rows.seen(subject, partial(_stand_in, game, contribution, step))
        blocks.add(absent)
        sizes.append(len(set(indices)))
        game.observe(step, noisy, contribution, taken, absent=absent)
        if game.unreadable is not None:
            return None  # the training ends before its claimed steps, so what it would state now is not its claim
    game.beside.append(blocks.control(subject.values()))
    if subject.offers("sample"):
        units = len(subject.records())
        game.beside.append(batch_sizes(sizes, units, setting.step_claim, epoch_of(setting.step_claim)))
    return setting.stated_epsilon(subject)


def _stand_in(game: GradientGame, contribution: Mapping[str, Tensor], step: int, name: str) -> Tensor:
    """For a block that was not released: what its records contribute and noise of our own of the claimed size, so that
    directions over all blocks show no less noise than the claim because of it."""
    value = contribution[name]
    drawn = game.key.normal(tuple(value.shape), step=step, name=name, purpose="block not released")
    noise = game.noise_multiplier * game.max_grad_norm * torch.from_numpy(drawn)
    return (value + noise.to(value.dtype)) / game.expected_batch_size
