"""What the blind baseline sees of records: small pictures, colour statistics, hashed characters, counts.

The test itself is `dpaudit.blind`; it ranks every column, so scales do not matter here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpaudit.blind import LEAST, Blind, baseline
from dpaudit.documents import Check
from trainers.records import Unit

SIDE = 12  # pictures are shrunk to SIDE x SIDE
TEXT_FEATURES = 64

Floats = npt.NDArray[np.float64]


def blind_baseline(
    columns: Floats, members: npt.ArrayLike, *, kinds: Sequence[str] | None = None, seed: int = 0
) -> Blind | None:
    """The baseline on the (n, k) `features` of records; None with fewer than 20 or with one class only. members, kinds:
    one a record."""
    labels = np.asarray(members, dtype=bool)
    if len(columns) < LEAST or not 0 < labels.sum() < len(labels):
        return None
    return baseline(columns, labels, rng=np.random.default_rng(seed), kinds=kinds)


def blind_check(
    columns: Floats,
    members: npt.ArrayLike,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    what: str = "candidates",
) -> Check:
    """The baseline as a check of a game's validity. what: the records, in a word."""
    found = blind_baseline(columns, members, kinds=kinds, seed=seed)
    if found is not None:
        return found.check()
    return Check(
        name="blind baseline",
        status="not applicable",
        measured=f"{len(columns)} {what}",
        allowed=f"at least {LEAST}, of both classes",
        explanation=f"Too few {what} to fit a classifier that never sees the model.",
    )


def features(units: Sequence[Unit]) -> Floats:
    """(n, columns) numbers of records."""
    return np.stack([np.concatenate([_picture_features(unit), _text_features(unit)]) for unit in units])


def _picture_features(unit: Unit) -> Floats:
    found = []
    for picture in unit.pictures:
        small = Image.fromarray(picture.pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        values = picture.pixels.astype(np.float64)
        height, width = picture.pixels.shape[:2]
        edges = np.abs(np.diff(values, axis=1)).mean() if width > 1 else 0.0
        found.append(
            np.concatenate(
                [np.asarray(small, dtype=np.float64).ravel(), values.mean(axis=(0, 1)), values.std(axis=(0, 1)),
                 [edges, height, width]]
            )
        )  # fmt: skip
    return np.concatenate([np.mean(found, axis=0), [len(found)]])


def _text_features(unit: Unit) -> Floats:
    """Counts of hashed character pairs of questions and of answers, and their lengths."""
    counts = np.zeros(2 * TEXT_FEATURES)
    lengths = np.zeros(3)
    for picture in unit.pictures:
        for question in picture.questions:
            for half, text in enumerate((question.text, question.answer)):
                codes = np.array([ord(sign) for sign in f" {text} "], dtype=np.int64)
                slots = (codes[:-1] * 31 + codes[1:]) % TEXT_FEATURES
                np.add.at(counts, half * TEXT_FEATURES + slots, 1.0)
                lengths[half] += len(text)
            lengths[2] += 1
    return np.concatenate([counts, lengths])
