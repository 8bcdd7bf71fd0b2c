"""Isolation: does changing one record move anything of another record before clipping?

DP-SGD's sensitivity C rests on each clipped gradient being a function of one unit. Token pruning and fusion keep that
only while every stage (which tokens are kept, which are fused, logits, loss, gradient) works example by example. The
test is exact replay: one record is replaced, all randomness is kept, and every other record's stages must be equal bit
for bit. A gradient-based probe would not do: selection is discrete, and its zero derivative is no evidence.

Where shapes change (another padding, another batch size, another order) kernels may round differently, so equality is
up to a tolerance; a leak is far above it (the published ones move gradients by 8 % to 114 %).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpaudit.documents import Check, FusionAudit
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.gradients import Hooks
from trainers.inputs import UnitInputs, fusion_noise
from trainers.records import Picture, Pixels, Question, Unit
from trainers.run import load_model, read_config
from trainers.vlm import VisionLanguageModel

STAGES = ("selection", "centres", "fusion", "logits", "loss", "gradient")
ROUNDING = 1e-4  # relative; float32 over a few hundred terms stays below 1e-5
PROBE_STEP = 1

# The stages of every unit of a batch: stage name -> one tensor a unit.
Stages = dict[str, list[Tensor]]
Probe = Callable[[Sequence[Unit]], Stages]


@dataclass(frozen=True)
class Movement:
    """The largest movement of one stage of a record that was not changed."""

    stage: str
    changed: int
    moved: int
    size: float
    how: str


def model_probe(model: VisionLanguageModel, parameters: dict[str, nn.Parameter], *, fusion_std: float) -> Probe:
    """All stages of the trainer's own path for a batch of units, at the model's present parameters."""
    path, key = Hooks(model, parameters), Key.from_seed(0)

    def probe(units: Sequence[Unit]) -> Stages:
        pictures = [picture for unit in units for picture in unit.pictures]
        owner = [index for index, unit in enumerate(units) for _ in unit.pictures]
        reduced = model.reduce(model.visual_tokens([picture.pixels for picture in pictures]))
        inputs = UnitInputs(model, units)
        rows = inputs.select(range(len(units)), key=key, step=PROBE_STEP, fusion_std=fusion_std)
        with torch.no_grad():
            logits = model.logits(rows.tokens, rows.packed)
        targets_of = (rows.packed.targets != -100).nonzero()[:, 0]
        gradients, losses = path.per_unit(rows)
        flat = torch.cat([value.flatten(1) for value in gradients.values()], dim=1)

        def mine(values: Tensor, unit: int) -> Tensor:
            return values[[row for row, who in enumerate(owner) if who == unit]]

        chosen = reduced.assignment if reduced.assignment is not None else reduced.kept
        own_rows = [[row for row, who in enumerate(owner) if who == unit] for unit in range(len(units))]
        return {
            "selection": [mine(reduced.kept, unit).float() for unit in range(len(units))],
            "centres": [mine(chosen, unit).float() for unit in range(len(units))],
            "fusion": [mine(rows.tokens, unit) for unit in range(len(units))],
            "logits": [logits[torch.isin(targets_of, torch.tensor(rows_))] for rows_ in own_rows],
            "loss": [losses[unit] for unit in range(len(units))],
            "gradient": [flat[unit] for unit in range(len(units))],
        }

    return probe


def replacements(unit: Unit, other: Unit, rng: np.random.Generator) -> Iterator[tuple[str, Unit]]:
    """Large, small and adversarial stand-ins for one unit, with the same questions (so that no shape changes)."""

    def with_pixels(make: Callable[[Pixels], Pixels]) -> Unit:
        pictures = tuple(replace(picture, pixels=make(picture.pixels)) for picture in unit.pictures)
        return replace(unit, pictures=pictures)

    def patch(pixels: Pixels) -> Pixels:
        out = pixels.copy()
        out[: max(1, pixels.shape[0] // 8), : max(1, pixels.shape[1] // 8)] ^= 255
        return out

    def checker(pixels: Pixels) -> Pixels:
        grid = np.indices(pixels.shape[:2]).sum(axis=0) % 2 * 255
        return np.repeat(grid[:, :, None], 3, axis=2).astype(np.uint8)

    source = other.pictures[0].pixels
    yield (
        "another record's picture",
        with_pixels(lambda pixels: source if source.shape == pixels.shape else 255 - pixels),
    )
    yield "one patch inverted", with_pixels(patch)
    yield "white", with_pixels(lambda pixels: np.full_like(pixels, 255))
    yield "black", with_pixels(np.zeros_like)
    yield "checkerboard", with_pixels(checker)
    yield "noise", with_pixels(lambda pixels: rng.integers(0, 256, pixels.shape, dtype=np.uint8))


def movements(before: Stages, after: Stages, changed: int, how: str) -> list[Movement]:
    """Movement of every stage of every record but `changed`, relative to the stage's own size; largest per stage."""
    found = []
    for stage in STAGES:
        worst = Movement(stage, changed, changed, 0.0, how)
        for index, (old, new) in enumerate(zip(before[stage], after[stage], strict=True)):
            if index == changed:
                continue
            size = _relative(old, new)
            if size > worst.size:
                worst = Movement(stage, changed, index, size, how)
        found.append(worst)
    return found


