"""Files are whole or absent: written under a temporary name in the same folder, fsynced, renamed, folder fsynced.

A process killed at any moment leaves either the old file or the new one, plus at most a temporary file that
`remove_leftovers` deletes. Every failure of the disk is one line (EnvironmentFailure).
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpaudit import untrusted, untrusted_tables
from dpaudit.documents import Document
from dpaudit.errors import EnvironmentFailure, UsageError

if TYPE_CHECKING:
    import pandas as pd
    import torch

_SUFFIX = ".dpaudit-tmp"
_DIGEST = "dpaudit-sha256"
_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "the folder does not exist",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "a folder of this name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file would be larger than this system allows",
    errno.ELOOP: "a symbolic link is in its place",
    errno.EMLINK: "it is a hard link: what is written here would change another file too",
    errno.ENXIO: "no ordinary file is in its place",
}


def failure(path: Path, error: OSError, verb: str = "written") -> EnvironmentFailure:
    """The one line for a file that can't be written (or read): which file, and why."""
    why = _WHY.get(error.errno or 0) or error.strerror or str(error)
    return EnvironmentFailure(f"{path}: can't be {verb}: {why}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems can't fsync a folder; the rename itself is atomic there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_ordinary(path: Path) -> None:
    """UsageError where something else than an ordinary file is at `path`: a rename would put a file in its place.

    A link is judged by what it leads to, and by where it lies: /dev/stdout is one that may well lead to an ordinary
    file, and `os.replace` would take it away for everybody.
    """
    if not path.name:
        raise UsageError(f"{path}: is no name of a file; accepted: the name of a new one")
    try:
        mode, place = path.stat().st_mode, path.parent.resolve()
    except (OSError, RuntimeError):
        return  # nothing there, or a reason that writing will name
    system = any(place.is_relative_to(folder) for folder in ("/dev", "/proc", "/sys"))
    if (system and not place.is_relative_to("/dev/shm")) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"{path}: is a device, pipe or socket; accepted: the name of a file")


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """A descriptor of one of our own files, such as a log: never through a link, never a device or a pipe.

    OSError as from `os.open`: ELOOP for a link, ENXIO for what is no ordinary file, EMLINK for one with further names.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    info = os.fstat(descriptor)
    wrong = errno.ENXIO if not stat.S_ISREG(info.st_mode) else errno.EMLINK if info.st_nlink > 1 else 0
    if wrong:
        os.close(descriptor)
        raise OSError(wrong, os.strerror(wrong), str(path))
    return descriptor


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield an empty temporary file of mode `mode` beside `path`; it becomes `path` when the block ends well.

    Raises EnvironmentFailure for every OSError inside the block; the temporary file is removed then. UsageError:
    `require_ordinary`.
    """
    require_ordinary(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}{_SUFFIX}")
    owner = -1
    try:
        _remove_abandoned(path)
        # The mode is there from the start: a secret is at no time readable by others. The descriptor stays open: its
        # lock tells other processes that somebody still writes here.
        owner = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with contextlib.suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise failure(path, error) from error
        raise
    finally:
        if owner >= 0:
            os.close(owner)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `replacing` has not finished."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def _remove_abandoned(path: Path) -> None:
    """Delete what a killed process left of an earlier attempt at the same file: nobody holds its lock any more."""
    for left in path.parent.glob(f".{glob.escape(path.name[:100])}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            descriptor = open_own(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """For libraries that write files of their own below `path`: their failures become one line, as ours do."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise failure(path, error) from error
    except SafetensorError as error:  # its wrapper around the operating system's error
        raise EnvironmentFailure(f"{path}: can't be written: {' '.join(str(error).split())}") from error


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write `content` to `path` atomically; `mode` is further limited by the umask."""
    with replacing(path, mode) as temporary, temporary.open("wb") as file:
        file.write(content)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode("utf-8"), mode)


def write_document(path: Path, document: Document) -> None:
    """Write a JSON document to `path` atomically."""
    write_text(path, document.to_json())


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None, mode: int = 0o644
) -> None:
    """Write tensors as safetensors to `path` atomically; any device, contiguous or not, shared memory or not.

    Their hash goes into the file's metadata, so that `tensors_intact` can tell a damaged file.
    """
    from safetensors.torch import save_file

    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights): each name gets its own copy.
        owned[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    metadata = {**(metadata or {}), _DIGEST: _tensor_digest(owned)}
    with replacing(path, mode) as temporary, writing(path):
        save_file(owned, temporary, metadata=metadata)


def _tensor_digest(tensors: "Mapping[str, torch.Tensor]") -> str:
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{len(name)}:{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def tensors_intact(path: Path) -> bool:
    """Whether a file of `write_tensors` can be read and holds the very tensors that were written."""
    from safetensors import SafetensorError

    try:
        with untrusted.open_tensors(path) as file:
            written = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError):
        return False
    return written is None or written == _tensor_digest(tensors)


def write_frame(path: Path, frame: "pd.DataFrame", mode: int = 0o644) -> None:
    """Write a data frame as Parquet to `path` atomically, without its index, with the hash of its content."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _DIGEST: _frame_digest(frame)})
    with replacing(path, mode) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_frame(path: Path) -> "pd.DataFrame":
    """Read what `write_frame` wrote. UsageError when it is missing, or not the content that was written."""
    import pyarrow

    try:
        table = untrusted_tables.read_arrow(path)
        frame: pd.DataFrame = table.to_pandas()
        written = (table.schema.metadata or {}).get(_DIGEST.encode(), b"").decode()
        if written != _frame_digest(frame):
            raise ValueError
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Arrow's own text may quote what it read, and a damaged schema fails in many ways.
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged: not the table that was written"
        raise UsageError(f"{path}: {what}") from None
    return frame


def _frame_digest(frame: "pd.DataFrame") -> str:
    import pandas as pd

    found = hashlib.sha256(repr([str(name) for name in frame.columns]).encode())
    found.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
    return found.hexdigest()


def append_line(path: Path, text: str) -> None:
    """Append one line to a log such as metrics.jsonl, in one write that has left the process when this returns.

    A last line that an earlier crash tore is cut off first, so that every line of the file stays whole.
    """
    if "\n" in text or "\r" in text:
        raise ValueError("append_line takes one line")
    try:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(descriptor)
            content = (text + "\n").encode("utf-8")
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise failure(path, error) from error


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(descriptor, start + newline + 1)
            return
        end = start
    os.ftruncate(descriptor, 0)


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Create a folder with its parents; an existing one stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=mode, exist_ok=True)
    except OSError as error:
        raise failure(path, error, "created") from error


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that a killed process left anywhere below `folder`; returns how many.

    Only the process that holds the run's lock may call this.
    """
    removed = 0
    for path in folder.rglob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file; EnvironmentFailure when it can't be read."""
    try:
        return untrusted.sha256(path)
    except OSError as error:
        raise failure(path, error, "read") from error
