"""The installed command, many times: a process imports what it needs, and every command line is a copy of it."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpaudit.forks import Fork, ForkServer


@dataclass(frozen=True)
class Done:
    """What a command left. seconds: from its start to its end, imports not counted."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def line(self) -> str:
        """The one line that a failure says."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.stdout == "", self.stdout
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        return lines[0]


_AT_FIRST: dict[str, str] = {}  # the environment that the server was started in


@functools.cache
def server() -> "ForkServer":
    """One for all tests of this process, whose copies stay off the network."""
    from dpaudit.forks import ForkServer

    _AT_FIRST.update(os.environ)
    found = ForkServer((*_modules(), "tests.commands"), _environment())
    atexit.register(found.close)
    return found


def _modules() -> tuple[str, ...]:
    from dpaudit.forks import TRAINING

    return ("dpaudit.cli.train", *TRAINING)


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    from dpaudit.executors import job_environment

    root = str(Path(__file__).parents[1])
    return {**job_environment(1), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, **(more or {})}


def begin(arguments: Sequence[str], *, stdout: Path, stderr: Path, cwd: Path | None = None) -> "Fork":
    """`dpaudit ARGUMENTS...` in a process of its own that writes into two files; killed with Fork.tell."""
    for place in (stdout, stderr):
        place.write_bytes(b"")
    words = [str(word) for word in arguments]
    owner, streams = server(), {"stdout": stdout, "stderr": stderr}
    return owner.start(
        "tests.commands:entry", argv=words, **streams, folder=cwd or Path.cwd(), environment=_since_the_server()
    )


def _since_the_server() -> dict[str, str]:
    """What a test has put into the environment."""
    return {name: value for name, value in os.environ.items() if _AT_FIRST.get(name) != value}


def run_all(
    commands: Sequence[Sequence[str]],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 1200,
    python: Path | None = None,
) -> list[Done]:
    """Each of `commands` (the words behind `dpaudit`) in a process of its own, in folder `cwd`, one after the other.

    env: settings that libraries read when they are imported. python: that of another environment, whose dpaudit is run
    instead of the one of this checkout.
    """
    if python is not None:
        return _elsewhere(commands, cwd, env or {}, timeout, python)
    if env is None:
        owner = server()
        return [_one(owner, list(command), cwd, timeout, _since_the_server()) for command in commands]
    from dpaudit.forks import ForkServer

    with ForkServer((*_modules(), "tests.commands"), _environment(env)) as own:
        return [_one(own, list(command), cwd, timeout, {}) for command in commands]


def run(*arguments: object, cwd: Path | None = None, timeout: float = 1200) -> Done:
    """One command."""
    return run_all([[str(word) for word in arguments]], cwd=cwd or Path.cwd(), timeout=timeout)[0]


def _one(owner: "ForkServer", arguments: list[str], cwd: Path, timeout: float, environment: Mapping[str, str]) -> Done:
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        for name in (out, err):
            name.write_bytes(b"")
        began = time.perf_counter()
        streams = {"stdout": out, "stderr": err}
        job = owner.start("tests.commands:entry", argv=arguments, **streams, folder=cwd, environment=environment)
        code = job.wait(timeout)
        return Done(code, out.read_text(), err.read_text(), time.perf_counter() - began)


def entry() -> None:
    """What `pip` puts into the script `dpaudit`."""
    from importlib.metadata import entry_points

    next(iter(entry_points(group="console_scripts", name="dpaudit"))).load()()


def _elsewhere(
    commands: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str], timeout: float, python: Path
) -> list[Done]:
    done = subprocess.run(
        [str(python), "-P", __file__],
        input=json.dumps([list(command) for command in commands]),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **env},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [Done(**item) for item in json.loads(done.stdout)]


def _main() -> None:
    """In the other environment, which has no module of these tests: the core alone, or all."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        import dp_accounting  # noqa: F401
        import pandas  # noqa: F401
        import scipy.stats  # noqa: F401
    else:
        import attacks.training  # noqa: F401
        import dpaudit.cli.train  # noqa: F401
    with tempfile.TemporaryDirectory() as place:
        found = [_forked(arguments, Path(place)) for arguments in json.loads(sys.stdin.read())]
    sys.stdout.write(json.dumps(found))


def _forked(arguments: list[str], place: Path) -> dict[str, object]:
    names = [place / "out", place / "err"]
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        for number, name in enumerate(names, 1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
        code: object = 70
        try:
            sys.argv = ["dpaudit", *arguments]
            entry()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    _, status = os.waitpid(child, 0)
    stdout, stderr = (name.read_text() for name in names)
    seconds = time.perf_counter() - began
    return {"code": os.waitstatus_to_exitcode(status), "stdout": stdout, "stderr": stderr, "seconds": seconds}


if __name__ == "__main__":
    _main()
