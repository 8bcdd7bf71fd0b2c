"""One folder of encoded pictures for all runs of a project, under its owner's control.

`DPAUDIT_FEATURES=FOLDER` names it; a sweep uses one in its own folder. Runs find there what another run on the same
pictures encoded with the same tower, reducer and settings, and leave there what they encode. Its files are noiseless
functions of private pictures (trainers.features), so the folder is closed to all others (mode 0700), refused inside a
release, and removed by `dpaudit features FOLDER --delete`.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dpaudit import atomic, folders, untrusted
from dpaudit.errors import UsageError

VARIABLE = "DPAUDIT_FEATURES"
SUFFIX = ".safetensors"


def named() -> Path | None:
    """The project's folder, made where it is missing; None where the user names none.

    UsageError for a link, a folder of somebody else or one that others can open, and one inside a release.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    place = Path(given).expanduser()
    require_own(place)
    atomic.make_folder(place, mode=0o700)
    require_own(place)
    return place


def require_own(place: Path) -> None:
    """UsageError unless `place` is nothing yet, or a folder of this user that is closed to all others."""
    kind = folders.kind(place)
    if kind not in ("folder", "nothing"):
        raise UsageError(f"{VARIABLE}: {place} is {kind}; accepted: a folder of your own")
    for parent in (place.absolute(), *place.absolute().parents):
        if parent.name == "release" and (parent / "config.yaml").is_file():
            raise UsageError(f"{VARIABLE}: {place} lies in a release, which may be handed over; accepted: elsewhere")
    if kind == "nothing":
        return
    info = place.lstat()
    if info.st_uid != os.geteuid():
        raise UsageError(f"{VARIABLE}: {place} belongs to another user; accepted: a folder of your own")
    if stat.S_IMODE(info.st_mode) & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        raise UsageError(f"{VARIABLE}: {place} has mode {mode:04o}, so others may read it; accepted: 0700")


@contextmanager
def shared(place: Path | None) -> Iterator[None]:
    """`place` as the project's folder while this lasts, where the user has named none."""
    if place is None or os.environ.get(VARIABLE):
        yield
        return
    os.environ[VARIABLE] = str(place)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


@dataclass(frozen=True)
class Part:
    """The files that were made with one tower, reducer and settings."""

    settings: str
    files: tuple[Path, ...]
    pictures: int
    size: int  # bytes


def parts(place: Path) -> tuple[Part, ...]:
    """What a project's folder holds. UsageError where anything in it is not a feature file of dpaudit."""
    require_own(place)
    found = []
    for folder in folders.entries(place):
        if folders.kind(folder) != "folder":
            raise UsageError(f"{folder}: is no folder of feature files; {place} is not a folder of encoded pictures")
        files = [path for path in folders.entries(folder) if not atomic.is_temporary(path.name)]
        pictures = sum(_pictures(path) for path in files)
        found.append(Part(folder.name, tuple(files), pictures, sum(path.lstat().st_size for path in files)))
    return tuple(found)


def _pictures(path: Path) -> int:
    if folders.kind(path) != "file" or path.suffix != SUFFIX:
        raise UsageError(f"{path}: is no feature file, so nothing here is touched")
    try:
        with untrusted.open_tensors(path) as file:
            named = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: can't be read as a feature file, so nothing here is touched") from error
    if not str(named.get("format", "")).startswith("dpaudit-features"):
        raise UsageError(f"{path}: is no feature file, so nothing here is touched")
    return len(str(named.get("pictures", "")).split(","))


def delete(place: Path) -> tuple[Part, ...]:
    """Remove every feature file of a project's folder, and the folder; returns what was there.

    All is looked at before anything is removed: a folder with anything else in it stays as it is.
    """
    held = parts(place)
    for part in held:
        for path in folders.entries(place / part.settings):
            path.unlink(missing_ok=True)
        (place / part.settings).rmdir()
    if place.is_dir():
        place.rmdir()
    return held
