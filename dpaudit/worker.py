"""One job of a LocalExecutor: `python -m dpaudit.worker FOLDER` runs FOLDER/job.json and writes FOLDER/result.json."""

import json
import os
import sys
import threading
from pathlib import Path

from dpaudit import atomic, printable
from dpaudit.errors import DpauditError
from dpaudit.executors import ARGUMENTS, load_function


def _end_with_parent() -> None:
    """The process that started this one holds the other end of standard input: its end means that it is gone."""
    os.read(0, 1)
    os._exit(DpauditError.exit_code)


def work(folder: Path) -> None:
    """Run the job of `folder`: an expected failure is its error in one line, a defect ends it with a traceback."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a user's `trainers/` must not become ours
    result, error, code = None, None, 0
    try:
        result = load_function(job["function"])(job["payload"])
    except DpauditError as failure:
        error, code = printable.field(str(failure), printable.MOST), failure.exit_code
        sys.stderr.write(f"dpaudit: {error}\n")
    atomic.write_text(folder / "result.json", json.dumps({"result": result, "error": error, "code": code}))


def main() -> None:
    """Run the job named on the command line; what it returns is on disk before the process ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    sys.argv[1:] = json.loads(os.environ.pop(ARGUMENTS, "[]"))
    work(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing down torch takes a second, and nothing is left to do


if __name__ == "__main__":
    main()
