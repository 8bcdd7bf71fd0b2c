"""A process that dies at its n-th write: every place where a command writes, counted, and a fault at each of them.

A *site* is one call that changes the file system below the watched folders: opening a file for writing, writing to a
descriptor, fsync, rename, removal, truncation, making a folder. Python's own audit events show them, whatever module or
library makes the call; native writers (safetensors, Arrow) are bracketed by the opening and the rename of their
temporary file. What happens at site n:

- `kill`: SIGKILL just before it.
- `torn`: SIGKILL halfway: half of a write arrived, a file that was to be fsynced has lost its second half, a file that
  was to be opened for writing has a few bytes of rubbish.
- `full`: the call fails as on a full disk (ENOSPC), and so does every later one that needs room.

Each command runs in a fork of a process that has imported everything already, so a case costs its own work only.
"""

import contextlib
import errno
import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

Kind = Literal["none", "kill", "torn", "full"]
RANDOM = re.compile(
    r"\.[0-9a-f]{12}\.dpaudit-tmp$|(?<=benchmark-)[a-z0-9_]{8}|(?<=dpaudit-jobs-)[a-z0-9_]{8}"
    r"|(?<=dpaudit-faults-)[a-z0-9_]{8}|(?<=/default-)[0-9a-f]{16}|(?<=_default-)[0-9a-f]{16}"  # Arrow's, of lmms-eval
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEEDS_ROOM = ("open", "write", "fsync", "mkdir", "rename")
WARM = (
    "torch", "transformers.models.llava.modeling_llava", "peft", "opacus", "pyarrow.parquet", "pandas",
    "sklearn.datasets", "dp_accounting", "attacks.audit", "attacks.training", "attacks.fusion.audit",
    "attacks.games.twins", "attacks.external.trainer", "reports.html", "reports.benchmark", "dpaudit.cli.app",
    "dpaudit.cli.train", "dpaudit.cli.audit", "dpaudit.cli.report", "dpaudit.cli.benchmark",
)  # fmt: skip


def warm_up() -> None:
    """Import what the commands need, so that a fork starts at once. One thread: nothing is lost in a fork."""
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)


