"""Folders in the system's temporary directory that don't outlive their process for long.

A process that is killed can't remove what it made there: payloads that name folders of the machine, logs, downloads. So
its folder is held by a lock, which dies with the process, and whoever makes the next one removes what nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "dpaudit-"
USES = ("jobs", "ray", "hub", "check")
SETTLED = 60.0  # seconds after which a folder without a lock is an abandoned one, not one that is just being made


@contextlib.contextmanager
def folder(use: str) -> Iterator[Path]:
    """A new folder of mode 0700, removed in the end; abandoned ones of this user are removed first. use: of USES."""
    if use not in USES:
        raise ValueError(f"{use!r} is not one of {USES}")
    remove_abandoned()
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{use}-"))
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then nothing is ever swept
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned() -> int:
    """Remove folders that killed processes of this user have left; returns how many."""
    removed = 0
    for use in USES:
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}{use}-*"):
            with contextlib.suppress(OSError):
                removed += _remove(path)
    return removed


def _remove(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o700 or time.time() - info.st_ctime < SETTLED:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        return True
    finally:
        os.close(descriptor)
