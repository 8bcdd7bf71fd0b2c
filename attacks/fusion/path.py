"""The token path of a trainer under test, and everything that can be watched on it.

A `TokenPath` holds the parts that a training step is made of; a planted bug replaces one of them. `watch` runs a batch
through all parts and returns what each produced for each unit, in the order in which one can disturb the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dpaudit.randomness import Key
from trainers.ghost import Ghost
from trainers.gradients import ClipRule, Gradient, GradientPath, Hooks, MicroBatch
from trainers.inputs import Rows, UnitInputs
from trainers.prompts import IGNORE
from trainers.records import Picture, Unit
from trainers.reducers import Reduced, VisualTokens
from trainers.rows import AdapterRows
from trainers.vlm import VisionLanguageModel

Stage = Literal["selection", "centres", "fusion", "normalisation", "padding", "loss"]

# What is watched, in causal order, and the stage that is to blame when it is the first to move while all shapes stay.
# Tokens that move although the same patches were kept were rescaled or shifted: that is normalisation, inside the
# encoder or behind the selection. `logits` moving on equal tokens means statistics inside projector or language model.
OBSERVABLES: dict[str, Stage] = {
    "encoder tokens": "normalisation",
    "kept patches": "selection",
    "tokens per picture": "padding",
    "dominant tokens": "normalisation",
    "clusters": "centres",
    "centres": "centres",
    "fused tokens": "fusion",
    "tokens in use": "fusion",
    "logits": "normalisation",
    "loss": "loss",
    "gradient": "loss",
}
UNCLIPPED = 1e30  # a clip norm that clips nothing
DISCRETE = ("kept patches", "tokens per picture", "clusters")
STEP = 1

# What every unit of a batch shows: name of the observable -> one tensor a unit.
Trace = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Traced(Reduced):
    """A reduction that also says what its fused tokens were built around. centres: (B, fused, D)."""

    centres: Tensor | None = None


@dataclass(frozen=True)
class TokenPath:
    """The parts of a training step from pictures to noise.

    gradient: the run's own way to a clipped sum; others: further ways that steps of the run took, or may have taken.
    fusion_std: any positive number where fusion noise is on (only its independence is at stake). encode: units to model
    inputs; `noise`: (key, step) to the gradient noise of that step at standard deviation 1.
    """

    model: VisionLanguageModel
    parameters: Mapping[str, nn.Parameter]
    key: Key
    gradient: GradientPath
    encode: Callable[[Sequence[Unit]], UnitInputs]
    noise: Callable[[Key, int], Gradient]
    fusion_std: float = 0.0
    max_grad_norm: float = 1.0
    others: tuple[GradientPath, ...] = ()

    @property
    def gradients(self) -> tuple[GradientPath, ...]:
        """All ways to a clipped sum that are looked at."""
        return (self.gradient, *self.others)

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        parameters: Mapping[str, nn.Parameter],
        *,
        key: Key,
        fusion_std: float,
        max_grad_norm: float = 1.0,
        gradients: Sequence[GradientPath] = (),
        encode: Callable[[Sequence[Unit]], UnitInputs] | None = None,
    ) -> "TokenPath":
        """The trainer's own path at the model's present parameters. gradients: Opacus' hooks where none is named."""
        from trainers.noise import noise_like

        first, *others = gradients or (Hooks(model, parameters),)
        return cls(
            model,
            parameters,
            key,
            first,
            encode or (lambda units: UnitInputs(model, units)),
            lambda secret, step: noise_like(secret, parameters, step=step, std=1.0),
            fusion_std,
            max_grad_norm,
            tuple(others),
        )

    def rows(self, units: Sequence[Unit], *, noisy: bool = True, step: int = STEP, key: Key | None = None) -> Rows:
        """Model inputs of a batch, with the fusion noise of `step` or without."""
        std = self.fusion_std if noisy else 0.0
        return self.encode(units).select(range(len(units)), key=key or self.key, step=step, fusion_std=std)

    def visual(self, pictures: Sequence[Picture]) -> VisualTokens:
        """What the encoder says of some pictures, in one batch."""
        return self.model.visual_tokens([picture.pixels for picture in pictures])


