"""Public digit shapes, none of them from anybody's handwriting: distorted stroke skeletons and distorted fonts.

Both are drawn as 32x32 bitmaps and counted in 4x4 blocks, which gives 8x8 glyphs with values 0..16. That is the
documented format of the UCI "Optical Recognition of Handwritten Digits" set, on which scikit-learn's digits rest:
https://archive.ics.uci.edu/dataset/80. Only this public description was used, no sample of the set.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Glyph = npt.NDArray[np.uint8]  # (8, 8), 0..16
Floats = npt.NDArray[np.float64]
Style = Literal["strokes", "fonts", "shifted-strokes", "shifted-fonts"]

CANVAS = 32
BLOCK = 4
POINTS_PER_SEGMENT = 10

# A skeleton is a list of strokes; a stroke is a string of points "x,y" in a unit box (y grows downwards) through which
# a smooth curve is laid. A point written with "!" is a corner. Several ways in which people write each digit.
BASE_SKELETONS: dict[int, tuple[tuple[str, ...], ...]] = {
    0: (
        (".5,0 .15,.2 .08,.5 .15,.8 .5,1 .85,.8 .92,.5 .85,.2 .5,0",),
        (".6,0 .25,.15 .1,.55 .3,.95 .65,.95 .9,.5 .75,.1 .45,.02",),
        (".3,.08 .1,.5 .3,.95 .7,.95 .9,.5 .7,.08 .3,.08",),
    ),
    1: (
        (".5,0! .5,1!",),
        (".25,.25! .55,0! .55,1!",),
        (".25,.22! .5,0! .5,1!", ".2,1! .8,1!"),
        (".6,0! .5,.5 .42,1!",),
    ),
    2: (
        (".12,.25 .3,.03 .65,.03 .85,.25 .7,.5 .4,.75 .1,1! .9,1!",),
        (".1,.2 .4,0 .8,.15 .75,.45 .4,.8 .15,.95 .1,.8 .3,.75 .6,.95 .92,.95",),
        (".2,.1! .6,0 .85,.2 .65,.55 .15,1! .5,.93 .9,1!",),
    ),
    3: (
        (".12,.12 .45,0 .8,.12 .8,.36 .45,.48! .85,.6 .85,.88 .5,1 .1,.88",),
        (".1,0! .85,0! .42,.4! .8,.5 .88,.75 .6,1 .1,.9",),
        (".15,.15 .5,0 .8,.2 .6,.45 .35,.48 .6,.45 .9,.7 .6,1 .1,.9",),
    ),
    4: (
        (".25,0! .1,.6! .9,.6!", ".65,.15! .65,1!"),
        (".65,1! .65,0! .05,.68! .95,.68!",),
        (".2,0! .15,.45 .45,.55 .85,.4!", ".85,0! .7,1!"),
        (".3,0! .1,.5! .85,.5!", ".8,0! .7,1!"),
    ),
    5: (
        (".85,0! .2,0! .15,.45! .5,.35 .85,.5 .85,.85 .5,1 .1,.9",),
        (".2,.03! .15,.42! .6,.38 .9,.65 .65,.97 .1,.95", ".2,.02! .9,0!"),
        (".8,.02 .4,.05 .2,.25 .4,.45 .75,.6 .8,.85 .5,1 .12,.92",),
    ),
    6: (
        (".7,0 .3,.25 .12,.65 .3,.97 .7,.97 .85,.72 .65,.5 .3,.55 .15,.75",),
        (".45,0! .15,.5 .15,.85 .5,1 .85,.85 .8,.6 .5,.52 .18,.7",),
        (".85,.1 .5,0 .2,.3 .12,.7 .4,1 .8,.9 .8,.6 .45,.5 .15,.7",),
    ),
    7: (
        (".1,0! .9,0! .35,1!",),
        (".1,.02! .88,.02! .45,1!", ".25,.5! .8,.48!"),
        (".12,.2! .12,.02! .88,.02! .6,.45 .45,1!",),
        (".1,.08 .5,0 .9,.02! .65,.4 .4,1!", ".3,.55! .75,.45!"),
    ),
    8: (
        (".5,.48 .18,.3 .25,.05 .75,.05 .82,.3 .5,.48 .12,.72 .25,.98 .75,.98 .88,.72 .5,.48",),
        (".8,.12 .5,0 .2,.15 .35,.4 .75,.65 .8,.9 .5,1 .18,.88 .3,.62 .7,.38 .8,.12",),
        (".5,0 .2,.22 .5,.45 .8,.22 .5,0", ".5,.45 .1,.72 .5,1 .9,.72 .5,.45"),
    ),
    9: (
        (".82,.25 .5,0 .15,.2 .25,.48 .6,.5 .82,.25! .8,.6 .7,1!",),
        (".8,.15 .45,0 .12,.22 .35,.5 .75,.4 .82,.15! .85,.6 .6,.97 .2,.95",),
        (".75,.1 .4,.02 .15,.25 .4,.5 .8,.3! .82,1!",),
    ),
}

# Other ways of writing, kept out of the base model's training: the public stand-in for "somebody else's hand".
SHIFTED_SKELETONS: dict[int, tuple[tuple[str, ...], ...]] = {
    0: (
        (".75,.12 .4,0 .08,.4 .2,.85 .6,1 .92,.6 .7,.1 .35,.12",),
        (".5,0 .05,.5 .5,1 .95,.5 .5,0",),
    ),
    1: (
        (".35,.3! .6,0! .45,1!",),
        (".5,0! .5,1!", ".25,1! .75,1!"),
        (".15,.35 .5,.1 .6,0! .6,1!",),
    ),
    2: (
        (".15,.3 .2,.05 .7,0 .8,.3 .5,.65 .1,.97! .35,.85 .65,1 .95,.85",),
        (".1,.1! .75,.05 .8,.4 .1,1! .9,.97!",),
    ),
    3: (
        (".2,.05 .7,0 .8,.25 .3,.45 .25,.47 .75,.55 .85,.85 .4,1 .15,.8",),
        (".15,.02! .8,.05! .5,.35! .9,.6 .7,.95 .2,1!",),
    ),
    4: (
        (".45,0! .08,.5 .2,.62 .92,.55!", ".7,.25! .55,1!"),
        (".75,1! .7,.05! .15,.55 .5,.65 .95,.6!",),
    ),
    5: (
        (".9,.05! .3,0! .25,.4! .7,.45 .75,.8 .4,1 .05,.85!",),
        (".25,.05! .2,.5! .55,.4 .8,.6 .6,1 .15,1!", ".25,.05! .85,.1!"),
    ),
    6: (
        (".6,0! .2,.4 .1,.8 .45,1 .75,.8 .6,.6 .2,.75",),
        (".3,0! .12,.6 .35,1 .8,.95 .9,.65 .6,.45 .2,.65",),
    ),
    7: (
        (".15,.1! .5,.05 .85,.0! .5,.55 .5,1!",),
        (".05,.15! .15,0! .95,.05! .3,1!", ".2,.45! .75,.55!"),
    ),
    8: (
        (".7,.05 .25,.05 .3,.35 .8,.7 .6,1 .2,.9 .25,.65 .75,.3 .7,.05",),
        (".5,.4 .25,.2 .5,0 .75,.2 .5,.4 .15,.7 .45,1 .85,.75 .5,.4",),
    ),
    9: (
        (".85,.05! .4,.02 .15,.3 .5,.5 .85,.25 .85,.05! .75,.55 .5,1!",),
        (".7,.35 .3,.5 .2,.15 .6,0 .8,.3 .75,.8 .3,1 .15,.85",),
    ),
}

BASE_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
)
SHIFTED_FONTS = ("DejaVuSerif-Italic.ttf", "DejaVuSansMono-BoldOblique.ttf", "STIXGeneralBolIta.ttf")


def _catmull_rom(points: Floats) -> Floats:
    """A smooth curve through `points` (k, 2), sampled; the tangent at a point is half the chord of its neighbours."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, POINTS_PER_SEGMENT, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (padded[i : i + len(points) - 1, None, :] for i in range(4))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def _stroke(text: str, jitter: float, rng: np.random.Generator) -> Floats:
    """One stroke of a skeleton with its points moved at random, sampled densely, shape (k, 2)."""
    tokens = text.split()
    points = np.array([[float(v) for v in token.rstrip("!").split(",")] for token in tokens])
    points = points + rng.normal(0, jitter, points.shape)
    corners = [0, *(i for i in range(1, len(tokens) - 1) if tokens[i].endswith("!")), len(tokens) - 1]
    pieces = [_catmull_rom(points[a : b + 1]) for a, b in pairwise(corners)]
    return np.concatenate(pieces)


