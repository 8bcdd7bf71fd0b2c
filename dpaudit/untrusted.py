"""The one door for files that somebody else may have made: ordinary files of a sensible size, nothing ever executed.

A configuration, a document, a score file, a data set, a model or a run folder comes from a colleague, a download or a
CI job. A device or a pipe in its place would be read for ever, a file of gigabytes (or one that unpacks to gigabytes)
would fill the memory before its first line is looked at. Every module opens such files through the functions here
(tests/test_one_door.py looks for any other way), each with a limit of its own:

    open_regular, read_bytes, read_text, read_json    any file, whole
    tensor_shapes, open_tensors, read_tensors         safetensors
    dpaudit.untrusted_tables                          tables: Parquet, Arrow, CSV, npz
    sha256                                            hashes
    part_of                                           a file inside a folder that was handed over
    bounded_memory, bounded_work                      upper limits for what a decoder or a library may take

Symbolic links: a path that the auditor typed may be one. Inside a folder that was handed over a link is followed only
where it stays in that folder, or leads from a Hugging Face snapshot to the blobs beside it (`part_of`).
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dpaudit.errors import UsageError

if TYPE_CHECKING:
    import torch

MOST_CONFIGURATION = 1 << 17  # bytes of a YAML file: a long one has ten thousand, and YAML takes seconds a megabyte
MOST_DOCUMENT = 1 << 25  # bytes of a JSON document: the largest of ours, a gallery, has a million
MOST_SETTINGS = 1 << 24  # bytes of a JSON file that describes a model or its tokenizer's settings
MOST_LOG = 1 << 28  # bytes of a log of steps: a hundred bytes a step
MOST_HEADER = 1 << 24  # bytes of the header of a safetensors file: a hundred a tensor
MOST_TENSORS = 100_000  # of one file: a model of 70 billion parameters has a thousand
MOST_RELEASED = 1 << 32  # bytes of one file of a run's model: an adapter of rank 256 on 7 billion parameters has half
MOST_DECODED = 3 << 29  # bytes that a decoder may take beyond what the process has: 1.5 GiB
MOST_OPENED = 1 << 30  # bytes that a library may take for the settings of a model, before any weight is read
MOST_SECONDS = 45  # of processor time for the same: the largest tokenizers take three

_LARGE = 1 << 26  # bytes from which a file with holes is refused
_DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_SNAPSHOT = re.compile(r"(models|datasets)--[^/]+")


def open_regular(path: Path, most: int | None = None, *, links: bool = True) -> io.BufferedReader:
    """An ordinary file, opened for reading; the caller closes it.

    most: bytes that it may have. links: whether `path` itself may be a symbolic link. Raises UsageError for anything
    else that exists (a device, a pipe, a socket, too large a file, a large one that consists of holes), OSError where
    there is nothing to read. What was checked is the very file that was opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not links and path.is_symlink():
            raise UsageError(f"{path}: is a symbolic link; accepted: the file itself") from None
        if error.errno == errno.ENXIO:  # a socket
            raise UsageError(f"{path}: is no ordinary file") from None
        raise
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        if not stat.S_ISREG(info.st_mode):
            raise UsageError(f"{path}: is no ordinary file")
        if most is not None and info.st_size > most:
            raise UsageError(f"{path}: larger than {shown(most)}, which no such file is")
        if info.st_size > _LARGE and _data(descriptor, info.st_size) < info.st_size // 2:
            raise UsageError(f"{path}: consists mostly of holes (a sparse file); accepted: files that hold data")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def shown(size: int) -> str:
    """A size in words."""
    return f"{size >> 30} GB" if size >= 1 << 30 else f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _data(descriptor: int, size: int) -> int:
    """Bytes before the first hole and in the next thousand pieces; `size` where the file system tells nothing."""
    total = at = 0
    try:
        for _ in range(1000):
            at = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            total, at = total + end - at, end
            if at >= size:
                break
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data behind `at`
            total = size
    except AttributeError:  # a system without holes
        total = size
    with contextlib.suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
    return total


def read_bytes(path: Path, most: int, *, links: bool = True) -> bytes:
    """The content of an ordinary file of at most `most` bytes; see `open_regular`. Checked again while reading, since a
    file may grow."""
    with open_regular(path, most, links=links) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UsageError(f"{path}: larger than {shown(most)}, which no such file is")
    return content


def read_text(path: Path, most: int, *, errors: str = "strict", links: bool = True) -> str:
    """The same as text in UTF-8. ValueError where it is none."""
    return read_bytes(path, most, links=links).decode("utf-8", errors)


