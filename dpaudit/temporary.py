"""Folders in the system's temporary directory that don't outlive their process for long.

A process that is killed can't remove what it made there: payloads that name folders of the machine, logs, downloads,
parameters of a trainer. So its folder is held by a lock, which dies with the process, and the next command of dpaudit
removes what nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "dpaudit-"
USES = ("jobs", "ray", "hub", "check")


@contextlib.contextmanager
def folder(use: str) -> Iterator[Path]:
    """A new folder of mode 0700, removed in the end; abandoned ones of this user are removed first. use: of USES."""
    if use not in USES:
        raise ValueError(f"{use!r} is not one of {USES}")
    remove_abandoned()
    made, descriptor = _made(use)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def _made(use: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock. Between the two somebody may take it for abandoned; then
    another is made."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{use}-"))
        try:
            descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # some network file systems have no locks: then nothing is ever swept
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(made), os.fstat(descriptor)):  # still there, and nobody else's to remove
                return made, descriptor
        os.close(descriptor)


def remove_abandoned() -> int:
    """Remove folders that killed processes of this user have left; returns how many."""
    removed = 0
    wanted = tuple(f"{PREFIX}{use}-" for use in USES)
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(wanted):
                with contextlib.suppress(OSError):
                    removed += _remove(Path(entry.path))
    return removed


def _remove(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o700:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        return True
    finally:
        os.close(descriptor)
