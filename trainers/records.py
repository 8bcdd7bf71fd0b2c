"""What a trainer eats: questions about pictures, grouped into the units that privacy protects.

A picture is an array, or lies where it was found (`Elsewhere`) and is decoded whenever it is looked at: a set of any
size takes no more memory than what is in use at once.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dpaudit.documents import LedgerRow

Pixels = npt.NDArray[np.uint8]
AT_ONCE = 64 << 20  # bytes of decoded pictures that a batch of them holds


class Elsewhere(Protocol):
    """A picture that is not held in memory. shape: (height, width, 3). sha256: `pixels_sha256` of its pixels."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def sha256(self) -> str: ...

    def pixels(self) -> Pixels:
        """Decode it, always to the same pixels; UsageError where what holds it has changed since it was found."""
        ...


Image = Pixels | Elsewhere


def looked_at(image: Image) -> Pixels:
    """The pixels of a picture, decoded now if it lies elsewhere."""
    return image if isinstance(image, np.ndarray) else image.pixels()


def pixels_sha256(image: Image) -> str:
    """Hex SHA-256 of a picture's size and pixels; of one that lies elsewhere it is known."""
    if not isinstance(image, np.ndarray):
        return image.sha256
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def in_batches(images: Iterable[Image]) -> Iterator[list[Pixels]]:
    """The pixels of pictures in order, in lists that hold `AT_ONCE` bytes or one picture."""
    batch: list[Pixels] = []
    size = 0
    for image in images:
        needed = int(np.prod(image.shape))
        if batch and size + needed > AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(looked_at(image))
        size += needed
    if batch:
        yield batch


class _Looked:
    """The field `pixels` of a picture: takes any `Image`, gives its pixels."""

    def __get__(self, picture: Any, owner: Any = None) -> Pixels:
        if picture is None:  # dataclasses asks the class for a default value: there is none
            raise AttributeError("pixels")
        return looked_at(picture.__dict__["image"])

    def __set__(self, picture: Any, value: Image) -> None:
        picture.__dict__["image"] = value


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

    Made with an array or with a picture that lies elsewhere, which `pixels` decodes each time. beside: further pictures
    that all of these questions show, behind the first.
    """

    id: str
    pixels: _Looked = _Looked()  # a descriptor, not a default: it must be given
    questions: tuple[Question, ...] = ()
    beside: tuple[Image, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures that the questions show, in order, where they lie."""
        first: Image = self.__dict__["image"]
        return (first, *self.beside)

    @property
    def shown(self) -> tuple[Pixels, ...]:
        """The pixels of all of them."""
        return tuple(map(looked_at, self.images))

    def derived(self, *, id: str | None = None, questions: Sequence[Question] | None = None) -> "Picture":
        """The same picture, left where it lies, under another id or with other questions.

        `dataclasses.replace` would decode it and keep the pixels.
        """
        mine = self.questions if questions is None else tuple(questions)
        return Picture(self.id if id is None else id, self.images[0], mine, self.beside)


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