@dataclass(frozen=True)
class Site:
    """One write: what kind of call, on which file (relative to the watched folder, random parts cut)."""

    call: str
    path: str


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: exit code, or minus the signal. sites: the writes it made (or began)."""

    code: int
    out: str
    err: str
    sites: tuple[Site, ...]
    foreign: tuple[str, ...]  # files that were opened for writing outside the watched folders
    memory: int = 0  # bytes at most, the libraries included

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


class _Watch:
    """Counts the sites of this process and does what is asked at the n-th."""

    def __init__(self, folders: Sequence[Path], kind: Kind, at: int, log: int, skip: str | None) -> None:
        self.folders = [str(folder.resolve()) for folder in folders]
        self.kind, self.at, self.log = kind, at, log
        self.skip = re.compile(skip) if skip else None
        self.count = 0
        self.full = False
        self.busy = False
        self.owner = os.getpid()

    def inside(self, path: str) -> str | None:
        for folder in self.folders:
            if path == folder or path.startswith(folder + os.sep):
                return os.path.relpath(path, folder)
        return None

    def tell(self, entry: dict[str, Any]) -> None:
        _write(self.log, (json.dumps(entry) + "\n").encode())

    def site(self, call: str, path: str, torn: Callable[[], None] | None = None) -> None:
        """One write is about to happen."""
        if self.busy or os.getpid() != self.owner:
            return
        relative = self.inside(path)
        if relative is None:
            if call == "open" and not path.startswith(("/dev/", "/proc/")):
                self.tell({"foreign": path})
            return
        name = RANDOM.sub("*", relative)
        if self.skip is not None and self.skip.search(name):
            return
        self.tell({"call": call, "path": name})
        at, self.count = self.count, self.count + 1
        if self.full and call in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if at != self.at:
            return
        self.busy = True
        if self.kind == "torn" and torn is not None:
            torn()
        if self.kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.busy = False
        if self.kind == "full":
            self.full = True
            if call in NEEDS_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        if self.busy or event not in _EVENTS:
            return
        self.busy, found = True, _EVENTS[event](arguments)
        self.busy = False
        if found is not None:
            self.site(*found)


def _path(value: Any, folder: Any = -1) -> str | None:
    if isinstance(value, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{value}")
        return None
    text = os.fsdecode(value)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        with contextlib.suppress(OSError):
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    # The folder is resolved, the last part is not: a link is removed or replaced as a link.
    head, tail = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(head), tail)


def _opened(arguments: tuple[Any, ...]) -> tuple[str, str, Callable[[], None] | None] | None:
    name, _, flags = arguments
    if (
        isinstance(name, int)
        or not isinstance(flags, int)
        or not flags & WRITING
        or flags & os.O_TMPFILE == os.O_TMPFILE
    ):
        return None
    path = _path(name)

    def torn() -> None:
        if path is not None and not flags & os.O_APPEND and (flags & os.O_TRUNC or not os.path.exists(path)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            _write(descriptor, b'{"torn')

    return None if path is None else ("open", path, torn)


def _plain(call: str) -> Callable[[tuple[Any, ...]], tuple[str, str, None] | None]:
    def found(arguments: tuple[Any, ...]) -> tuple[str, str, None] | None:
        folder = arguments[-1] if call in ("mkdir", "remove", "rmdir") else -1
        path = _path(arguments[0], folder)
        return None if path is None else (call, path, None)

    return found


def _renamed(arguments: tuple[Any, ...]) -> tuple[str, str, None] | None:
    path = _path(arguments[1], arguments[3] if len(arguments) > 3 else -1)
    return None if path is None else ("rename", path, None)


_EVENTS: dict[str, Callable[[tuple[Any, ...]], tuple[str, str, Callable[[], None] | None] | None]] = {
    "open": _opened,
    "os.rename": _renamed,
    "os.remove": _plain("remove"),
    "os.rmdir": _plain("rmdir"),
    "os.mkdir": _plain("mkdir"),
    "os.truncate": _plain("truncate"),
    "os.symlink": _plain("symlink"),
    "os.link": _plain("link"),
}
_write, _fsync = os.write, os.fsync


def _install(watch: _Watch) -> None:
    """Audit events, and the calls that have none: write and fsync on a descriptor."""

    def write(descriptor: int, content: bytes) -> int:
        path = _path(descriptor)
        if path is not None:
            watch.site("write", path, lambda: _write(descriptor, bytes(content)[: len(content) // 2]))  # type: ignore[arg-type, return-value]
        return _write(descriptor, content)

    def fsync(descriptor: int) -> None:
        path = _path(descriptor)
        if path is not None and os.path.isfile(path):
            watch.site("fsync", path, lambda: os.truncate(path, os.path.getsize(path) // 2))
        _fsync(descriptor)

    os.write, os.fsync = write, fsync  # type: ignore[assignment]
    sys.addaudithook(watch.audit)


def run(
    arguments: Sequence[str],
    folders: Sequence[Path],
    scratch: Path,
    *,
    kind: Kind = "none",
    at: int = -1,
    skip: str | None = None,
    prepare: Callable[[], object] | None = None,
    timeout: int = 1800,
) -> Ended:
    """Run `dpaudit ARGUMENTS` in a fork and do `kind` at its site number `at` (from 0).

    folders: what is watched. scratch: where output goes, outside of them. skip: sites whose relative path matches are
    not counted. prepare: called in the fork before the command, e.g. to set limits.
    """
    names = [scratch / name for name in ("out", "err", "sites")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(arguments, folders, names, kind, at, skip, prepare, timeout)
    _, status, usage = os.wait4(child, 0)
    out, err, log = (path.read_text(encoding="utf-8", errors="replace") for path in names)
    entries = [json.loads(line) for line in log.splitlines()]
    return Ended(
        os.waitstatus_to_exitcode(status),
        out,
        err,
        tuple(Site(entry["call"], entry["path"]) for entry in entries if "call" in entry),
        tuple(entry["foreign"] for entry in entries if "foreign" in entry),
        usage.ru_maxrss << 10,
    )


def _child(
    arguments: Sequence[str],
    folders: Sequence[Path],
    names: Sequence[Path],
    kind: Kind,
    at: int,
    skip: str | None,
    prepare: Callable[[], object] | None,
    timeout: int,
) -> NoReturn:
    code = 99
    try:
        out, err, log = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for path in names)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # not those of pytest
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout)
        sys.argv = ["dpaudit", *arguments]
        from dpaudit.cli.app import run as command

        if prepare is not None:
            prepare()
        _install(_Watch(folders, kind, at, log, skip))
        code = command(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
