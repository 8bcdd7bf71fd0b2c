"""A page that is written again whenever what it shows has changed: for a sweep or an audit that still runs."""

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpaudit.atomic import is_temporary
from dpaudit.errors import DpauditError
from reports.subjects import SWEEP
from reports.sweep.layout import RUNS
from reports.writing import Request, Written, check, write

EVERY = 1.0  # seconds between looks: a document is written seldom, a page takes about a second
Marks = frozenset[tuple[str, int, int]]


def marks(subjects: Sequence[Path], written: Sequence[Path] = ()) -> Marks:
    """(path, time of change in ns, bytes) of every file that a page over these subjects would read.

    written: the page's own files, which would wake it for ever.
    """
    own = {os.path.abspath(path) for path in written}
    return frozenset(mark for subject in subjects for mark in _below(subject) if os.path.abspath(mark[0]) not in own)


def _below(subject: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a document, of a release, or of a sweep with the releases of its runs; links are not followed."""
    if not subject.is_dir():
        yield from _mark(subject)
        return
    if (subject / SWEEP).exists() or (subject / RUNS).is_dir():
        yield from _mark(subject / SWEEP)
        releases = [cell / "release" for cell in _folders(subject / RUNS)]
    else:
        releases = [subject / "release" if (subject / "release").is_dir() else subject]
    for release in releases:
        for entry in sorted(release.rglob("*")):
            if not is_temporary(entry.name):
                yield from _mark(entry)


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []


def _mark(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        found = os.lstat(path)
    except OSError:  # replaced at this moment
        return
    if not stat.S_ISDIR(found.st_mode):  # a folder changes with every temporary file in it
        yield str(path), found.st_mtime_ns, found.st_size


def watch(
    request: Request,
    say: Callable[[str], None],
    done: Callable[[Written], None] = lambda _: None,
    *,
    every: float = EVERY,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write the page now and after every change, one line each, until KeyboardInterrupt.

    What can't be read (not begun, half written, damaged) is said once and tried again at every look; the files of the
    last good page stay. A page that was read while its documents changed is written once more.
    """
    check(request)
    seen: Marks | None = None
    trouble = ""
    while True:
        before = marks(request.subjects, [place for _, place in request.files])
        if before != seen:
            try:
                written = write(request)
                seen, trouble = before, ""
                done(written)
                say(f"{time.strftime('%H:%M:%S')} {described(written)}")
            except (DpauditError, OSError) as error:
                told = " ".join(str(error).split()) or type(error).__name__
                if told != trouble:
                    say(f"{time.strftime('%H:%M:%S')} waiting: {told}")
                trouble = told
        sleep(every)


def described(written: Written) -> str:
    """The files in one line, with the number of runs and their verdicts."""
    files = ", ".join(f"{place} ({size / 1000:.0f} kB)" for place, size in written.sizes)
    verdicts = [run.verdict or "not audited" for run in written.page.runs]
    told = [f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts)]
    told += [
        f"sweep {sweep.name}: {sum(cell.state == 'finished' for cell in sweep.document.cells)} of "
        f"{len(sweep.document.cells)} cells finished"
        for sweep in written.page.sweeps
    ]
    return f"{files}: {'; '.join(told) or 'documents'}"
