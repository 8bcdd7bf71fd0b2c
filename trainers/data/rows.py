"""Rows and pictures from untrusted files: every value checked, every fault one line that names file, row and field.

The rows are private. So no message ever repeats a value from a row, not even a file name found in one; types, lengths
and limits are all that an error says.
"""

import base64
import binascii
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dpaudit import untrusted, untrusted_tables
from dpaudit.errors import UsageError, rejected
from trainers.data import pictures
from trainers.data.pictures import PLAINLY, Decoded, Look
from trainers.data.pictures import content_sha256 as content_sha256

Row = dict[str, Any]

MAX_PICTURE_BYTES = 1 << 26
MAX_LINE_BYTES = 1 << 27  # a JSONL row may carry its picture in base64
# Pictures of one table: a page of text in black and white packs 200-fold, one colour 1,000-fold and more.
MAX_DECODED, MAX_PICTURE_RATIO = 1 << 30, 400
MAX_REPEATED = 100  # a table whose rows name the same bytes again and again: above MAX_DECODED, at most so often
ROWS_AT_ONCE = 8  # of a Parquet file: one picture stored once and named by every row is copied for each of them
MAX_UNPACKED, MAX_RATIO = 1 << 28, 500  # a column of a Parquet file: above so many bytes, at most so much compressed
MAX_KEY = 1000  # characters of an identifier
MAX_CHARACTERS = {"question": 20_000, "answer": 20_000, "hint": 20_000, "kind": 100, "text": 200_000}


@dataclass
class Volume:
    """How much the pictures of one table take, in bytes: on disk, as the rows name them, and decoded."""

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
    """One data file. `label` is the name that the user gave; `root` is the folder that nothing may leave; `volume`
    counts its pictures, and those of the other files of its table."""

    path: Path
    label: str
    root: Path
    volume: Volume = field(default_factory=Volume, compare=False)

    def __post_init__(self) -> None:
        if not self.volume.stored and self.path.is_file():
            self.volume.stored = self.path.stat().st_size

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


def read_rows(
    source: Source, required: Iterable[str], optional: Iterable[str] | None = ()
) -> Iterator[tuple[int, Row]]:
    """Rows in file order with their number (from 1; the line number for JSONL), reduced to the columns named.

    optional: None takes all columns.

    Raises UsageError when the file is damaged or a required column is missing.
    """
    needed = list(required)
    reader = _parquet_rows if source.path.suffix.lower() == ".parquet" else _jsonl_rows
    wanted = None if optional is None else [*needed, *(name for name in optional if name not in needed)]
    return reader(source, needed, wanted)


def _jsonl_rows(source: Source, needed: list[str], wanted: list[str] | None) -> Iterator[tuple[int, Row]]:
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
                listed = number == 1 and line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"["
                hint = f"; a list? Rename it to {source.path.stem}.json" if listed else ""
                raise source.fault(number, "line", f"not a JSON object in UTF-8{hint}") from None
            if not isinstance(row, dict):
                raise source.fault(number, "line", f"must be a JSON object, got {type(row).__name__}")
            for name in needed:
                if name not in row:
                    raise source.fault(number, name, "missing")
            yield number, row if wanted is None else {name: row[name] for name in wanted if name in row}


def _parquet_rows(source: Source, needed: list[str], wanted: list[str] | None) -> Iterator[tuple[int, Row]]:
    import pyarrow

    try:
        with untrusted_tables.parquet_file(source.path) as file:
            present = list(file.schema_arrow.names)
            for name in needed:
                if name not in present:
                    raise UsageError(f"{source.label}: no column {name!r}; columns: {', '.join(present[:20])}")
            number = 0
            _no_bomb(source, file.metadata)
            chosen = present if wanted is None else [name for name in wanted if name in present]
            for batch in untrusted_tables.parquet_batches(file, chosen, ROWS_AT_ONCE):
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
    return checked(source, number, field, row.get(field), field)


