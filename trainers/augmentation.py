"""Augmentation multiplicity: shifted copies of a unit's pictures join its gradient before it is clipped.

De et al. (2022, arXiv 2204.13650) average a record's gradient over several augmentations and clip the mean. A unit
still moves the clipped sum by at most C, so nothing is spent. The tower is frozen and its outputs are computed once, so
a unit keeps the same copies for the whole training; De et al. draw new ones for every step.

A copy is the picture moved by up to an eighth of its height and width, its edges reflected. Pictures are not mirrored:
that would turn the answers to questions about sides, digits and text. The shift follows from the picture's id and the
copy's number, by a public rule, and never from another record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpaudit.randomness import Key
from trainers.records import Image, Picture, Pixels, Unit, looked_at, pixels_sha256

PURPOSE = "augmentation"
PUBLIC = Key.from_seed(0)
PART = 8  # the largest shift is the size over this


@dataclass(frozen=True)
class Shifted:
    """A picture moved `down` and `right` pixels (negative: up and left), decoded and moved whenever it is looked at."""

    image: Image
    down: int
    right: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3), that of the picture."""
        return self.image.shape

    @property
    def sha256(self) -> str:
        """Of the moved pixels."""
        return pixels_sha256(self.pixels())

    def pixels(self) -> Pixels:
        """The moved picture; what comes in at an edge is the picture reflected there."""
        pixels = looked_at(self.image)
        height, width, _ = pixels.shape
        edges = [(max(self.down, 0), max(-self.down, 0)), (max(self.right, 0), max(-self.right, 0)), (0, 0)]
        wide = np.pad(pixels, edges, mode="reflect")
        top, left = max(-self.down, 0), max(-self.right, 0)
        return np.ascontiguousarray(wide[top : top + height, left : left + width])


def shifted(picture: Picture, copy: int) -> Picture:
    """Copy number `copy` (from 1) of a picture and of those beside it; its id names the copy."""
    moved = []
    for place, image in enumerate(picture.images):
        name = f"{copy} {place} {picture.id}"
        draws = PUBLIC.uniform(2, step=0, name=name, purpose=PURPOSE)
        most = [size // PART for size in image.shape[:2]]
        down, right = (int((2 * size + 1) * draw) - size for size, draw in zip(most, draws, strict=True))
        moved.append(Shifted(image, down, right))
    return Picture(f"{picture.id} (copy {copy})", moved[0], picture.questions, tuple(moved[1:]))


def augmented(units: Sequence[Unit], count: int) -> Sequence[Unit]:
    """Units whose pictures are there `count` times: as they are, then in `count` - 1 shifted copies each.

    The mean over a unit's questions, which is its loss, is then the mean over the copies as well.
    """
    if count == 1:
        return units
    return [
        replace(
            unit, pictures=(*unit.pictures, *(shifted(own, copy) for copy in range(1, count) for own in unit.pictures))
        )
        for unit in units
    ]