def _distorted(points: Floats, rng: np.random.Generator) -> Floats:
    """Slant, rotation, unequal scaling and one smooth wave, as a hand would add them; (k, 2) -> (k, 2)."""
    centred = points - 0.5
    angle, slant = rng.normal(0, 0.12), rng.normal(0.1, 0.25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, -slant], [0.0, 1.0]])
    scale = np.diag([rng.uniform(0.5, 0.95), 1.0])
    bent = centred @ (turn @ shear @ scale).T
    frequency, phase = rng.uniform(2, 6, 2), rng.uniform(0, 2 * np.pi, 2)
    wave = rng.normal(0, 0.035, 2) * np.sin(frequency * bent[:, ::-1] + phase)
    moved: Floats = bent + wave
    return moved


def _fitted(points: Floats, margin: float, rng: np.random.Generator) -> Floats:
    """Points scaled so that the figure fills the canvas's height, as in the UCI bitmaps; the width follows."""
    low, high = points.min(0), points.max(0)
    height = max(high[1] - low[1], 1e-3)
    scale = (CANVAS - 2 * margin) / height
    width = (high[0] - low[0]) * scale * rng.uniform(0.9, 1.15)
    width = min(width, CANVAS - 2 * margin)
    stretch = np.array([width / max(high[0] - low[0], 1e-3) if high[0] > low[0] else 1.0, scale])
    fitted: Floats = (points - (low + high) / 2) * stretch + CANVAS / 2
    return fitted


