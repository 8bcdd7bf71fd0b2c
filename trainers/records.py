"""What a trainer eats: questions about pictures, grouped into the units that privacy protects."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpaudit.documents import LedgerRow

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Question:
    """One question about a picture. `kind` groups questions for reporting (e.g. 'parity').

    accepted: all answers that count as right, where there are several; `answer` is the one that training teaches.
    history: the turns before this one, (question, answer) each, that the model sees as said.
    """

    text: str
    answer: str
    kind: str = "question"
    accepted: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Picture:
    """One picture with all its questions. `pixels`: uint8, shape (height, width, 3), RGB.

    beside: further pictures that all of these questions show, behind the first.
    """

    id: str
    pixels: Pixels
    questions: tuple[Question, ...]
    beside: tuple[Pixels, ...] = ()

    @property
    def shown(self) -> tuple[Pixels, ...]:
        """All pictures that the questions show, in order."""
        return (self.pixels, *self.beside)


@dataclass(frozen=True)
class Unit:
    """What one person contributes: sampled, clipped and counted together.

    By default one picture with all its questions; with `data.unit=COLUMN` all pictures that share that column's value.
    """

    id: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a local set beyond its units; counts of private pictures, for the owner of the data.

    test_pictures: pictures of test; shared_pictures: those whose pixels are also in train. near_train: pictures of
    train that look like one of another unit; near_test: pictures of test that look like one of train and are not equal
    to any; both None where that was not looked at. merged: pictures of train that several files show. train_format,
    test_format: in words.
    """

    test_pictures: int
    shared_pictures: int
    near_train: int | None
    near_test: int | None
    train_format: str
    test_format: str
    merged: int = 0

    @property
    def held_out(self) -> str:
        """Whether figures on the test split are held out, in words that give no number away."""
        if self.shared_pictures >= self.test_pictures:
            return "no: every picture was in train"
        if self.shared_pictures:
            return "in part: some pictures were in train"
        if self.near_test is None:
            return "no picture was in train; near-duplicates were not looked for"
        return "in part: some pictures look like pictures of train" if self.near_test else "yes"


@dataclass(frozen=True)
class Dataset:
    """A loaded data set. Units of different splits share no unit id.

    `reserve` holds units that take part in no training unless a canary coin says so. `ledger` lists every place where
    something was derived from private rows. `notes` say how the files were read, `warnings` what the
    user should know (e.g. pictures in both splits); `facts` are the numbers behind them, None for the embedded data.
    """

    name: str
    unit: str  # in words: "image (with all its questions)" or "person (column 'person')"
    train: tuple[Unit, ...]
    test: tuple[Unit, ...]
    reserve: tuple[Unit, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Facts | None = None
    source: Literal["embedded", "local", "hub"] = "embedded"
    origin: dict[str, str] = field(default_factory=dict)  # e.g. file name -> sha256
