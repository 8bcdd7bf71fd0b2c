"""Where a report may be written: never into what it reads, never two of its files into one."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dpaudit import atomic
from dpaudit.errors import UsageError

CONFIG, SWEEP = "config.yaml", "sweep.json"


def check(outputs: Sequence[tuple[str, Path | None]], subjects: Sequence[Path]) -> None:
    """UsageError for an output (flag, path) that lies inside a run, is an input, another output, or no ordinary file.

    Called before anything is read, so that a wrong path costs nothing. A symbolic link is judged by where it leads.
    """
    seen: dict[Path, str] = {}
    inputs = {subject.resolve() for subject in subjects}
    for flag, path in outputs:
        if path is None:
            continue
        atomic.require_ordinary(path)
        place = path.resolve()
        if place in inputs:
            raise UsageError(f"{flag} {path}: is what the report is made from; choose another file")
        if place in seen:
            raise UsageError(f"{flag} {path}: is the file of {seen[place]} too; choose another file")
        seen[place] = flag
        for folder in _owners(place, inputs):
            raise UsageError(
                f"{flag} {path}: lies inside {folder}, which is read or kept; choose a place outside of it"
            )


def _owners(place: Path, inputs: set[Path]) -> Iterator[Path]:
    """The parts of runs and the inputs' own folders that a place lies in. `place` is resolved."""
    for folder in place.parents:
        if folder.name in ("release", "private") and (folder.parent / "release" / CONFIG).is_file():
            yield folder
        if folder.name == "private" and (folder / "noise.key").exists():
            yield folder
        if folder in inputs and (folder / CONFIG).is_file():  # a release by itself
            yield folder
        if folder.name in ("runs", "logs") and (folder.parent / SWEEP).is_file():
            yield folder
    if place.name == SWEEP and place.exists():
        yield place.parent
