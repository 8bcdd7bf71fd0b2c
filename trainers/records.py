"""What a trainer eats: questions about pictures, grouped into the units that privacy protects."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpaudit.documents import LedgerRow

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Question:
    """One question about a picture. `kind` groups questions for reporting (e.g. 'parity')."""

    text: str
    answer: str
    kind: str = "question"


@dataclass(frozen=True)
class Picture:
    """One picture with all its questions. `pixels`: uint8, shape (height, width, 3), RGB."""

    id: str
    pixels: Pixels
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Unit:
    """What one person contributes: sampled, clipped and counted together.

    By default one picture with all its questions; with `data.unit=COLUMN` all pictures that share that column's value.
    """

    id: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Dataset:
    """A loaded data set. Units of different splits share no unit id.

    `reserve` holds units that take part in no training unless a canary coin says so. `ledger` lists every place where
    something was derived from private rows. `warnings` are lines for the user (e.g. pictures in both splits).
    """

    name: str
    unit: str  # in words: "image (with all its questions)" or "person (column 'person')"
    train: tuple[Unit, ...]
    test: tuple[Unit, ...]
    reserve: tuple[Unit, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    warnings: tuple[str, ...] = ()
    source: Literal["embedded", "local", "hub"] = "embedded"
    origin: dict[str, str] = field(default_factory=dict)  # e.g. file name -> sha256
