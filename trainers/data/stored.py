"""Pictures of a data set left where they lie: checked once when the set is read, decoded again when they are looked at.

A set of 20,000 photographs is 3 GB of files and 20 GB of pixels. Reading it decodes each picture once, within all the
limits of `trainers.data.rows` and `trainers.data.pictures`, and keeps what tells pictures apart (a few hundred bytes
each): size, hashes, a small signature. The bytes stay in their file; those that came inside a table lie in memory up to
`MOST_HELD`, and beyond it in a file without a name in the system's folder for temporary files (TMPDIR), which ends with
the process. Of decoded pictures the last `MOST_DECODED` bytes are kept, so a small set is decoded once.

Limits of a single picture hold at every decode. Those of a whole table (`rows.Volume`) were held when it was read, and
the bytes are the same ever after: their hash is compared each time.
"""

import hashlib
import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpaudit import untrusted
from dpaudit.errors import EnvironmentFailure, UsageError
from trainers.data import pictures
from trainers.data.near import Signature, signature
from trainers.data.pictures import Decoded, Look
from trainers.data.rows import MAX_PICTURE_BYTES, Source, look_at
from trainers.records import Pixels, pixels_sha256

_Key = tuple[bytes, Look]  # hash of the encoded bytes, and how they are looked at
MOST_HELD = 32 << 20  # bytes of encoded pictures of one table
MOST_DECODED = 128 << 20  # bytes of decoded ones of this process


class Shelf:
    """Encoded pictures of one table that have no file of their own: the first in memory, others in a nameless file."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self.most = most
        self.size = 0  # bytes in memory
        self.end = 0  # of the file
        self._file: int | None = None

    def put(self, data: bytes) -> "Place | bytes":
        """Where `data` lies from now on. EnvironmentFailure where the disk is full."""
        if self.size + len(data) <= self.most:
            self.size += len(data)
            return data
        place = Place(self, self.end, len(data))
        try:
            file = self._opened()
            while self.end < place.start + len(data):
                self.end += os.pwrite(file, data[self.end - place.start :], self.end)
        except OSError as error:
            raise EnvironmentFailure(
                f"{tempfile.gettempdir()}: no room for the pictures of a table ({error.strerror}); set TMPDIR to a "
                "folder on a larger disk, or store the pictures as files beside the table"
            ) from None
        return place

    def get(self, start: int, length: int) -> bytes:
        """What was put there."""
        return os.pread(self._opened(), length, start)

    def _opened(self) -> int:
        if self._file is None:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        return self._file


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes on a shelf."""

    shelf: Shelf
    start: int
    length: int


class Recent:
    """The pictures that were decoded last, up to a number of bytes; the oldest go first."""

    def __init__(self, most: int = MOST_DECODED) -> None:
        self.most, self.size = most, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, tuple[Pixels, ...]] = OrderedDict()

    def get(self, key: _Key) -> tuple[Pixels, ...] | None:
        """The frames under a key, where they are still here."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: _Key, frames: tuple[Pixels, ...]) -> None:
        """Keep frames, and drop the oldest for them."""
        size = sum(frame.nbytes for frame in frames)
        with self._lock:
            if key in self._kept or size > self.most:
                return
            self._kept[key] = frames
            self.size += size
            while self.size > self.most:
                _, gone = self._kept.popitem(last=False)
                self.size -= sum(frame.nbytes for frame in gone)


_recent = Recent()


@dataclass(frozen=True, eq=False, slots=True)
class Where:
    """The bytes of one picture. at: its file, its place on a shelf, or the bytes. sha256: of them."""

    at: Path | Place | bytes
    sha256: bytes
    look: Look
    source: Source
    row: int

    def read(self) -> bytes:
        """The bytes that were seen before; UsageError where a file holds others by now."""
        if isinstance(self.at, bytes):
            return self.at
        if isinstance(self.at, Place):
            return self.at.shelf.get(self.at.start, self.at.length)
        try:
            data = untrusted.read_bytes(self.at, MAX_PICTURE_BYTES)
        except (OSError, UsageError):
            data = b""
        if hashlib.sha256(data).digest() != self.sha256:
            raise self.source.fault(self.row, "image", "its file has changed since the data were read; start again")
        return data

    def frames(self) -> tuple[Pixels, ...]:
        """All frames, decoded now unless they just were."""
        key = self.sha256, self.look
        frames = _recent.get(key)
        if frames is None:
            try:
                frames = pictures.decode(self.read(), self.look).frames
            except pictures.Refused as why:  # of bytes that were not refused before: less memory is free
                raise self.source.fault(self.row, "image", str(why)) from None
            _recent.put(key, frames)
        return frames


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """One frame of a stored picture, as `trainers.records.Elsewhere`. Copies are the frame itself; another process gets
    its pixels."""

    where: Where
    index: int
    shape: tuple[int, ...]
    sha256: str

    def pixels(self) -> Pixels:
        """Its pixels."""
        return self.where.frames()[self.index]

    def __copy__(self) -> "Frame":
        return self

    def __deepcopy__(self, memo: object) -> "Frame":
        return self  # a copied shelf would read from a file that is closed with the first one

    def __reduce__(self) -> tuple[Callable[[Pixels], Pixels], tuple[Pixels]]:
        return np.asarray, (self.pixels(),)


@dataclass(frozen=True)
class Stored:
    """A picture of a set, as `trainers.data.pictures.Decoded` without its pixels."""

    frames: tuple[Frame, ...]
    content: str
    composited: bool
    blank: bool
    partial: bool
    seen: Signature | None

    @property
    def mark(self) -> Signature:
        """How it looks, made small; where that was not kept it is decoded."""
        return signature(self.frames[0].pixels()) if self.seen is None else self.seen


def store(source: Source, number: int, data: bytes, look: Look, home: Path | Shelf, *, mark: bool = True) -> Stored:
    """Look at an encoded picture of a row, and leave it in its file, or on a shelf where it has none.

    mark: keep a signature, to look for near-duplicates. Raises UsageError that names file, row and field for a picture
    that is refused.
    """
    seen: Decoded = look_at(source, number, data, look)
    digest = hashlib.sha256(data).digest()
    where = Where(home.put(data) if isinstance(home, Shelf) else home, digest, look, source, number)
    _recent.put((digest, look), seen.frames)
    frames = tuple(
        Frame(where, index, tuple(map(int, pixels.shape)), pixels_sha256(pixels))
        for index, pixels in enumerate(seen.frames)
    )
    small = signature(seen.frames[0]) if mark else None
    return Stored(frames, seen.content, seen.composited, seen.blank, seen.partial, small)
