"""Are members and non-members different records? Exact copies make a game void, look-alikes make it weaker.

The coin decides who is a member, so no distribution shift can creep in; but a non-member that is a copy of a member was
in training after all. Exact copies are compared by content hash; look-alikes by two measures that must agree: the
difference hash of the grey picture (64 bits) and the mean difference of small thumbnails. Who was a member is private:
what is said to the outside (checks, errors, warnings) are counts, never ids; `look_alikes` has the pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from attacks.canaries import content_sha256
from dpaudit.documents import Check
from dpaudit.errors import InvalidGame
from trainers.records import Picture, Pixels, Unit, pixels_sha256

MOST_BITS = 3  # of the 64 of a hash that may differ
CLEARLY = 3  # grey levels
THUMBNAIL = 16
MOST_GREY = 4.0  # mean difference of thumbnails, in grey levels of 255
BLOCK = 512


@dataclass(frozen=True)
class Pair:
    """A member and a non-member whose pictures are equal or look alike."""

    member: str
    other: str
    exact: bool


def difference_hash(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """(64,) bits: is a pixel of the 9 x 8 grey picture clearly brighter than its right neighbour (Krawetz 2013, dHash).

    "Clearly", by more than 3 grey levels: in flat areas the sign alone would be noise.
    """
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    bits: npt.NDArray[np.bool_] = (values[:, :-1] > values[:, 1:] + CLEARLY).ravel()
    return bits


def thumbnail(pixels: Pixels) -> npt.NDArray[np.float32]:
    """(3 * 16 * 16,) colours of the picture at 16 x 16."""
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


def _marks(picture: Picture) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], str]:
    pixels = picture.pixels
    return difference_hash(pixels), thumbnail(pixels), pixels_sha256(pixels)


def look_alikes(units: Sequence[Unit], members: npt.NDArray[np.bool_]) -> list[Pair]:
    """Pairs of a member and a non-member with a picture that is equal or looks alike, members in order."""
    pictures = [(index, picture) for index, unit in enumerate(units) for picture in unit.pictures]
    if not pictures:
        return []
    owner = np.array([index for index, _ in pictures])
    marks = [_marks(picture) for _, picture in pictures]  # one picture in memory at a time
    bits, small = np.stack([mark[0] for mark in marks]).astype(np.float32), np.stack([mark[1] for mark in marks])
    raw = [mark[2] for mark in marks]
    inside, outside = np.flatnonzero(members[owner]), np.flatnonzero(~members[owner])
    found: dict[tuple[int, int], bool] = {}
    for at in range(0, len(inside), BLOCK):
        mine = inside[at : at + BLOCK]
        # Hamming distance of 0/1 rows: sum a + sum b - 2 a.b
        far = bits[mine].sum(axis=1)[:, None] + bits[outside].sum(axis=1) - 2 * bits[mine] @ bits[outside].T
        for row, column in zip(*np.nonzero(far <= MOST_BITS + 0.5), strict=True):
            first, second = int(mine[row]), int(outside[column])
            if np.abs(small[first] - small[second]).mean() <= MOST_GREY:
                pair = int(owner[first]), int(owner[second])
                found[pair] = found.get(pair, False) or raw[first] == raw[second]
    return [Pair(units[a].id, units[b].id, exact) for (a, b), exact in sorted(found.items())]


def require_disjoint(units: Sequence[Unit], members: npt.NDArray[np.bool_]) -> None:
    """Raise InvalidGame when a non-member is a copy of a member: same pictures, questions and answers."""
    hashes = np.array([content_sha256(unit) for unit in units])
    copies = int(np.isin(hashes[~members], hashes[members]).sum())
    if copies:
        raise InvalidGame(
            f"members and non-members overlap: {copies} of {int((~members).sum())} records that were left out are "
            "copies of records that took part"
        )


def overlap_check(
    units: Sequence[Unit], members: npt.NDArray[np.bool_], *, log: Callable[[str], None] = lambda _: None
) -> Check:
    """The entry of the audit's validity: copies fail, look-alikes are counted and pass with a warning to `log`."""
    allowed = "no copy of a member among the non-members"
    try:
        require_disjoint(units, members)
    except InvalidGame as error:
        text = str(error)
        return Check(name="overlap", status="fail", measured=text, allowed=allowed, explanation=text)
    pairs = look_alikes(units, members)
    if not pairs:
        why = "No picture of a member is among the non-members' or looks like one."
        return Check(name="overlap", status="pass", measured="0 pairs", allowed=allowed, explanation=why)
    equal = sum(pair.exact for pair in pairs)
    counts = f"look-alike pairs: {len(pairs)}, of them equal: {equal}"
    log(f"warning: pictures of members and non-members are (nearly) the same; {counts}")
    return Check(
        name="overlap",
        status="pass",
        measured=counts,
        allowed=allowed,
        explanation="Non-members that look like members score like members: the attack looks weaker than it is. "
        "The bound stays valid, since coins decided.",
    )
