"""The process that jobs are copies of (dpaudit.forks): `python -m dpaudit.worker MODULE...`.

It imports the modules, then reads one request a line from standard input, copies itself for each, and says on standard
output when a copy began ("started NUMBER PID") and ended ("ended NUMBER CODE"). When standard input ends, the process
that started it is gone: it ends, and with it every copy, which notices by the pipe that only the server keeps open.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dpaudit import atomic, printable
from dpaudit.errors import DpauditError
from dpaudit.executors import load_function

DEFECT = 70  # exit code of a copy whose function raised: Python's own, 1, is a verdict


def serve(modules: Sequence[str]) -> NoReturn:
    """Copy this process for every request until standard input ends."""
    requests, reports, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    _import(modules, null)
    if modules and _threads() > 1:  # can't be copied safely: once more, without them
        os.dup2(requests, 0)
        os.dup2(reports, 1)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "dpaudit.worker"])
    # Python 3.12 counts jemalloc's thread (see `_threads`) and warns at every fork.
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    woken, wake = os.pipe()
    alive, held = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the copies, and ends this process through its parent
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if requests in ready:
            said = os.read(requests, 1 << 16)
            if not said:
                os._exit(0)
            *lines, rest = (rest + said).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    for own in (requests, reports, null, woken, wake, held):
                        os.close(own)
                    _become(request, alive)
                if request["apart"]:
                    with contextlib.suppress(OSError):  # the copy does so as well: whoever comes first
                        os.setpgid(pid, pid)
                running[pid] = request["number"]
                os.write(reports, f"started {request['number']} {pid}\n".encode())
        if woken in ready:
            os.read(woken, 1 << 12)
        for pid, code in _ended():
            if pid in running:
                os.write(reports, f"ended {running.pop(pid)} {code}\n".encode())


def _import(modules: Sequence[str], null: int) -> None:
    """What an import says or fails with, the job that needs it says again."""
    if not modules:
        return
    spoken = os.dup(2)
    os.dup2(null, 2)
    for name in modules:
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name)
    sys.stderr.flush()
    os.dup2(spoken, 2)
    os.close(spoken)


def _threads() -> int:
    """Threads that a copy would miss; jemalloc, which pyarrow brings, starts its own again in a copy."""
    tasks = Path("/proc/self/task")
    names = [(tasks / number / "comm").read_text().strip() for number in os.listdir(tasks)]
    return len(names) - names.count("jemalloc_bg_thd")


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((ended[0], os.waitstatus_to_exitcode(ended[1])))
    return found


def _become(request: dict[str, Any], alive: int) -> NoReturn:
    """In the copy: be the process of one job."""
    code = DEFECT
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["apart"]:
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
        threading.Thread(target=_end_with_server, args=(alive,), daemon=True).start()
        for stream, descriptor in (("stdout", 1), ("stderr", 2)):
            if request[stream] is not None:
                sink = os.open(request[stream], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
                os.dup2(sink, descriptor)
                os.close(sink)
        if request["folder"] is not None:
            os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv[1:] = request["argv"]
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        code = load_function(request["function"])(*request["arguments"]) or 0  # type: ignore[assignment]
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    for said in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said.flush()
    os._exit(code)  # tearing down torch takes a second, and nothing is left to do


def _end_with_server(alive: int) -> NoReturn:
    os.read(alive, 1)
    os._exit(DpauditError.exit_code)


def work(folder: str) -> None:
    """Run the job of `folder`: an expected failure is its error in one line, a defect ends it with a traceback."""
    place = Path(folder)
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a user's `trainers/` must not become ours
    result, error, code = None, None, 0
    try:
        result = load_function(job["function"])(job["payload"])
    except DpauditError as failure:
        error, code = printable.field(str(failure), printable.MOST), failure.exit_code
        sys.stderr.write(f"dpaudit: {error}\n")
    atomic.write_text(place / "result.json", json.dumps({"result": result, "error": error, "code": code}))


if __name__ == "__main__":
    serve(sys.argv[1:])
