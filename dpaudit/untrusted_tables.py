"""Tables that somebody else may have made: Parquet, Arrow's streaming format, CSV and .npz, through dpaudit.untrusted.

    parquet_file, parquet_batches, read_arrow, read_parquet    Parquet
    arrow_stream, arrow_rows                                   tables as datasets.save_to_disk writes them
    read_csv, read_npz                                         text and numpy's archives, whole

Every decoder runs within `bounded_memory`, and ValueError is all that a bad file raises.
"""

import contextlib
import csv
import io
import lzma
import math
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpaudit.untrusted import bounded_memory, open_regular, read_bytes, shown

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow
    import pyarrow.parquet

MOST_TABLE = 1 << 28  # bytes that a table of ids, coins and scores may take once it is unpacked: millions of rows
MOST_CSV = 1 << 26  # bytes of a table as text: two million rows; Parquet takes more
MOST_LINE = 1 << 16  # bytes of a line of it
MOST_NAMES = 1000  # columns of it
MOST_COLUMNS = 10_000
READ_AT_ONCE = 1 << 20  # bytes; by default Arrow reads a file's whole columns before it hands out the first row


@contextlib.contextmanager
def parquet_file(path: Path, *, links: bool = True) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """A Parquet file with at most MOST_COLUMNS columns; ValueError where it is none. Nothing but its footer is read."""
    import pyarrow
    import pyarrow.parquet

    with open_regular(path, links=links) as raw:
        try:
            with bounded_memory():
                file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=READ_AT_ONCE)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            raise ValueError("not a readable Parquet file") from error
        with file:
            if file.metadata.num_columns > MOST_COLUMNS:
                raise ValueError(f"more than {MOST_COLUMNS} columns")
            yield file


def parquet_batches(
    file: "pyarrow.parquet.ParquetFile", columns: Sequence[str] | None, rows: int
) -> "Iterator[pyarrow.RecordBatch]":
    """The rows of a file in pieces, each decoded within `bounded_memory`; ValueError for a file that can't be read."""
    import pyarrow

    batches = file.iter_batches(batch_size=rows, columns=columns)
    while True:
        try:
            with bounded_memory():
                batch = next(batches, None)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            raise ValueError("not a readable Parquet file") from error
        if batch is None:
            return
        yield batch


def read_arrow(
    path: Path, columns: Sequence[str] | None = None, *, most: int = MOST_TABLE, links: bool = True
) -> "pyarrow.Table":
    """A Parquet file as a table of at most `most` bytes, its metadata with it; ValueError for anything else.

    Read in pieces, since a column of a megabyte may unpack to gigabytes (one value named by every row). columns: those
    of them that the file has; None: all.
    """
    import pyarrow

    batches, taken = [], 0
    try:
        with parquet_file(path, links=links) as file:
            schema = file.schema_arrow
            chosen = None if columns is None else [name for name in columns if name in schema.names]
            groups = (file.metadata.row_group(at) for at in range(file.metadata.num_row_groups))
            if sum(group.total_byte_size for group in groups) > most and columns is None:
                raise ValueError(f"its columns unpack to more than {shown(most)}")
            for batch in parquet_batches(file, chosen, 256):
                taken += batch.nbytes
                if taken > most:
                    raise ValueError(f"it unpacks to more than {shown(most)}")
                batches.append(batch)
            if chosen is not None:
                schema = pyarrow.schema([schema.field(name) for name in chosen], metadata=schema.metadata)
        return pyarrow.Table.from_batches(batches, schema=batches[0].schema if batches else schema)
    except (pyarrow.ArrowException, OSError, MemoryError, TypeError, KeyError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise ValueError("not a readable Parquet file") from None


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, *, most: int = MOST_TABLE, links: bool = True
) -> "pd.DataFrame":
    """The same as a data frame."""
    import pyarrow

    table = read_arrow(path, columns, most=most, links=links)
    try:
        frame: pd.DataFrame = table.to_pandas()
    except (pyarrow.ArrowException, TypeError, KeyError, AttributeError, MemoryError):
        raise ValueError("not a readable Parquet file") from None
    return frame