def parse_json(content: str | bytes) -> Any:
    """JSON; ValueError for everything else, also where it nests too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, most: int = MOST_DOCUMENT, *, links: bool = True) -> Any:
    """A JSON file; ValueError where it is none."""
    return parse_json(read_bytes(path, most, links=links))


def sha256(path: Path, most: int | None = None, *, links: bool = True) -> str:
    """Hex SHA-256 of a file."""
    with open_regular(path, most, links=links) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(folder: Path, name: str) -> Path:
    """`folder / name`, where it is a file of that folder: UsageError for a link that leads elsewhere, and for anything
    that is no ordinary file; FileNotFoundError where there is nothing.

    A snapshot of Hugging Face's cache (models--ORG--NAME/snapshots/REVISION) consists of links to ../../blobs.
    """
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
    except (RuntimeError, ValueError):  # a loop of links, a name with a NUL
        raise UsageError(f"{path}: leads nowhere") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path}: leads nowhere") from None
        raise
    homes = [home]
    if home.parent.name == "snapshots" and _SNAPSHOT.fullmatch(home.parents[1].name):
        homes.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(one) for one in homes):
        raise UsageError(f"{path}: is a symbolic link that leads out of its folder")
    if not stat.S_ISREG(target.stat().st_mode):
        raise UsageError(f"{path}: is no ordinary file")
    return path


# -- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded_memory(extra: int = MOST_DECODED) -> Iterator[None]:
    """While it lasts the process can take `extra` bytes more than it has, then allocations fail (MemoryError).

    Where the system has no such limit (macOS) nothing is limited. For decoders of foreign bytes on the main thread.
    """
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = now + extra
        if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
            wanted = soft if soft != resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _OutOfTime(BaseException):
    """Beyond `except Exception` of whatever library is at work."""


def _stop(number: int, frame: object) -> NoReturn:
    raise _OutOfTime


@contextlib.contextmanager
def bounded_work(seconds: int = MOST_SECONDS, extra: int = MOST_OPENED) -> Iterator[None]:
    """While it lasts, libraries work on foreign settings within `bounded_memory` and `seconds` of processor time.

    ValueError beyond either. A count in a configuration may ask for a table of a thousand million entries. What ends it
    is an interval timer, between two steps of Python; it needs the main thread, elsewhere only memory is limited.
    """
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "ITIMER_VIRTUAL")
    timed = timed and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0  # somebody else's
    before = signal.signal(signal.SIGVTALRM, _stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        with bounded_memory(extra):
            yield
    except _OutOfTime:
        raise ValueError(f"it takes more than {seconds} s of processor time") from None
    except MemoryError:
        raise ValueError(f"it takes more than {shown(extra)} of memory before any weight is read") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


# -- safetensors -----------------------------------------------------------------------------------------------------


def tensor_shapes(path: Path, most: int | None = None, *, links: bool = True) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file, from its header alone. ValueError for a file that is none,
    or not whole: the tensors must fill the file exactly, one behind the other."""
    with open_regular(path, most, links=links) as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MOST_HEADER, total - 8):
            raise ValueError("no header of safetensors")
        tree = parse_json(file.read(size))
    if not isinstance(tree, dict) or len(tree) > MOST_TENSORS:
        raise ValueError(f"its header is no list of at most {MOST_TENSORS} tensors")
    tree.pop("__metadata__", None)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans = []
    for name, entry in tree.items():
        kind, shape, (start, end) = _entry(entry)
        if end - start != math.prod(shape) * _DTYPES[kind]:
            raise ValueError("a tensor does not fill its place")
        spans.append((start, end))
        found[name] = (kind, shape)
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise ValueError("tensors overlap or leave gaps")
        at = end
    if at != total - 8 - size:
        raise ValueError("cut off, or longer than its tensors")
    return found


def _entry(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Type, shape and place of one tensor in the header."""
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        raise ValueError("damaged header")
    shape, place = (_sizes(entry.get(name)) for name in ("shape", "data_offsets"))
    if len(place) != 2:
        raise ValueError("damaged header")
    return str(entry["dtype"]), shape, place


def _sizes(value: Any) -> tuple[int, ...]:
    """At most 16 whole numbers."""
    listed = value if isinstance(value, list) and len(value) <= 16 else [None]
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in listed):
        raise ValueError("damaged header")
    return tuple(listed)


@contextlib.contextmanager
def open_tensors(path: Path, most: int | None = None, *, links: bool = True) -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it, for torch; ValueError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    tensor_shapes(path, most, links=links)
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(" ".join(str(error).split())[:80]) from None
    with file as opened:
        yield opened


def read_tensors(path: Path, most: int | None = None, *, links: bool = True) -> "dict[str, torch.Tensor]":
    """All tensors of a safetensors file. ValueError for a file that is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensor_shapes(path, most, links=links)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(" ".join(str(error).split())[:80]) from None


def platform_has_limits() -> bool:
    """Whether `bounded_memory` limits anything here."""
    return sys.platform.startswith("linux")
