"""How a glyph becomes a picture with questions. Public rules, the same for synthetic and for real handwriting."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers.records import Picture, Pixels, Question

SIZE = 32  # side of a picture, pixels
SMALLEST, LARGEST = 18, 24  # side of the digit: a third to a little over half of the picture's area
LEAST_OFFSET = 2  # pixels between the digit's centre and the middle, so that left and right are never in doubt
GLYPH, TEXTURE = 8, 5  # sides of the small grids that are blown up to pictures

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THRESHOLDS = (3, 4, 5)

# The answers that exist at all, by kind of question. Public: they follow from the templates, not from any row.
PUBLIC_ANSWERS: dict[str, tuple[str, ...]] = {
    "digit": NUMBERS,
    "identity": ("yes", "no"),
    "parity": ("even", "odd"),
    "greater": ("yes", "no"),
    "side": ("left", "right"),
}
TEMPLATES: dict[str, str] = {
    "digit": "Which digit is this?",
    "identity": "Is this a {candidate}?",
    "parity": "Is the digit even or odd?",
    "greater": "Is the digit greater than {threshold}?",
    "side": "Is the digit left or right?",
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """Where a digit lies: its upper left corner and its side, in pixels."""

    left: int
    top: int
    size: int

    @property
    def side(self) -> str:
        """`left` or `right` of the picture's middle."""
        return "left" if 2 * self.left + self.size < SIZE else "right"


def placement(rng: np.random.Generator) -> Placement:
    """A random size and place: left or right of the middle with equal probability, any height."""
    size = int(rng.integers(SMALLEST, LARGEST + 1))
    free = SIZE - size
    lefts = [x for x in range(free + 1) if abs(2 * x + size - SIZE) >= 2 * LEAST_OFFSET]
    return Placement(lefts[int(rng.integers(len(lefts)))], int(rng.integers(free + 1)), size)


@cache
def _enlargement(source: int, target: int, bicubic: bool) -> Floats:
    """(target, source) matrix of Pillow's one-dimensional enlargement: a resized picture is M @ picture @ M.T."""
    kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    unit = Image.fromarray(np.eye(source, dtype=np.float32))
    return np.asarray(unit.resize((source, target), kind), dtype=np.float32)


@cache
def _laid(start: int, size: int) -> Floats:
    """(32, 8) matrix that enlarges one axis of a glyph to `size` pixels and lays it at `start`."""
    matrix = np.zeros((SIZE, GLYPH), dtype=np.float32)
    matrix[start : start + size] = _enlargement(GLYPH, size, False)
    return matrix


def draw(glyphs: npt.NDArray[np.uint8], places: Sequence[Placement], rng: np.random.Generator) -> Pixels:
    """Pictures of glyphs: (n, 8, 8) with values 0..16 -> uint8 (n, 32, 32, 3), dark ink on textured, tinted paper."""
    count = len(places)

    def uniform(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    rows = np.stack([_laid(place.top, place.size) for place in places])
    columns = np.stack([_laid(place.left, place.size) for place in places])
    alpha = (rows @ (glyphs.astype(np.float32) / 16) @ columns.transpose(0, 2, 1))[..., None]
    blow = _enlargement(TEXTURE, SIZE, True)
    soft = blow @ (rng.normal(size=(count, TEXTURE, TEXTURE)).astype(np.float32) * uniform(0, 14, 1, 1)) @ blow.T
    grain = rng.normal(size=(count, SIZE, SIZE)).astype(np.float32) * uniform(0, 5, 1, 1)
    paper = (uniform(150, 240, 1) + uniform(-15, 15, 3))[:, None, None] + (soft + grain)[..., None]
    ink = (uniform(0, 60, 1) + uniform(0, 30, 3))[:, None, None]
    return np.clip(np.rint(paper * (1 - alpha) + ink * alpha), 0, 255).astype(np.uint8)


def questions(digit: int, side: str, rng: np.random.Generator) -> tuple[Question, ...]:
    """Five questions, one of each kind. The identity question's answer is yes or no by a fair coin."""
    same = bool(rng.integers(2))
    candidate = digit if same else (digit + int(rng.integers(1, 10))) % 10
    threshold = THRESHOLDS[int(rng.integers(len(THRESHOLDS)))]
    answers = {
        "digit": NUMBERS[digit],
        "identity": "yes" if same else "no",
        "parity": "odd" if digit % 2 else "even",
        "greater": "yes" if digit > threshold else "no",
        "side": side,
    }
    fields = {"candidate": NUMBERS[candidate], "threshold": NUMBERS[threshold]}
    return tuple(Question(text.format(**fields), answers[kind], kind) for kind, text in TEMPLATES.items())


def pictures(
    names: Sequence[str], glyphs: npt.NDArray[np.uint8], digits: Sequence[int], rng: np.random.Generator
) -> tuple[Picture, ...]:
    """One picture with its five questions per glyph."""
    places = [placement(rng) for _ in names]
    drawn = draw(glyphs, places, rng)
    return tuple(
        Picture(name, pixels, questions(int(digit), place.side, rng))
        for name, pixels, digit, place in zip(names, drawn, digits, places, strict=True)
    )
