"""Is the choice of the blocks to update a function of noisy gradients alone?

Two trainers on neighbouring data take the same steps with the same noisy gradients handed in. If the choice sees
nothing but them (and public coins), both choose the same blocks in every step. A choice that looked at the clean
gradient differs as soon as the changed record matters; then it is released without noise, and eps says nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from attacks.fusion.standins import checkerboard, longer, with_pixels
from dpaudit.documents import Check
from trainers.gradients import Gradient
from trainers.records import Unit
from trainers.step import Trainer

NAME = "update mask follows the noisy gradient"
WHY = (
    "Which blocks are updated is released with the update. Chosen from the gradient before the noise, that choice "
    "leaks without bound; chosen from the noisy gradient it is post-processing."
)
STEPS = 4

Make = Callable[[Sequence[Unit]], Trainer]


def handed_in(like: Gradient, *, step: int) -> Gradient:
    """A noisy gradient that no data had a part in."""
    out = {}
    for place, name in enumerate(sorted(like)):
        rng = np.random.default_rng([step, place])
        out[name] = torch.from_numpy(rng.standard_normal(tuple(like[name].shape))).to(like[name])
    return out


def choices(trainer: Trainer, batches: Sequence[Sequence[int]]) -> list[tuple[frozenset[str], frozenset[str]]]:
    """(blocks computed, blocks updated) of every step when the noisy gradient is dictated."""
    made = []
    # Random weights, the same for both: a fresh adapter has blocks without any gradient, and nothing could show.
    _randomise(trainer)
    for step, batch in enumerate(batches, start=1):
        total = trainer.clipped_sum(step, batch)
        kept = trainer.update(step, handed_in(total.gradient, step=step))
        made.append((frozenset(total.gradient), frozenset(kept)))
    return made


def _randomise(trainer: Trainer) -> None:
    with torch.no_grad():
        for place, name in enumerate(sorted(trainer.parameters)):
            parameter = trainer.parameters[name]
            rng = np.random.default_rng([7, place])
            parameter.copy_(torch.from_numpy(0.1 * rng.standard_normal(tuple(parameter.shape))).to(parameter))


def audit_blocks(make: Make, units: Sequence[Unit]) -> Check:
    """The check; `make` builds a fresh trainer on the units handed in, always with the same key."""
    first = make(units)
    if first.config.pruning.keep >= 1:
        return Check(name=NAME, status="not applicable", measured="every block is updated", allowed="", explanation=WHY)
    alone, everybody = [0], list(range(len(units)))
    batches = [alone if step % 2 else everybody for step in range(1, STEPS + 1)]
    own = choices(first, batches)
    neighbours = [
        ("checkerboard", with_pixels(units[0], checkerboard)),
        ("more text", next(iter(longer(units[0])))[1]),
        ("another record", replace(units[-1], id=units[0].id)),
    ]
    differing: list[str] = []
    for how, stand_in in neighbours:
        other = choices(make([stand_in, *units[1:]]), batches)
        steps = [step for step, (one, two) in enumerate(zip(own, other, strict=True), start=1) if one != two]
        if steps:
            blocks = set.union(*(set(own[step - 1][1] ^ other[step - 1][1]) for step in steps))
            differing.append(f"{how}: other blocks in {len(steps)} of {STEPS} steps ({len(blocks)} blocks)")
    compared = f"{len(neighbours)} neighbours, {STEPS} steps each"
    return Check(
        name=NAME,
        status="fail" if differing else "pass",
        measured=f"{'; '.join(differing)}" if differing else f"the same blocks for {compared}",
        allowed="equal noisy gradients, equal blocks",
        explanation=WHY,
    )