def watch(path: TokenPath, units: Sequence[Unit], *, noisy: bool = True, nudge: float = 0.0) -> Trace:
    """Everything that can be seen of a batch of units, unit by unit; shapes follow the unit's own pictures.

    nudge: relative random perturbation of the tokens that enter the language model, to see how far rounding is carried.
    """
    pictures = [picture for unit in units for picture in unit.pictures]
    owner = [index for index, unit in enumerate(units) for _ in unit.pictures]
    by_picture = _look(path, pictures)
    rows = path.rows(units, noisy=noisy)
    if nudge:
        rows = replace(rows, tokens=_nudged(rows.tokens, nudge, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        logits = path.model.logits(rows.tokens, rows.packed)
    asked = rows.owner[(rows.packed.targets != IGNORE).nonzero()[:, 0]]  # the unit of every predicted token
    ways = [per_unit(path, rows, way) for way in path.gradients]
    flat = torch.cat([value.flatten(1) for gradients, _ in ways for value in gradients.values()], dim=1)
    losses = torch.stack([losses for _, losses in ways], dim=1)

    def of_pictures(name: str, unit: int) -> Tensor:
        return torch.cat([by_picture[place][name].flatten() for place, who in enumerate(owner) if who == unit])

    trace = {
        name: [of_pictures(name, unit).detach() for unit in range(len(units))] for name in by_picture[0] if pictures
    }
    mine = [rows.owner == unit for unit in range(len(units))]
    trace["tokens in use"] = [rows.tokens[which] for which in mine]
    trace["tokens per picture"] = [torch.tensor([float(rows.tokens.shape[1])]) for _ in units]
    trace["logits"] = [logits[asked == unit] for unit in range(len(units))]
    trace["loss"] = list(losses)
    trace["gradient"] = list(flat)
    return {name: trace[name] for name in OBSERVABLES}


def _look(path: TokenPath, pictures: Sequence[Picture]) -> list[dict[str, Tensor]]:
    """What encoder and reducer make of each picture. Pictures of one size share a batch, as in training."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.pixels.shape, []).append(place)
    seen: list[dict[str, Tensor]] = [{} for _ in pictures]
    for group in places.values():
        visual = path.visual([pictures[place] for place in group])
        reduced = path.model.reduce(visual)
        head = reduced.tokens.shape[1] - reduced.fused
        encoder = [visual.tokens.flatten(1), visual.importance, visual.keys.flatten(1)]
        values = {
            "encoder tokens": torch.cat(encoder if visual.cls is None else [*encoder, visual.cls.flatten(1)], dim=1),
            "kept patches": reduced.kept.float(),
            "dominant tokens": reduced.tokens[:, :head],
            "clusters": _clusters(reduced, visual),
            "centres": _centres(reduced, visual),
            "fused tokens": reduced.tokens[:, head:],
        }
        for row, place in enumerate(group):
            seen[place] = {name: value[row] for name, value in values.items()}
    return seen


def per_unit(path: TokenPath, rows: Rows, gradient: GradientPath) -> tuple[Gradient, Tensor]:
    """(U, ...) gradients before clipping and (U,) losses, one unit at a time where that gradient path does so."""
    if isinstance(gradient, MicroBatch):
        parts = [gradient(rows.unit(unit), UNCLIPPED) for unit in range(rows.units)]
        losses = torch.cat([part.losses for part in parts])
    elif isinstance(gradient, Ghost):  # sums of the whole batch in which one unit alone counts
        parts = [Ghost(path.model, path.parameters, _one(unit))(rows, 1.0) for unit in range(rows.units)]
        losses = parts[0].losses
    elif isinstance(gradient, AdapterRows | Hooks):
        return gradient.per_unit(rows)
    else:
        return Hooks(path.model, path.parameters).per_unit(rows)
    return {name: torch.stack([part.gradient[name] for part in parts]) for name in path.parameters}, losses


def _one(unit: int) -> ClipRule:
    """Clipping factors of 1 for one unit and of 0 for the others."""

    def factors(norms: Tensor, _: float) -> Tensor:
        return nn.functional.one_hot(torch.tensor(unit, device=norms.device), len(norms)).to(norms.dtype)

    return factors


def _clusters(reduced: Reduced, visual: VisualTokens) -> Tensor:
    if reduced.assignment is None:
        return visual.importance.new_zeros(visual.rows, 0)
    return reduced.assignment.float()


def _centres(reduced: Reduced, visual: VisualTokens) -> Tensor:
    """(B, fused, D) the vector that each fused token was built around.

    As reported (`Traced`), else as implied: what remains of a fused token when the mean of the picture's own members of
    that cluster is taken away. It is a function of the picture alone exactly when the fused token is.
    """
    reported = getattr(reduced, "centres", None)
    if isinstance(reported, Tensor):
        return reported
    if reduced.assignment is None or not reduced.fused:
        return visual.tokens.new_zeros(visual.rows, 0, visual.tokens.shape[2])
    rows, width = visual.rows, visual.tokens.shape[2]
    rest = torch.ones_like(visual.importance, dtype=torch.bool).scatter(1, reduced.kept, False)
    others = visual.tokens[rest].view(rows, -1, width)
    if others.shape[1] != reduced.assignment.shape[1]:
        return visual.tokens.new_zeros(rows, 0, width)
    member = torch.nn.functional.one_hot(reduced.assignment.long(), reduced.fused).to(others.dtype)
    means = member.transpose(1, 2) @ others / member.sum(dim=1).clamp(min=1).unsqueeze(-1)
    return reduced.tokens[:, -reduced.fused :] - means


def tied(path: TokenPath, unit: Unit, *, size: float = 1e-5, tries: int = 3) -> bool:
    """Whether relative perturbations of `size` flip what the reducer keeps or merges of one of this unit's pictures."""
    for picture in unit.pictures:
        visual = path.visual([picture])
        own = path.model.reduce(visual)
        for seed in range(tries):
            generator = torch.Generator().manual_seed(seed)
            nudged = {
                name: _nudged(getattr(visual, name), size, generator) for name in ("tokens", "importance", "keys")
            }
            other = path.model.reduce(replace(visual, **nudged))
            same = torch.equal(own.kept, other.kept)
            if own.assignment is not None and other.assignment is not None:
                same = same and torch.equal(own.assignment, other.assignment)
            if not same:
                return True
    return False


def _nudged(value: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return value * (1 + size * torch.randn(value.shape, generator=generator).to(value))
