"""Empirical sensitivity: how far can one unit move the clipped sum, in units of C?

The bound is 1 when a unit is added or zeroed and 2 when it is replaced. It is asked of the run's own way to the sum, on
a batch of its own units, with ordinary, adversarial and long records in the changed place, at the run's C and at the
median gradient norm, where some units are clipped and some are not, so that a leak that only rescales the others shows.
A value above the bound refutes the sensitivity that the noise was scaled to; a value below proves nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from attacks.fusion.path import TokenPath, per_unit
from attacks.fusion.standins import adversarial_pictures, longer, replacements
from dpaudit.documents import Relation, Sensitivity
from trainers.gradients import Gradient, GradientPath
from trainers.inputs import Rows
from trainers.prompts import IGNORE
from trainers.records import Unit

BOUNDS: dict[Relation, float] = {"add-remove": 1.0, "zero-out": 1.0, "replace": 2.0}
AGREEMENT = 1e-3  # relative: a clip factor in float32, and sums over parameters
CHANGED = 2  # places of the batch whose unit is changed


@dataclass(frozen=True)
class Move:
    """One comparison: |S - S'| / C."""

    relation: Relation
    size: float
    how: str


def difference(one: Gradient, two: Gradient) -> float:
    """L2 norm of the difference over all blocks."""
    return float(torch.stack([(one[name] - two[name]).double().square().sum() for name in one]).sum().sqrt())


def zeroed(rows: Rows, unit: int) -> Rows:
    """The rows with every answer of one unit masked out: its place in the batch stays, its loss is gone."""
    mine = (rows.owner == unit).unsqueeze(1)
    targets = rows.packed.targets.masked_fill(mine, IGNORE)
    weights = rows.packed.weights.masked_fill(mine, 0.0)
    return replace(rows, packed=replace(rows.packed, targets=targets, weights=weights))


def moves(
    path: TokenPath, gradient: GradientPath, units: Sequence[Unit], max_grad_norm: float, *, seed: int = 0
) -> Iterator[Move]:
    """Every comparison of one way to the sum at one clip norm."""
    rng = np.random.default_rng(seed)
    adversarial = adversarial_pictures(path.model, units[0].pictures[0].pixels, rng=rng, rounds=4)

    def total(chosen: Sequence[Unit]) -> Gradient:
        return gradient(path.rows(chosen), max_grad_norm).gradient

    for place in range(min(CHANGED, len(units))):
        unit, others = units[place], [*units[:place], *units[place + 1 :]]
        without, before = total(others), total(units)
        stand_ins = [("the record itself", unit)]
        stand_ins += replacements(unit, units[(place + 1) % len(units)], adversarial, rng)
        stand_ins += longer(unit)
        for how, stand_in in stand_ins:
            batch = [*units[:place], stand_in, *units[place + 1 :]]
            after = total(batch) if stand_in is not unit else before
            yield Move("add-remove", difference(after, without) / max_grad_norm, how)
            rows = path.rows(batch)
            masked = gradient(zeroed(rows, place), max_grad_norm).gradient
            yield Move("zero-out", difference(after, masked) / max_grad_norm, how)
            if stand_in is not unit:
                yield Move("replace", difference(after, before) / max_grad_norm, how)


def audit_sensitivity(path: TokenPath, units: Sequence[Unit], *, seed: int = 0) -> tuple[Sensitivity, ...]:
    """One row for each relation and clip norm; nothing for a path that does not clip."""
    if not np.isfinite(path.max_grad_norm) or len(units) < 2:
        return ()
    gradients, _ = per_unit(path, path.rows(units), path.gradient)
    norms = torch.stack([value.flatten(1).double().square().sum(dim=1) for value in gradients.values()]).sum(dim=0)
    median = float(norms.sqrt().median())
    clips = [path.max_grad_norm]
    if median > 0 and not 0.5 < median / path.max_grad_norm < 2:
        clips.append(median)
    rows = []
    for clip in clips:
        found = [move for way in path.gradients for move in moves(path, way, units, clip, seed=seed)]
        for relation, bound in BOUNDS.items():
            mine = [move for move in found if move.relation == relation]
            worst = max(mine, key=lambda move: move.size)
            rows.append(
                Sensitivity(
                    relation=relation,
                    max_grad_norm=clip,
                    largest=worst.size,
                    bound=bound,
                    holds=worst.size <= bound * (1 + AGREEMENT),
                    comparisons=len(mine),
                    how=worst.how,
                )
            )
    return tuple(rows)
