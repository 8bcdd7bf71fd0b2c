"""The white-box game on a foreign trainer: canary gradients through `inject`, every noisy gradient seen.

Game, score and tests are those of attacks.white_box. A training takes its ordinary batches; beside them each inserted
canary joins a step when a Poisson coin of the claimed rate takes it, through the trainer's own clipping and noise.
Where the trainer offers `gradient`, the auditor subtracts what the batch's known records contribute (their clipped
gradients): the adversary of differential privacy knows them. Without it they stay in the residual and blur the scores,
which can only make a refutation harder: given the transcript each coin's posterior is what the subtraction shows, so
any other score guesses worse.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks import white_box
from attacks.canaries import ALL, Plan
from attacks.external.one_run import SIGMA_REDUCTION
from attacks.external.setting import Setting
from attacks.external.subject import Subject
from attacks.white_box import DECIDING as DECIDING
from attacks.white_box import LOUD, PARAMETERS_PER_CANARY, GradientGame, loud, loud_tests, tests_of
from dpaudit.analysis.plan import plan
from dpaudit.documents import Claim, Test
from dpaudit.errors import rejected
from dpaudit.randomness import Key
from trainers.progress import Reporter

KIND = white_box.KIND
DEFAULT_COUNT = 1000
LEAST_COUNT = 20
MOST_NUMBERS = 250_000_000  # of all directions together: one gigabyte

Floats = npt.NDArray[np.float64]


def room(parameters: int) -> int:
    """How many gradient canaries a model of so many trained parameters has room for."""
    return min(parameters // PARAMETERS_PER_CANARY, MOST_NUMBERS // max(1, parameters))


def why_not(setting: Setting) -> str | None:
    """None when the game can be played; otherwise why not."""
    step = setting.step_claim
    if not setting.first.offers("inject"):
        return setting.first.lacking("inject")
    if step.mechanism != "gaussian" or step.sampling not in ("poisson", "full"):
        return (
            f"{step.mechanism} noise with {step.sampling} batches; the game knows gaussian noise with poisson or full"
        )
    if setting.drives is not None:
        return setting.drives
    parameters = sum(int(np.prod(shape)) for shape in setting.first.parameters().values())
    if room(parameters) < LEAST_COUNT:
        needed = LEAST_COUNT * PARAMETERS_PER_CANARY
        return f"{parameters} trained parameters; {LEAST_COUNT} gradient canaries need {needed}"
    return None


def count_for(setting: Setting) -> int:
    """--count, or as many as fit up to DEFAULT_COUNT. Raises UsageError when --count does not fit."""
    parameters = sum(int(np.prod(shape)) for shape in setting.first.parameters().values())
    most = room(parameters)
    wanted = setting.options.count
    if wanted is None:
        return min(DEFAULT_COUNT, most)
    if wanted > most:
        why = f"{parameters} trained parameters, {PARAMETERS_PER_CANARY} for each gradient canary"
        raise rejected("--count", wanted, f"at most {most} ({why})")
    return wanted


def game_of(setting: Setting, key: Key, count: int) -> GradientGame:
    """Directions and coins: functions of the key."""
    step = setting.step_claim
    rate = 1.0 if step.sampling == "full" else step.sample_rate
    return GradientGame(count, key, step.max_grad_norm, step.noise_multiplier, rate, step.expected_batch_size)


def guesses(count: int, claim: Claim, *, alpha: float) -> dict[str, tuple[int, int]]:
    """Planned from the number of canaries and the claim: the most power against a true sigma that is 30 % smaller."""
    found = {}
    for name, size in ((KIND, count), (LOUD, int(loud(count).sum()))):
        row = plan(claim, canaries=size, alpha=alpha, alternative=1 - SIGMA_REDUCTION, separate=True)
        found[name] = (row.top, row.bottom)
    return found


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


def play(setting: Setting, game: GradientGame, reporter: Reporter) -> float | None:
    """Train once; `game.scores` hold the log-likelihood ratios afterwards. Returns the eps that the trainer states."""
    subject = setting.trainer("white box")
    shapes = subject.parameters()
    names = sorted(shapes)
    sizes = [int(np.prod(shapes[name])) for name in names]
    rows = game.rows(sum(sizes))
    known = _Known(subject, game.max_grad_norm, shapes)
    reporter.phase(f"training with {len(rows)} of {game.count} canary gradients")
    for step, indices in setting.batches(subject, "white box", reporter):
        contribution = known.contribution(indices)
        taken = game.key.uniform(len(rows), step=step, name="gradient canaries", purpose="poisson") < game.sample_rate
        for row in rows[torch.from_numpy(taken)]:
            parts = torch.split(row, sizes)
            subject.inject({name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)})
        subject.step(indices)
        noisy = subject.released()
        # A block without noise shows nothing of its canaries: zeros, like its share of the known sum.
        seen = {
            name: contribution[name] / game.expected_batch_size if noisy.get(name) is None else noisy[name]
            for name in names
        }
        game.observe(step, seen, contribution)  # type: ignore[arg-type]
    return setting.stated_epsilon(subject)


def tests(
    scores: Floats, members: npt.NDArray[np.bool_], plans: Plan, claim: Claim, *, confidence: float, alpha: float
) -> tuple[Test, ...]:
    """The assumption-free bound and the exact claim tests (attacks.white_box): of all canaries, and of the loud ones.

    Two tests decide, so `alpha` is the level of each.
    """
    own = Plan({ALL: plans.guesses[KIND]}, plans.tie_seed, plans.sigma_reduction)
    found = tests_of(scores, members, claim, own, confidence=confidence, alpha=alpha)
    mine = loud(len(scores))
    alone = loud_tests(scores[mine], members[mine], claim, plans.tie_seed, plans.guesses[LOUD], alpha=alpha)
    return (*found, *alone)
