"""Folders that somebody else may have prepared: ordinary files and folders, or refused."""

import contextlib
import stat
from pathlib import Path

from dpaudit import atomic
from dpaudit.errors import UsageError

MOST_DEEP = 4  # folders above a file of a release
MOST_FILES = 200_000  # in a part; a run of many references has a few thousand


def require_plain(folder: Path) -> None:
    """UsageError unless `folder` and all below it are ordinary files and folders: no links, devices, pipes, sockets.

    A folder that somebody else prepared could otherwise have other files read into a page, truncated or overwritten.
    A folder that is not there is fine.
    """
    found = kind(folder)
    if found == "nothing":
        return
    if found != "folder":
        raise UsageError(f"{folder}: is {found}; accepted in a run: ordinary files and folders")
    waiting, count = [folder], 0
    while waiting:
        for entry in entries(waiting.pop()):
            count += 1
            found = kind(entry)
            if found == "folder":
                waiting.append(entry)
            elif found not in ("file", "nothing"):
                raise UsageError(f"{entry}: is {found}; accepted in a run: ordinary files and folders")
        if count > MOST_FILES:
            raise UsageError(f"{folder}: holds more than {MOST_FILES:,} files, which no run does")


def kind(path: Path) -> str:
    """What is at a path, in words: file, folder, a symbolic link, a device …, nothing. Links are not followed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # or removed meanwhile by another process
        return "nothing"
    except OSError as error:
        raise atomic.failure(path, error, "read") from error
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    names = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"))
    return next((name for test, name in names if test(mode)), "a device, pipe or socket")


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise atomic.failure(folder, error, "read") from error


def ordinary(folder: Path, name: str) -> Path | None:
    """The ordinary file that a list of somebody else's names below `folder`; None for any other name.

    No part of the name is a link or leads upwards, so nothing outside is looked at.
    """
    parts = name.split("/")
    if len(parts) > MOST_DEEP or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        return None
    place = folder
    for part in parts[:-1]:
        place /= part
        if kind(place) != "folder":
            return None
    place /= parts[-1]
    return place if kind(place) == "file" else None


def require_outside_runs(flag: str, path: Path) -> None:
    """UsageError for a place of results inside a part of a run: what lies there is that run's own.

    Links are followed, and the place need not exist.
    """
    place = path.resolve()
    for part in (place, *place.parents):
        of_run = part.name in ("release", "private") and kind(part.parent / "release" / "config.yaml") == "file"
        if of_run or (part.name == "private" and kind(part / "noise.key") == "file"):
            raise UsageError(f"{flag} {path}: lies inside {part}, a part of a run; choose a place outside of it")


def require_outside(flag: str, path: Path, *handed: str) -> None:
    """UsageError for a place of results inside a folder that is read. Links are followed.

    handed: paths of folders, or ids of a hub, which are nowhere.
    """
    place = path.resolve()
    for name in handed:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # no such place: told where it is opened
            folder = Path(name).expanduser()
            if folder.is_dir() and place.is_relative_to(folder.resolve()):
                raise UsageError(f"{flag} {path}: lies inside {folder}, which is read; choose a place outside of it")


def require_own(place: Path) -> None:
    """UsageError unless a twin's place is free or an ordinary folder: through a link another run would be trained."""
    found = kind(place)
    if found not in ("folder", "nothing"):
        raise UsageError(f"{place}: is {found}; accepted for a twin: an ordinary folder of the run, or nothing")