def checked(source: Source, number: int, field: str, value: Any, like: str) -> str:
    """The same for a value that lies inside `field`; `like` names the column whose limit holds."""
    return verbatim(source, number, field, value, like).replace("\r\n", "\n").replace("\r", "\n").strip()


def verbatim(source: Source, number: int, field: str, value: Any, like: str) -> str:
    """The same with its line ends and the white space around it."""
    if value is None:
        raise source.fault(number, field, "missing")
    if not isinstance(value, str):
        raise source.fault(number, field, f"must be text, got {type(value).__name__}")
    limit = MAX_CHARACTERS[like]
    if len(value) > limit:
        raise source.fault(number, field, f"{len(value)} characters; at most {limit} are accepted")
    if not value.strip():
        raise source.fault(number, field, "empty")
    if any(unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t\r" for sign in value):
        raise source.fault(number, field, "contains a control character or half a surrogate pair")
    return value


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


def encoded(source: Source, number: int, value: Any, field: str, folder: Path) -> bytes:
    """The encoded picture that a value stands for: bytes, base64 in a JSON struct, or a file below `folder`."""
    return found(source, number, value, field, folder)[0]


def found(source: Source, number: int, value: Any, field: str, folder: Path) -> tuple[bytes, Path | None]:
    """The same with the file that holds nothing else, where there is one."""
    if isinstance(value, dict) and "bytes" not in value and "path" not in value and "url" in value:
        value = value["url"]
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
        if isinstance(data, str):
            value = _base64(source, number, field, data)
    if isinstance(value, str) and value.startswith("data:image/") and ";base64," in value[:64]:
        value = _base64(source, number, field, value.partition(";base64,")[2])
    file = value if isinstance(value, str) else None
    path = None
    if file is not None:
        value, path = _file_bytes(source, number, field, file, folder)
    if not isinstance(value, bytes):
        kind = "nothing" if value is None else type(value).__name__
        raise source.fault(number, field, f"must be bytes, a path or a struct of both, got {kind}")
    if not value:
        raise source.fault(number, field, "empty")
    if len(value) > MAX_PICTURE_BYTES:
        raise source.fault(number, field, f"{len(value)} bytes; at most {MAX_PICTURE_BYTES} are accepted")
    too_much = source.volume.name(len(value), file)
    if too_much is not None:
        raise source.fault(number, field, too_much)
    return value, path


def _base64(source: Source, number: int, field: str, data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise source.fault(number, field, "bytes are not base64") from None


def _file_bytes(source: Source, number: int, field: str, name: str, folder: Path) -> tuple[bytes, Path]:
    if name.startswith(("http://", "https://")):
        raise source.fault(number, field, "is a link to the web; download the pictures and name the files")
    path = inside(folder, name.removeprefix("file://"))
    if path is None or not path.is_relative_to(source.root):
        raise source.fault(number, field, "its path is absolute, has '..' or leads out of data.path")
    try:
        there = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered: the name itself is never quoted
        raise source.fault(number, field, f"the file can't be read ({error.strerror})") from None
    if not there:
        where = "beside the data file" if folder == source.path.parent else "in the folder of pictures"
        raise source.fault(number, field, f"its path names no file {where}")
    try:
        return untrusted.read_bytes(path, MAX_PICTURE_BYTES), path
    except UsageError:
        raise source.fault(number, field, f"the file is larger than {MAX_PICTURE_BYTES} bytes") from None
    except OSError as error:
        raise source.fault(number, field, f"the file can't be read ({error.strerror})") from None


def look_at(source: Source, number: int, data: bytes, look: Look = PLAINLY, field: str = "image") -> Decoded:
    """Encoded picture -> pixels; UsageError that names file, row and field."""
    try:
        return pictures.decode(data, look, source.volume.add)
    except pictures.Refused as why:
        raise source.fault(number, field, str(why)) from None
