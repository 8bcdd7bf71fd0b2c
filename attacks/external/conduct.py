"""Controls of a foreign trainer's conduct during a white-box game: the batches it drew, the blocks it released.

The game looks at the noise of what is released, for the batches that it is given. A sampler that draws other batches
than the claim's, or a block that is updated without ever being released, would not show there.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attacks.contract.statistics import count_p, extremes_p, spread_p
from attacks.games.controls import control
from dpaudit.claims import StepClaim
from dpaudit.documents import Control

LEVEL = 1e-6  # how often a correct sampler is called wrong
SAME = 1e-3  # a move so near to a rescaling of the block, relative to the move, is weight decay


def batch_sizes(sizes: Sequence[int], units: int, claim: StepClaim, epoch: int | None) -> Control:
    """The control "batch sizes" of what `sample()` drew: by the exact binomial law of Poisson batches (their total,
    spread, smallest and largest), and exactly for full batches and for whole epochs of random allocation.

    sizes: different units of each step. epoch: steps of an epoch of allocation.
    """
    drawn = np.array(sizes)
    rate = 1.0 if claim.sampling == "full" else claim.sample_rate
    expected = rate * units
    text = f"sample() draws {drawn.mean():.4g} per step ({drawn.min()} to {drawn.max()})"
    if epoch is not None:
        whole = drawn[: drawn.size // epoch * epoch].reshape(-1, epoch).sum(axis=1)
        agrees = bool((whole == round(expected * epoch)).all()) and drawn.max() <= units
        allowed = f"{expected * epoch:g} in every epoch of {epoch} steps"
    elif rate >= 1:
        agrees, allowed = bool((drawn == units).all()), f"all {units} units"
    else:
        p = (count_p(int(drawn.sum()), units * drawn.size, rate), spread_p(drawn, units, rate))
        least = min(1.0, 3 * min(*p, extremes_p(drawn, units, rate)))
        agrees, allowed = least >= LEVEL, f"p of at least {LEVEL:g} under Binomial({units}, {rate:g})"
        text += f", p = {least:.2g}"
    if agrees:
        return control("batch sizes", "earned", text, allowed, "Batches have the sizes of the claimed sampling.")
    said = f"sample() draws {drawn.mean():.4g} per step, the claim says q n = {expected:g}."
    if abs(drawn.mean() - expected) < 0.2 * expected:
        said = f"sample() draws batches whose sizes are not those of {claim.sampling} sampling with q n = {expected:g}."
    return control("batch sizes", "failed", text, allowed, said)


@dataclass
class Blocks:
    """Which blocks a training released. start: the trained parameters before the first step."""

    start: Mapping[str, Tensor]
    steps: int = 0
    absent: Counter[str] = field(default_factory=Counter)

    def add(self, absent: Collection[str]) -> None:
        """Blocks that one step did not release."""
        self.steps += 1
        self.absent.update(absent)

    def control(self, end: Mapping[str, Tensor]) -> Control:
        """The control "released blocks". end: the parameters after the last step.

        A block that no step released has no noise by the trainer's own word: if it moves other than by weight decay,
        the game is invalid. One that some steps did not release was not looked at there.
        """
        allowed = "every block in every step"
        never = [name for name, count in self.absent.items() if count == self.steps]
        if any(_moved(self.start[name], end[name]) for name in never):
            moved = ", ".join(sorted(name for name in never if not torch.equal(self.start[name], end[name])))
            text = f"{moved}: without noise in released() (None) in every step, and the training moves the weights."
            return control("released blocks", "failed", f"never released, moved: {moved}", allowed, text)
        if self.absent:
            worst, count = self.absent.most_common(1)[0]
            measured = f"{worst}: None in {count} of {self.steps} steps ({len(self.absent)} such blocks)"
            text = "Blocks that were not released can't be tested."
            return control("released blocks", "not earned", measured, allowed, text)
        return control("released blocks", "earned", f"all of {len(self.start)}", allowed, "Nothing was left out.")


def _moved(start: Tensor, end: Tensor) -> bool:
    """Whether a block moved other than by a factor; a single number by any factor is taken for decay."""
    one, two = start.double().flatten(), end.double().flatten()
    move = float((two - one).norm())
    if move == 0:
        return False
    size = float(one @ one)
    decayed = one * (float(one @ two) / size) if size else torch.zeros_like(one)
    return not float((two - decayed).norm()) <= SAME * move
