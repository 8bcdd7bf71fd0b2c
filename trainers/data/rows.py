"""Rows and pictures from untrusted files: every value checked, every fault one line that names file, row and field.

The rows are private. So no message ever repeats a value from a row, not even a file name found in one; types, lengths
and limits are all that an error says.
"""

import base64
import binascii
import hashlib
import io
import struct
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dpaudit import untrusted
from dpaudit.errors import UsageError, rejected
from trainers.records import Pixels

Row = dict[str, Any]

# A picture larger than this is a mistake or a decompression bomb: it would take 50 MB once decoded.
MAX_PIXELS = 1 << 24
MAX_PICTURE_BYTES = 1 << 26
MAX_LINE_BYTES = 1 << 27  # a JSONL row may carry its picture in base64
# Pictures of one file: a page of text in black and white packs 200-fold, one colour 1,000-fold and more.
MAX_DECODED, MAX_PICTURE_RATIO = 1 << 30, 400
MAX_REPEATED = 100  # a file whose rows name the same bytes again and again: above MAX_DECODED, at most so often
ROWS_AT_ONCE = 8  # of a Parquet file: one picture stored once and named by every row is copied for each of them
MAX_UNPACKED, MAX_RATIO = 1 << 28, 500  # a column of a Parquet file: above so many bytes, at most so much compressed
MAX_KEY = 1000  # characters of an identifier
MAX_CHARACTERS = {"question": 2000, "answer": 500, "kind": 100}
# Decoders for other formats (EPS runs a program, for one) are never started on untrusted bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Turning these into RGB would cut them off at 255 (a 12-bit scan becomes white) and NaN into black, without a word.
DEEP = {"F": "floating-point", "I": "32-bit", "I;16": "16-bit", "I;16L": "16-bit", "I;16B": "16-bit", "I;16N": "16-bit"}


@dataclass
class Decoded:
    """How much the pictures of one file take, in bytes: on disk, as the rows name them, and decoded."""

    stored: int = 0
    named: int = 0
    packed: int = 0
    unpacked: int = 0
    files: set[str] = field(default_factory=set)

    def name(self, size: int, file: str | None = None) -> str | None:
        """Count the bytes of one row's picture, in a `file` of its own or in the data file; what is wrong, or None."""
        if file is not None and file not in self.files:
            self.files.add(file)
            self.stored += size
        self.named += size
        if self.named > MAX_DECODED and self.named > MAX_REPEATED * self.stored:
            found = f"{self.stored >> 10} KB of pictures are named as {self.named >> 20} MB so far"
            return f"{found}; above {MAX_DECODED >> 20} MB at most {MAX_REPEATED}-fold is accepted"
        return None

    def add(self, packed: int, unpacked: int) -> str | None:
        """Count one picture, before it is decoded; what is wrong, or None."""
        self.packed += packed
        self.unpacked += unpacked
        if self.unpacked > MAX_DECODED and self.unpacked > MAX_PICTURE_RATIO * self.packed:
            ratio = f"{self.packed >> 20} MB of pictures unpack to {self.unpacked >> 20} MB so far"
            return f"{ratio}; above {MAX_DECODED >> 20} MB at most {MAX_PICTURE_RATIO}-fold is accepted"
        return None


@dataclass(frozen=True)
class Source:
    """One data file. `label` is the name that the user gave; `root` is the folder that nothing may leave; `decoded`
    counts its pictures."""

    path: Path
    label: str
    root: Path
    decoded: Decoded = field(default_factory=Decoded, compare=False)

    def __post_init__(self) -> None:
        if not self.decoded.stored and self.path.is_file():
            self.decoded.stored = self.path.stat().st_size

    def fault(self, row: int, field: str, problem: str) -> UsageError:
        """The error for one bad value, without the value."""
        return UsageError(f"{self.label}, row {row}, {field}: {problem}")