def _relative(old: Tensor, new: Tensor) -> float:
    if old.shape != new.shape:
        return float("inf")
    if torch.equal(old, new):
        return 0.0
    scale = float(old.double().norm()) or 1.0
    gap = float((old.double() - new.double()).norm())
    return gap / scale if np.isfinite(gap) else float("inf")


def exact_replay(probe: Probe, units: Sequence[Unit], *, rng: np.random.Generator) -> list[Movement]:
    """Replace each unit in turn by every stand-in and return all movements of the others; none may be above 0."""
    before = probe(units)
    found: list[Movement] = []
    for index, unit in enumerate(units):
        other = units[(index + 1) % len(units)]
        for how, stand_in in replacements(unit, other, rng):
            after = probe([*units[:index], stand_in, *units[index + 1 :]])
            found.extend(movements(before, after, index, how))
    return found


def reshaped(probe: Probe, units: Sequence[Unit], *, rng: np.random.Generator) -> dict[str, list[Movement]]:
    """Movements when only order, batch size or padding change; equal up to rounding when examples are isolated."""
    before = probe(units)
    order = rng.permutation(len(units))
    place = np.argsort(order)
    permuted = probe([units[index] for index in order])
    back = {stage: [values[index] for index in place] for stage, values in permuted.items()}
    alone = [probe([unit]) for unit in units]
    single = {stage: [part[stage][0] for part in alone] for stage in STAGES}
    last = units[-1]
    long = Question("please look at this very carefully: " * 4 + "what is it?", "a long answer of many words", "probe")
    picture: Picture = replace(last.pictures[0], questions=(*last.pictures[0].questions, long))
    padded = probe([*units[:-1], replace(last, pictures=(picture, *last.pictures[1:]))])
    return {
        "permutation": movements(before, back, -1, "another order"),
        "batch size": movements(before, single, -1, "alone instead of in a batch"),
        "padding": movements(before, padded, len(units) - 1, "a longer question in one record"),
    }


def first_leak(found: Sequence[Movement], allowed: float) -> Movement | None:
    """The largest movement of the earliest stage that moves by more than `allowed`; None if nothing does."""
    for stage in STAGES:
        leaking = [item for item in found if item.stage == stage and item.size > allowed]
        if leaking:
            return max(leaking, key=lambda item: item.size)
    return None


def _check(name: str, found: Sequence[Movement], allowed: float, explanation: str) -> tuple[Check, Movement | None]:
    leak = first_leak(found, allowed)
    if leak is None:
        largest = max((item.size for item in found), default=0.0)
        measured = f"largest relative movement of another record {largest:.2g} over {len(found)} comparisons"
    else:
        measured = (
            f"{leak.stage} of record {leak.moved} moved by {leak.size:.2g} when record {leak.changed}: {leak.how}"
        )
    status: Literal["pass", "fail"] = "pass" if leak is None else "fail"
    check = Check(name=name, status=status, measured=measured, allowed=_allowed(allowed), explanation=explanation)
    return check, leak