def _inked(points: Floats, radius: Floats) -> npt.NDArray[np.bool_]:
    """Bitmap (32, 32) of all pixels nearer to a point than its radius."""
    grid = np.arange(CANVAS) + 0.5
    dx = (grid[None, :] - points[:, :1]) ** 2
    dy = (grid[None, :] - points[:, 1:]) ** 2
    near = dy[:, :, None] + dx[:, None, :] < (radius**2)[:, None, None]
    return np.asarray(near.any(axis=0))


def _counted(bitmap: npt.NDArray[np.bool_]) -> Glyph:
    blocks = bitmap.reshape(CANVAS // BLOCK, BLOCK, CANVAS // BLOCK, BLOCK)
    counted: Glyph = blocks.sum(axis=(1, 3)).astype(np.uint8)
    return counted


def stroke_glyph(digit: int, rng: np.random.Generator, shifted: bool = False) -> Glyph:
    """A digit as pen strokes: a skeleton of the given family, distorted, drawn with a pen of varying width."""
    family = (SHIFTED_SKELETONS if shifted else BASE_SKELETONS)[digit]
    strokes = [_stroke(text, 0.04, rng) for text in family[rng.integers(len(family))]]
    points = _distorted(np.concatenate(strokes), rng)
    pen = rng.uniform(1.3, 2.9)
    points = _fitted(points, pen, rng)
    pressure = 1 + 0.2 * np.sin(np.linspace(0, rng.uniform(2, 9), len(points)) + rng.uniform(0, 6))
    return _counted(_inked(points, pen * pressure))


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), 72)


@cache
def _printed(digit: int, name: str) -> Floats:
    """The inked pixels' coordinates (k, 2) of a printed digit, thinned to a tractable number."""
    page = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(page).text((20, 4), str(digit), fill=255, font=_font(name))
    rows, columns = np.nonzero(np.asarray(page)[::2, ::2] > 127)
    points = np.stack([columns, rows], 1).astype(float)
    low, high = points.min(0), points.max(0)
    unit: Floats = (points - low) / max(high[1] - low[1], 1.0)
    return unit


def font_glyph(digit: int, rng: np.random.Generator, shifted: bool = False) -> Glyph:
    """A digit of a font that comes with matplotlib, distorted strongly."""
    names = SHIFTED_FONTS if shifted else BASE_FONTS
    points = _distorted(_printed(digit, names[rng.integers(len(names))]), rng)
    points = _fitted(points, 0.8, rng)
    return _counted(_inked(points, np.full(len(points), rng.uniform(0.7, 1.7))))


def glyphs(style: Style, digits: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One glyph per entry of `digits`: (n, 8, 8), values 0..16."""
    draw = stroke_glyph if style.endswith("strokes") else font_glyph
    return np.stack([draw(digit, rng, style.startswith("shifted")) for digit in digits])
