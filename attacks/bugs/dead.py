"""Planted bugs after which nothing happens: nothing leaks that should not, and the training is not what it says.

All but `FirstBatchOnly` keep the guarantee. An audit must not pass them all the same: a comparison in which both sides
are zero, or a model that is not the one that was trained, is no agreement. `fail`, `inconclusive` and `not applicable`
are right, a pass is not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attacks.bugs.correct import ON_HEAD
from attacks.bugs.row import REASONING, Bug
from dpaudit import atomic
from trainers.adapters.compact import SHAPES, Compact, Record, split


class WeightsNeverMove(Compact):
    """The optimiser holds parameters of a model that was replaced before training: the weights never move."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)


class RateZero(Compact):
    """The warm-up divides whole numbers (step // 100), so the learning rate is 0 for the first 100 steps."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.learning_rate = 0.05 * min(1, self.step_count // 100)
        super().update(noisy, clean_sum)


class HeadNeverMoves(Compact):
    """Half of the blocks are clipped, noised, released and said to be applied, and never move."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        held = self.weights
        super().update(noisy, clean_sum)
        self.weights = torch.where(ON_HEAD > 0, held, self.weights)


class CopyShown(Compact):
    """`parameters` shows the optimiser's copy, which moves; the model that computes gradients stays at its start."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.copy = self.weights.clone()

    def parameters(self) -> Mapping[str, Tensor]:
        return split(self.copy)

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)
        self.copy = self.copy - self.learning_rate * noisy


class StartSaved(Compact):
    """`save` writes the weights that the model had when training began."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.start = self.weights.clone()

    def save(self, path: Path) -> None:
        state = {"weights": self.start, "velocity": self.velocity, "step": torch.tensor([self.step_count])}
        atomic.write_tensors(path, state)


class LoadForgetsHead(Compact):
    """`load` is not strict: the head's name has changed, so a resumed training has a fresh head, silently."""

    def load(self, path: Path) -> None:
        held = self.weights
        super().load(path)
        self.weights = torch.where(ON_HEAD > 0, held, self.weights)


class LabelsMasked(Compact):
    """All labels are masked by the collator: every loss and every gradient is zero, the model walks on noise alone."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        return torch.zeros_like(super().unit_gradients(batch))


class DeadAfterTen(Compact):
    """After ten steps the weights have turned into NaN (a learning rate too large) and every gradient is dropped."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        super().update(noisy, clean_sum)
        if self.step_count == 10:
            self.weights = torch.full_like(self.weights, torch.nan)


class FirstBatchOnly(Compact):
    """The data loader's iterator is made anew in every step: whatever is sampled, the first batch is trained on."""

    held: list[int] | None = None

    def sample(self) -> list[int]:
        if self.held is None:
            self.held = super().sample()
        return self.held


class StopsMoving(Compact):
    """A schedule that was made for twelve steps has reached 0: the rest of the training moves nothing."""

    planned = 12

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.learning_rate = 0.05 * max(0.0, 1 - self.step_count / self.planned)
        super().update(noisy, clean_sum)


SILENT = "Opacus issue 820 (LoRA weights under Opacus with PEFT; 45 GPU hours lost)"
NONE = "none broken: nothing private is released"
MOVES = "liveness: parameters compared before and after steps"

BUGS: tuple[Bug, ...] = (
    Bug("weights-never-move", "B41", WeightsNeverMove, SILENT, effect=NONE, seen_by=MOVES, violation=False),
    Bug(
        "rate-zero",
        "B41",
        RateZero,
        REASONING,
        effect=NONE + " in the first 100 steps",
        seen_by=MOVES,
        violation=False,
    ),
    Bug(
        "head-never-moves",
        "B41",
        HeadNeverMoves,
        SILENT,
        effect="none broken: the head's noisy gradient is released and thrown away",
        seen_by=MOVES + ", block by block",
        violation=False,
    ),
    Bug(
        "copy-shown",
        "B41",
        CopyShown,
        SILENT,
        effect="none broken; what is audited is not the model that learns",
        seen_by="liveness: gradients compared before and after steps",
        violation=False,
    ),
    Bug(
        "start-saved",
        "B41",
        StartSaved,
        SILENT,
        effect="none broken; what is published is the untrained model",
        seen_by="liveness: parameters compared before `save` and after `load`",
        violation=False,
    ),
    Bug(
        "load-forgets-head",
        "B41",
        LoadForgetsHead,
        "state dictionaries loaded with strict=False; " + REASONING,
        effect="none broken; a resumed training is another one",
        seen_by="liveness: parameters compared before `save` and after `load` into a fresh trainer of another seed",
        violation=False,
    ),
    Bug(
        "labels-masked",
        "B41",
        LabelsMasked,
        "labels of -100 everywhere (transformers, trl collators)",
        effect=NONE,
        seen_by="liveness: a comparison of influences in which every side is zero",
        violation=False,
    ),
    Bug(
        "dead-after-ten",
        "B41",
        DeadAfterTen,
        REASONING,
        effect="none broken; the model is NaN",
        seen_by="liveness after more than ten steps",
        violation=False,
    ),
    Bug(
        "first-batch-only",
        "B41",
        FirstBatchOnly,
        "next(iter(loader)) in a loop; " + REASONING,
        effect="broken as well: the units of one batch take part in every step, the rest in none, so q is wrong",
        seen_by="sampling rates, over successive draws",
    ),
    Bug(
        "stops-moving",
        "B41",
        StopsMoving,
        REASONING,
        effect="none broken; steps after the twelfth are paid for and wasted",
        seen_by=MOVES + ", late",
        violation=False,
    ),
)
