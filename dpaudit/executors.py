"""Independent jobs: a named function, one JSON object in and one JSON object out for each.

Sweeps, reference models and repeated audits are many small jobs that share nothing. An executor runs them wherever it
likes and hands back each outcome as it arrives; a job that fails or is killed is the outcome of that job alone. What a
job must not lose it writes itself (a run folder, a file by atomic rename), so that any executor, or the same one
started again, may run it once more.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpaudit import atomic, temporary
from dpaudit.errors import DpauditError, EnvironmentFailure, of_code, rejected
from dpaudit.forks import Fork, ForkServer, end, how

JsonObject = dict[str, Any]
JobFunction = Callable[[JsonObject], JsonObject]

ARGUMENTS = "DPAUDIT_ARGUMENTS"  # what the user typed: a job writes it into its run, and not its own command line
PROCESSES = 2
POLL = 0.05  # seconds


@dataclass(frozen=True)
class Outcome:
    """How one job ended: `result` is what the function returned, or `error` says in one line why there is none.

    index: the place of its payload. seconds: wall time of the job, its start-up included. log: the file with all that
    it printed, where it was kept. code: of an error, the exit code of a command that can't go on without the job.
    """

    index: int
    result: JsonObject | None
    error: str | None
    seconds: float
    log: Path | None = None
    code: int = DpauditError.exit_code

    def failure(self, what: str) -> DpauditError:
        """The error of a command that can't go on without this job."""
        return of_code(self.code, f"{what}: {self.error}")


class Executor(Protocol):
    """Runs independent jobs."""

    def run(
        self,
        function: str,
        payloads: Sequence[Mapping[str, Any]],
        *,
        started: Callable[[int], None] | None = None,
    ) -> Iterator[Outcome]:
        """Outcomes as jobs end, in any order, exactly one per payload.

        function: "module:name" of a function that takes one JSON object and returns one. payloads: anything that
        `json` can write. started: told the index of each job when it begins. Closing the iterator (or Ctrl-C) ends the
        jobs that still run. Raises UsageError for a function that can't be found.
        """
        ...


def load_function(name: str) -> JobFunction:
    """The function called "module:name"; UsageError when there is none."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise rejected("function", name, "MODULE:NAME")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise rejected("function", name, f"a function that can be imported ({' '.join(str(error).split())})") from error
    if not callable(found):
        raise rejected("function", name, "a function")
    loaded: JobFunction = found
    return loaded


@dataclass
class _Job:
    """A job that runs: its process, its folder, its log, and when it began."""

    index: int
    process: Fork
    folder: Path
    log: Path
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class LocalExecutor:
    """Each job in a process of its own on this machine, `processes` at a time, each with `threads_per_process` threads.

    Nothing leaks from one job into the next: no generator state, no memory, no patched library. modules: what jobs
    import anyway; imported once where that is safe, in a process of which jobs are copies (dpaudit.forks). Jobs start
    in the order of their payloads, so the longest belong first. logs: folder for `job-INDEX.log`; without one a log
    lives only as long as its job, and its last line is the error. A job ends by itself when the process that started it
    is gone, also by kill -9.
    """

    processes: int = PROCESSES
    threads_per_process: int = 1
    logs: Path | None = None
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("processes", "threads_per_process"):
            if getattr(self, name) < 1:
                raise rejected(name.replace("_", "-"), getattr(self, name), "a whole number of at least 1")

    def run(
        self,
        function: str,
        payloads: Sequence[Mapping[str, Any]],
        *,
        started: Callable[[int], None] | None = None,
    ) -> Iterator[Outcome]:
        """See Executor.run."""
        texts = [json.dumps({"function": function, "payload": dict(payload)}) for payload in payloads]
        if not texts:
            return
        running: list[_Job] = []
        server = ForkServer(self.modules, job_environment(self.threads_per_process))
        with temporary.folder("jobs") as name, server:
            try:
                waiting = iter(enumerate(texts))
                while True:
                    while len(running) < self.processes and (following := next(waiting, None)) is not None:
                        index, text = following
                        running.append(self._start(server, name, index, text))
                        if started is not None:
                            started(index)
                    if not running:
                        return
                    ended = [job for job in running if job.process.poll() is not None]
                    for job in ended:
                        running.remove(job)
                        yield _outcome(job, keep_log=self.logs is not None)
                    if not ended:
                        time.sleep(POLL)
            finally:
                end([job.process for job in running])

    def _start(self, server: ForkServer, place: Path, index: int, text: str) -> _Job:
        folder = place / str(index)
        folder.mkdir()
        (folder / "job.json").write_text(text, encoding="utf-8")
        log = (self.logs or folder) / f"job-{index:04d}.log"
        if self.logs is not None:
            atomic.make_folder(self.logs)
        try:
            with os.fdopen(atomic.open_own(log, os.O_WRONLY | os.O_CREAT), "wb") as sink:
                os.ftruncate(sink.fileno(), 0)  # of an earlier job of that number
        except OSError as error:
            raise atomic.failure(log, error) from error
        typed = json.loads(os.environ.get(ARGUMENTS, "null"))  # where a job of Ray starts this one
        argv = sys.argv[1:] if typed is None else typed
        job = server.start("dpaudit.worker:work", str(folder), argv=argv, stdout=log, stderr=log)
        return _Job(index, job, folder, log)


def job_environment(threads: int) -> dict[str, str]:
    """The environment of a job: its number of threads, and this very copy of dpaudit."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment.pop(ARGUMENTS, None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        environment[name] = str(threads)
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a source tree: -P keeps the working directory away
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return environment


def _outcome(job: _Job, *, keep_log: bool) -> Outcome:
    """Read what an ended job left behind."""
    seconds = time.monotonic() - job.began
    log = job.log if keep_log else None
    try:
        answer = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
        return Outcome(job.index, answer["result"], answer["error"], seconds, log, answer["code"])
    except (OSError, json.JSONDecodeError, KeyError):  # it was ended before it could say anything
        kind = EnvironmentFailure if job.process.wait() < 0 else DpauditError  # a signal: no memory, or somebody
        return Outcome(job.index, None, _why(job), seconds, log, kind.exit_code)


def _why(job: _Job) -> str:
    code = job.process.wait()
    lines = [line.strip() for line in job.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return f"its process {how(code)}" + (f": {lines[-1][:300]}" if lines and code >= 0 else "")
