"""Where the parts of a sweep lie, and that they are its own."""

from pathlib import Path

from dpaudit import folders
from dpaudit.errors import UsageError

RUNS, LOGS, FEATURES = "runs", "logs", "features"


def require_plain(out: Path) -> None:
    """UsageError unless a sweep's own folders are ordinary ones.

    Through links, runs and logs would be written elsewhere, and the runs of others shown. The parts of each run are
    judged where it is opened (dpaudit.folders).
    """
    folders.require_plain(out / LOGS)
    folders.require_plain(out / FEATURES)
    for place in (out / RUNS, *(folders.entries(out / RUNS) if folders.kind(out / RUNS) == "folder" else ())):
        kind = folders.kind(place)
        if kind not in ("folder", "nothing"):
            raise UsageError(f"{place}: is {kind}; accepted in a sweep: ordinary folders")
