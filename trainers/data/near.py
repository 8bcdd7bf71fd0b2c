"""Near-duplicates: pictures that look the same and are not equal, as a JPEG saved again is.

They are units of their own, since nobody can say how alike two people's pictures may be. But whoever is in a set twice
is protected half as well as the claim says, and a test picture that was trained on in another file is not held out. So
they are counted and said. Two pictures are alike where reductions to 16 x 16 places (RGB means) differ by at most one
level or `SHARE` of the picture's own contrast, root mean square, and their proportions agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers.records import Pixels

MOST = 20_000  # pictures that are compared with each other: seconds; above, nothing is looked for and that is said
SHARE = 0.12
WEIGHTS = (1.0, 0.3, 0.3)  # of brightness and colours: a JPEG keeps a quarter of the colour places
COARSE, FINE = 8, 16
_ROWS = 128  # compared at once: 50 MB for 20,000 pictures
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Signature:
    """A picture made small. fine: (16 * 16 * 3,) brightness and colours; proportion: width / height."""

    fine: npt.NDArray[np.uint8]
    proportion: float


def signature(pixels: Pixels) -> Signature:
    """The signature of a picture."""
    small = Image.fromarray(pixels).resize((FINE, FINE), Image.Resampling.BOX).convert("YCbCr")
    return Signature(np.asarray(small, dtype=np.uint8).reshape(-1), pixels.shape[1] / pixels.shape[0])


def pairs(first: Sequence[Signature], second: Sequence[Signature] | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) that look alike: within `first` (i < j), or between `first` and `second`."""
    within = second is None
    other = first if second is None else second
    if not first or not other:
        return []
    one = _stack(first)
    two = one if within else _stack(other)
    coarse_one, coarse_two = _coarse(one), _coarse(two)
    allowed_one, allowed_two = _allowed(one), _allowed(two)
    found: list[tuple[int, int]] = []
    squares = np.square(coarse_two).sum(axis=1)
    for at in range(0, len(one), _ROWS):
        part = coarse_one[at : at + _ROWS]
        distance = np.square(part).sum(axis=1)[:, None] + squares[None] - 2 * part @ coarse_two.T
        limit = np.maximum(allowed_one[at : at + _ROWS, None], allowed_two[None])
        # A mean over places never moves apart what is close before it: the coarse look misses nothing.
        rows, columns = np.nonzero(distance <= np.square(limit) * part.shape[1] + 1.0)
        for row, column in zip((rows + at).tolist(), columns.tolist(), strict=True):
            if not (within and column <= row) and _alike(one, two, row, column, first, other):
                found.append((row, column))
    return found


def _alike(
    one: Floats, two: Floats, row: int, column: int, first: Sequence[Signature], other: Sequence[Signature]
) -> bool:
    apart = float(np.sqrt(np.square(one[row] - two[column]).mean()))
    allowed = float(min(_allowed(one[row : row + 1])[0], _allowed(two[column : column + 1])[0]))
    wide, narrow = sorted((first[row].proportion, other[column].proportion), reverse=True)
    return apart <= allowed and wide / narrow < 1.05


def _stack(items: Sequence[Signature]) -> Floats:
    weights = np.tile(np.asarray(WEIGHTS, dtype=np.float32), FINE * FINE)
    return np.stack([item.fine for item in items]).astype(np.float32) * weights


def _coarse(fine: Floats) -> Floats:
    step = FINE // COARSE
    blocks = fine.reshape(len(fine), COARSE, step, COARSE, step, 3)
    out: Floats = blocks.mean(axis=(2, 4)).reshape(len(fine), -1).astype(np.float32)
    return out


def _allowed(fine: Floats) -> Floats:
    """Root mean square difference that still counts as alike, from each picture's own contrast."""
    contrast = fine.reshape(len(fine), -1, 3).std(axis=1).mean(axis=1)
    out: Floats = np.maximum(1.0, SHARE * contrast).astype(np.float32)
    return out