def _allowed(allowed: float) -> str:
    return "no movement at all" if allowed == 0 else f"at most {allowed:g} (rounding)"


def noise_check(key: Key, ids: Sequence[str], shape: tuple[int, ...]) -> Check:
    """Is the fusion noise independent over pictures and steps? Matters to releases of tokens only.

    Largest absolute correlation over all pairs of (picture, step); under independence each times sqrt(n) is about
    standard normal, so 7 has a false-alarm rate below 1e-9 for a few hundred pairs.
    """
    draws = [
        fusion_noise(key, step=step, picture=name, shape=shape, std=1.0).ravel() for step in (1, 2) for name in ids
    ]
    correlation = np.asarray(np.corrcoef(np.stack(draws).astype(np.float64))) - np.eye(len(draws))
    worst = float(np.abs(correlation).max()) * np.sqrt(draws[0].size)
    return Check(
        name="fusion noise independent over pictures and steps",
        status="pass" if worst < 7 else "fail",
        measured=f"largest correlation x sqrt(n) {worst:.2f} over {len(draws)} draws of {draws[0].size} values",
        allowed="below 7",
        explanation="Shared noise cancels in differences. It matters only if tokens leave the trust boundary; the "
        "training guarantee does not rest on this noise.",
    )


def audit_units(probe: Probe, units: Sequence[Unit], *, seed: int = 0) -> tuple[tuple[Check, ...], Movement | None]:
    """All isolation checks on a batch of units; the second value is the first leak, if any."""
    if len(units) < 2:
        raise UsageError(f"isolation: got {len(units)} unit; accepted: at least 2 units in the data set")
    rng = np.random.default_rng(seed)
    replayed = exact_replay(probe, units, rng=rng)
    other = reshaped(probe, units, rng=rng)
    results = [
        _check(
            "isolation under exact replay",
            replayed,
            0.0,
            "One record is replaced (another picture, one patch, white, black, checkerboard, noise) and everything "
            "random is kept: nothing of any other record may move. A failure is a statistic shared over the batch.",
        )
    ]
    why = {
        "permutation": "The order of a batch must not matter (tie-breaking and capacity limits show here).",
        "batch size": "A record alone must give what it gives in a batch (batch statistics show here).",
        "padding": "A longer question in one record must not change another's result (padding and token-mean losses).",
    }
    results += [_check(f"isolation under {name}", found, ROUNDING, why[name]) for name, found in other.items()]
    leaks = [leak for _, leak in results if leak is not None]
    return tuple(check for check, _ in results), leaks[0] if leaks else None


def audit_fusion(run: RunFolder, *, batch: int = 6, device: str = "cpu") -> FusionAudit:
    """The isolation audit of a finished run on its own model, reducer and data."""
    config = read_config(run)
    model = load_model(run, device)
    # Two pictures a unit show all that can happen between pictures of a unit and of others; more only cost time.
    units = [replace(unit, pictures=unit.pictures[:2]) for unit in data.load(config.data).train[:batch]]
    std = 0.0 if config.reducer.noise == "none" else 0.1  # any std will do: only its independence is at stake
    checks, leak = audit_units(model_probe(model, model.adapter_parameters(), fusion_std=std), units)
    if config.reducer.noise != "none":
        shape = (config.reducer.fuse, int(model.core.config.vision_config.hidden_size))
        ids = [picture.id for unit in units for picture in unit.pictures]
        checks = (*checks, noise_check(Key.load(run.noise_key), ids, shape))
    return FusionAudit(
        training="per-example preprocessing" if leak is None else "UNACCOUNTED",
        release="not released",
        reducer=config.reducer.name,
        first_leaking_stage=None if leak is None else leak.stage,
        checks=checks,
    )
