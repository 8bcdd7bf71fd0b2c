"""Stand-ins for a record: large, small and adversarial replacements, and a search for worse ones.

All searches are gradient-free: they work in pixels (uint8) on any encoder and on selections that no derivative sees.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from trainers.records import Picture, Pixels, Question, Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]
Objective = Callable[[list[Pixels]], Floats]


def with_pixels(unit: Unit, make: Callable[[Pixels], Pixels]) -> Unit:
    """The unit with every picture replaced and its questions kept, so that no shape changes."""
    return replace(unit, pictures=tuple(replace(item, pixels=make(item.pixels)) for item in unit.pictures))


def one_value(pixels: Pixels) -> Pixels:
    """One channel of one pixel changed by one level: the smallest change there is."""
    out = pixels.copy()
    out[out.shape[0] // 2, out.shape[1] // 2, 0] ^= 1
    return out


def one_patch(pixels: Pixels, *, row: int = 0, column: int = 0, cells: int = 8) -> Pixels:
    """One cell of a `cells` x `cells` grid inverted."""
    out = pixels.copy()
    high, wide = max(1, pixels.shape[0] // cells), max(1, pixels.shape[1] // cells)
    out[row * high : (row + 1) * high, column * wide : (column + 1) * wide] ^= 255
    return out


def checkerboard(pixels: Pixels) -> Pixels:
    """Every other pixel white."""
    grid = np.indices(pixels.shape[:2]).sum(axis=0) % 2 * 255
    return np.repeat(grid[:, :, None], 3, axis=2).astype(np.uint8)


def fitted(source: Pixels, like: Pixels) -> Pixels:
    """`source` where it has the shape of `like`, else `like` inverted."""
    return source if source.shape == like.shape else 255 - like


def mutated(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """A random change of a random size: a block inverted, filled or made noise, or the contrast stretched."""
    out = pixels.copy()
    height, width = pixels.shape[:2]
    kind = int(rng.integers(4))
    if kind == 3:
        factor = float(rng.uniform(0.3, 3.0))
        return np.clip((out.astype(np.float64) - 128) * factor + 128, 0, 255).astype(np.uint8)
    high, wide = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    block = out[top : top + high, left : left + wide]
    if kind == 0:
        block ^= 255
    elif kind == 1:
        block[:] = rng.integers(0, 256, size=3, dtype=np.uint8)
    else:
        block[:] = rng.integers(0, 256, size=block.shape, dtype=np.uint8)
    return out


def climb(start: Pixels, objective: Objective, *, rng: np.random.Generator, rounds: int, width: int) -> Pixels:
    """The best of `rounds` x `width` mutations, each round from the best so far."""
    best, best_value = start, float(objective([start])[0])
    for _ in range(rounds):
        tries = [mutated(best, rng) for _ in range(width)]
        values = objective(tries)
        place = int(np.argmax(values))
        if values[place] > best_value:
            best, best_value = tries[place], float(values[place])
    return best


def adversarial_pictures(
    model: VisionLanguageModel, start: Pixels, *, rng: np.random.Generator, rounds: int = 6, width: int = 16
) -> dict[str, Pixels]:
    """Pictures that push the encoder as far as a short search gets: large tokens, peaked and flat attention."""

    def largest(pictures: list[Pixels]) -> Floats:
        return np.asarray(model.visual_tokens(pictures).tokens.norm(dim=(1, 2)).double().cpu().numpy())

    def peaked(pictures: list[Pixels]) -> Floats:
        return np.asarray(model.visual_tokens(pictures).importance.amax(dim=1).double().cpu().numpy())

    def flat(pictures: list[Pixels]) -> Floats:
        return -peaked(pictures)

    goals = {"large tokens": largest, "peaked attention": peaked, "flat attention": flat}
    return {name: climb(start, goal, rng=rng, rounds=rounds, width=width) for name, goal in goals.items()}


def replacements(
    unit: Unit, other: Unit, adversarial: dict[str, Pixels], rng: np.random.Generator
) -> Iterator[tuple[str, Unit]]:
    """Large, small and adversarial stand-ins for one unit, with the same questions (so that no shape changes)."""
    source = other.pictures[0].pixels
    yield "another record's picture", with_pixels(unit, lambda pixels: fitted(source, pixels))
    yield "one pixel by one level", with_pixels(unit, one_value)
    yield "one patch inverted", with_pixels(unit, one_patch)
    yield "white", with_pixels(unit, lambda pixels: np.full_like(pixels, 255))
    yield "black", with_pixels(unit, np.zeros_like)
    yield "checkerboard", with_pixels(unit, checkerboard)
    yield "noise", with_pixels(unit, lambda pixels: rng.integers(0, 256, pixels.shape, dtype=np.uint8))
    for name, picture in adversarial.items():
        yield name, with_pixels(unit, partial(fitted, picture))


def longer(unit: Unit) -> Iterator[tuple[str, Unit]]:
    """The unit with more text: a longer question, a longer answer, more questions. Shapes of the batch change."""
    asked = Question("please look at this very carefully: " * 4 + "what is it?", "no", "probe")
    answered = Question("what is it?", "a long answer of many words " * 3, "probe")
    yield "a longer question in one record", _asking(unit, (asked,))
    yield "a longer answer in one record", _asking(unit, (answered,))
    yield "more questions in one record", _asking(unit, (*unit.pictures[0].questions, asked, answered))


def _asking(unit: Unit, questions: Sequence[Question]) -> Unit:
    picture: Picture = unit.pictures[0].derived(questions=questions)
    return replace(unit, pictures=(picture, *unit.pictures[1:]))
