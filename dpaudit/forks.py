"""Processes that are copies of one process, so that what all of them import is imported once.

Importing torch, transformers and peft takes longer than many a job. A `ForkServer` is a fresh Python that imports
modules and then does nothing but copy itself: a job starts from the state right after the imports, which is that of a
fresh process, and no job sees anything of another. What a copy would share and must not is renewed: Python's own
generator reseeds itself after a fork, NumPy's global one is seeded anew (dpaudit.worker).

A process with several threads or an initialised accelerator can't be copied safely. So a server imports nothing ahead
where there is an accelerator or where the system is not Linux, and starts over without its modules when an import
leaves a thread behind; jobs then import what they need, as they would in a process of their own.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpaudit.errors import EnvironmentFailure

# What `dpaudit train`, `audit` and `report` import sooner or later. Names that can't be imported are left out.
TRAINING = (
    "attacks.audit",
    "attacks.training",
    "attacks.fusion.audit",
    "attacks.membership.references",
    "reports.card",
    "reports.html",
    "opacus.grad_sample",
    "pandas",
    "peft",
    "pyarrow.parquet",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.datasets",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
)
ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel")


def ahead(modules: Sequence[str]) -> tuple[str, ...]:
    """Those of `modules` that a server may import before it copies itself on this machine."""
    safe = sys.platform == "linux" and not any(Path(place).exists() for place in ACCELERATORS)
    return tuple(modules) if safe else ()


GRACE = 5.0  # seconds between asking a copy to stop and ending it


@dataclass
class Fork:
    """A copy that runs, or ran. returncode: as that of subprocess.Popen."""

    server: "ForkServer"
    number: int
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        if self.returncode is None:
            self.server.listen(0)
            self.returncode = self.server.ended.get(self.number)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"job {self.number}", timeout or 0.0)
            self.server.listen(left)
        return code

    def tell(self, kind: signal.Signals) -> None:
        """Send a signal to it, and to all that it started where it leads a process group of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if self.server.apart else os.kill)(self.pid, kind)


class ForkServer:
    """Starts copies of a process that has imported `modules`. Closing it ends the copies that still run."""

    def __init__(
        self, modules: Sequence[str] = (), environment: Mapping[str, str] | None = None, *, apart: bool = True
    ) -> None:
        """environment: of the server and of its copies. apart: whether each copy leads a process group of its own.

        Ctrl-C on a terminal reaches only this process then, which ends its jobs in order. Copies that write to the
        terminal belong in its foreground group (apart=False): a terminal may stop any other. Raises EnvironmentFailure
        where no process can be started.
        """
        self.apart = apart
        self.ended: dict[int, int] = {}
        self._started: dict[int, int] = {}  # process ids
        self._heard, self._count = b"", 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dpaudit.worker", *ahead(modules)],
                env=None if environment is None else dict(environment),
                stdin=subprocess.PIPE,  # its end tells the server, and that its copies, that this process is gone
                stdout=subprocess.PIPE,
                process_group=0 if apart else None,
            )
        except OSError as error:
            raise EnvironmentFailure(f"a job can't be started: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(
        self,
        function: str,
        *arguments: Any,
        argv: Sequence[str] = (),
        stdout: Path | None = None,
        stderr: Path | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Fork:
        """A copy that calls "module:name" with arguments that JSON can write; what it returns is the exit code.

        argv: its command line behind the program's name. stdout, stderr: files to append to; None: nothing, and this
        process's standard error. folder: to work in. environment: variables to set. Raises EnvironmentFailure when the
        server is gone.
        """
        self._count += 1
        number = self._count
        request = {
            "number": number,
            "function": function,
            "arguments": list(arguments),
            "argv": list(argv),
            "stdout": None if stdout is None else str(stdout),
            "stderr": None if stderr is None else str(stderr),
            "folder": None if folder is None else str(folder),
            "environment": dict(environment or {}),
            "apart": self.apart,
        }
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `listen` finds out
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while number not in self._started:
            if number in self.ended:
                raise EnvironmentFailure("a job can't be started: the process that starts jobs has ended")
            self.listen(None)
        return Fork(self, number, self._started[number])

    def listen(self, timeout: float | None) -> None:
        """Take in what the server says, waiting for at most `timeout` seconds (None: without end) for something."""
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        if not select.select([stream], [], [], None if timeout is None else max(0.0, timeout))[0]:
            return
        said = os.read(stream, 1 << 16)
        if not said:  # it has ended, and its copies with it
            code = self._process.wait()
            for number in range(1, self._count + 1):
                self.ended.setdefault(number, code if code < 0 else -signal.SIGKILL)
            return
        *lines, self._heard = (self._heard + said).split(b"\n")
        for line in lines:
            word, which, value = line.split()
            (self._started if word == b"started" else self.ended)[int(which)] = int(value)

    def close(self) -> None:
        """End the server, which may still be importing, and every copy that still runs."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()


def end(forks: Sequence[Fork]) -> None:
    """Ask copies to stop, give them a moment, then end what is left of them."""
    for fork in forks:
        fork.tell(signal.SIGTERM)
        fork.tell(signal.SIGCONT)  # one that is stopped would not notice
    deadline = time.monotonic() + GRACE
    for fork in forks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            fork.wait(timeout=max(0.0, deadline - time.monotonic()))
        fork.tell(signal.SIGKILL)
        fork.wait()


def how(code: int) -> str:
    """How a process with this exit code ended: 'was ended by SIGKILL', 'ended with exit code 2'."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