def inside(root: Path, name: str) -> Path | None:
    """`root / name` with links resolved; None when it is absolute, has '..' or ends outside `root`."""
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return None
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        return None
    try:
        target = (root / name).resolve()
        return target if target.is_relative_to(root.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name too long
        return None


def open_source(root: Path, name: str, field: str) -> Source:
    """The data file that the configuration field `field` names; errors name that field."""
    path = inside(root, name)
    if path is None:
        raise rejected(field, name, "a file name inside data.path (not absolute, no '..', no link that leads out)")
    if not path.is_file():
        raise UsageError(f"{field}: no file {name!r} in {root}")
    if path.suffix.lower() not in (".parquet", ".jsonl"):
        raise rejected(field, name, "a .parquet or .jsonl file")
    return Source(path=path, label=name, root=root.resolve())


def sha256_file(path: Path) -> str:
    """Hash of a file, read in pieces."""
    return untrusted.sha256(path)


def read_rows(source: Source, required: Iterable[str], optional: Iterable[str] = ()) -> Iterator[tuple[int, Row]]:
    """Rows in file order with their number (from 1; the line number for JSONL), reduced to the columns named.

    Raises UsageError when the file is damaged or a required column is missing.
    """
    needed = list(required)
    reader = _parquet_rows if source.path.suffix.lower() == ".parquet" else _jsonl_rows
    return reader(source, needed, [*needed, *(name for name in optional if name not in needed)])


def _jsonl_rows(source: Source, needed: list[str], wanted: list[str]) -> Iterator[tuple[int, Row]]:
    with untrusted.open_regular(source.path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise source.fault(number, "line", f"longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                row = untrusted.parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError:
                raise source.fault(number, "line", "not a JSON object in UTF-8") from None
            if not isinstance(row, dict):
                raise source.fault(number, "line", f"must be a JSON object, got {type(row).__name__}")
            for name in needed:
                if name not in row:
                    raise source.fault(number, name, "missing")
            yield number, {name: row[name] for name in wanted if name in row}


def _parquet_rows(source: Source, needed: list[str], wanted: list[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow

    try:
        with untrusted.parquet_file(source.path) as file:
            present = list(file.schema_arrow.names)
            for name in needed:
                if name not in present:
                    raise UsageError(f"{source.label}: no column {name!r}; columns: {', '.join(present[:20])}")
            number = 0
            _no_bomb(source, file.metadata)
            chosen = [name for name in wanted if name in present]
            for batch in untrusted.parquet_batches(file, chosen, ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError):
        # Arrow's own text may quote what it read.
        raise UsageError(f"{source.label}: not a readable Parquet file") from None


def _no_bomb(source: Source, metadata: Any) -> None:
    """Refuse a file whose columns unpack to far more than they take on disk."""
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * max(1, packed):
                raise UsageError(
                    f"{source.label}: a column unpacks from {packed} to {unpacked} bytes; at most {MAX_RATIO}-fold is "
                    "accepted"
                )


def text(source: Source, number: int, row: Row, field: str) -> str:
    """A checked text value: present, not blank, not too long, no control characters."""
    value = row.get(field)
    if value is None:
        raise source.fault(number, field, "missing")
    if not isinstance(value, str):
        raise source.fault(number, field, f"must be text, got {type(value).__name__}")
    limit = MAX_CHARACTERS[field]
    if len(value) > limit:
        raise source.fault(number, field, f"{len(value)} characters; at most {limit} are accepted")
    if not value.strip():
        raise source.fault(number, field, "empty")
    if any(unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" for sign in value):
        raise source.fault(number, field, "contains a control character or half a surrogate pair")
    return value.strip()


def key(source: Source, number: int, row: Row, field: str) -> str | int:
    """A checked identifier: text or a whole number."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = "nothing" if value is None else type(value).__name__
        raise source.fault(number, field, f"must be text or a whole number, got {found}")
    if value == "":
        raise source.fault(number, field, "empty")
    if isinstance(value, str) and len(value) > MAX_KEY:
        raise source.fault(number, field, f"{len(value)} characters; at most {MAX_KEY} are accepted")
    return value


def picture_bytes(source: Source, number: int, row: Row, field: str = "image") -> bytes:
    """The encoded picture of a row: bytes, base64 in a JSONL struct, or a file beside the data file."""
    value = row.get(field)
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
        if isinstance(data, str):
            try:
                value = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError):
                raise source.fault(number, field, "bytes are not base64") from None
    file = value if isinstance(value, str) else None
    if file is not None:
        value = _file_bytes(source, number, field, file)
    if not isinstance(value, bytes):
        found = "nothing" if value is None else type(value).__name__
        raise source.fault(number, field, f"must be bytes, a path or a struct of both, got {found}")
    if not value:
        raise source.fault(number, field, "empty")
    if len(value) > MAX_PICTURE_BYTES:
        raise source.fault(number, field, f"{len(value)} bytes; at most {MAX_PICTURE_BYTES} are accepted")
    too_much = source.decoded.name(len(value), file)
    if too_much is not None:
        raise source.fault(number, field, too_much)
    return value


def _file_bytes(source: Source, number: int, field: str, name: str) -> bytes:
    folder = source.path.parent
    path = inside(folder, name)
    if path is None or not path.is_relative_to(source.root):
        raise source.fault(number, field, "its path is absolute, has '..' or leads out of data.path")
    try:
        there = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered: the name itself is never quoted
        raise source.fault(number, field, f"the file can't be read ({error.strerror})") from None
    if not there:
        raise source.fault(number, field, "its path names no file beside the data file")
    try:
        return untrusted.read_bytes(path, MAX_PICTURE_BYTES)
    except UsageError:
        raise source.fault(number, field, f"the file is larger than {MAX_PICTURE_BYTES} bytes") from None
    except OSError as error:
        raise source.fault(number, field, f"the file can't be read ({error.strerror})") from None


def decode(source: Source, number: int, data: bytes, field: str = "image") -> Pixels:
    """Encoded picture -> uint8 (height, width, 3), upright, RGB. The size is checked before anything is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise source.fault(number, field, f"{width}x{height} pixels; at most {MAX_PIXELS} are accepted")
                too_much = source.decoded.add(len(data), 3 * width * height)
                if too_much is not None:
                    raise source.fault(number, field, too_much)
                if picture.mode in DEEP:
                    raise source.fault(number, field, f"{DEEP[picture.mode]} pixels; accepted: 8 bits a channel")
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise source.fault(number, field, f"more than {MAX_PIXELS} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error, MemoryError):
        accepted = ", ".join(FORMATS)
        raise source.fault(number, field, f"not a readable picture; accepted formats: {accepted}") from None


def content_sha256(pixels: Pixels) -> str:
    """Hash of what a picture shows: equal for the same pixels in any file format."""
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()