@contextlib.contextmanager
def arrow_stream(path: Path, *, links: bool = True) -> "Iterator[pyarrow.RecordBatchStreamReader]":
    """A file of Arrow's streaming format with at most MOST_COLUMNS columns; ValueError where it is none."""
    import pyarrow

    with open_regular(path, links=links) as raw:
        try:
            with bounded_memory():
                stream = pyarrow.ipc.open_stream(raw)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            raise ValueError("not a readable Arrow file") from error
        with stream:
            if len(stream.schema) > MOST_COLUMNS:
                raise ValueError(f"more than {MOST_COLUMNS} columns")
            yield stream


def arrow_rows(
    stream: "pyarrow.RecordBatchStreamReader", columns: Sequence[str] | None, rows: int
) -> Iterator[dict[str, Any]]:
    """The rows of a stream, made `rows` at a time within `bounded_memory`; ValueError for what can't be read.

    Unlike Parquet, the format gives places in memory: they are checked before any is looked up. columns: those of them
    that the file has; None: all.
    """
    import pyarrow

    while True:
        try:
            with bounded_memory():
                batch = next(stream, None)
                if batch is not None:
                    batch = batch.select([name for name in batch.schema.names if columns is None or name in columns])
                    batch.validate(full=True)
        except (pyarrow.ArrowException, OSError, MemoryError, TypeError, KeyError) as error:
            raise ValueError("not a readable Arrow file") from error
        if batch is None:
            return
        for at in range(0, batch.num_rows, rows):
            try:
                with bounded_memory():
                    made: list[dict[str, Any]] = batch.slice(at, rows).to_pylist()
            except (pyarrow.ArrowException, MemoryError, TypeError, KeyError, OverflowError) as error:
                raise ValueError("not a readable Arrow file") from error
            yield from made


def read_csv(path: Path, **options: Any) -> "pd.DataFrame":
    """A table as text, at most MOST_CSV bytes in lines of MOST_LINE; ValueError (pandas' own included) where it is
    none, or has a row with more values than its header."""
    import pandas as pd

    content = read_bytes(path, MOST_CSV)
    if re.search(rb"[^\r\n]{%d}" % MOST_LINE, content):
        raise ValueError(f"a line of more than {MOST_LINE} bytes")
    first = re.split(rb"[\r\n]", content, maxsplit=1)[0]
    if first.count(b",") >= MOST_NAMES:
        raise ValueError(f"more than {MOST_NAMES} columns")
    try:
        header = next(csv.reader([first.decode("utf-8", "replace").lstrip("\ufeff")]), [])
    except csv.Error as error:
        raise ValueError(f"no table of text: {error}") from None
    names = [name.strip() for name in header]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # pandas would rename the second
        raise ValueError(f"column {twice!r} occurs {names.count(twice)} times")
    try:
        with bounded_memory(), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame: pd.DataFrame = pd.read_csv(io.BytesIO(content), index_col=False, **options)
    except pd.errors.ParserWarning:
        raise ValueError("rows with more values than the header has names") from None
    except (MemoryError, RecursionError, OverflowError):
        raise ValueError("too large a table") from None
    return frame


def read_npz(path: Path, *, most: int = MOST_TABLE) -> "dict[str, npt.NDArray[Any]]":
    """The arrays of an .npz file by name, together at most `most` bytes; ValueError where it is none. Objects, which
    would be unpickled, are refused."""
    content = read_bytes(path, most)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            if len(parts) > MOST_NAMES:
                raise ValueError(f"more than {MOST_NAMES} arrays")
            if sum(part.file_size for part in parts) > most:
                raise ValueError(f"it unpacks to more than {shown(most)}")
            return {part.filename.removesuffix(".npy"): _npy(archive.read(part)) for part in parts}
    except (
        zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, SyntaxError, OverflowError, MemoryError,
        RecursionError, RuntimeError, lzma.LZMAError, tokenize.TokenError,
    ):  # fmt: skip
        raise ValueError("not a readable .npz file") from None


def _npy(content: bytes) -> "npt.NDArray[Any]":
    """One array in numpy's own format; its header may promise no more than there is."""
    from numpy.lib import format as npy

    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("an array in an unknown version of numpy's format")
    shape, _, kind = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if kind.hasobject or kind.fields is not None or kind.subdtype is not None:
        raise ValueError("an array of objects or records; accepted: numbers, truth values and text")
    if math.prod(shape) * kind.itemsize != len(content) - stream.tell():
        raise ValueError("an array that is cut off")
    stream.seek(0)
    array: npt.NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    return array
