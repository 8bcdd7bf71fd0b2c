"""The installed command, many times: one process imports what it needs and forks for every command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


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


def run_all(
    commands: Sequence[Sequence[str]],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    models: Sequence[Path] = (),
    timeout: float = 1200,
    python: Path | None = None,
) -> list[Done]:
    """Each of `commands` (the words behind `dpaudit`) in a process of its own, in folder `cwd`, one after the other.

    models: checkpoints that are opened once before, so that what libraries load for them counts once. python: that of
    another environment, whose dpaudit is run instead of the one of this checkout.
    """
    told = json.dumps([[list(command) for command in commands], [str(folder) for folder in models]])
    root = str(Path(__file__).parents[1])
    words = [sys.executable, "-m", "tests.commands"] if python is None else [str(python), "-P", __file__]
    done = subprocess.run(
        words,
        input=told,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root if python is None else "", **(env or {})},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [Done(**item) for item in json.loads(done.stdout)]


def _one(arguments: list[str], place: Path) -> dict[str, object]:
    names = [place / "out", place / "err"]
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        for number, name in enumerate(names, 1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
        code: object = 70
        try:
            sys.argv = ["dpaudit", *arguments]
            _entry()()
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


def _entry() -> "object":
    """What `pip` puts into the script `dpaudit`."""
    from importlib.metadata import entry_points

    return next(iter(entry_points(group="console_scripts", name="dpaudit"))).load()


def _main() -> None:
    import importlib.util
    import tempfile

    commands, models = json.loads(sys.stdin.read())
    if importlib.util.find_spec("torch") is None:  # the core alone
        import dp_accounting  # noqa: F401
        import pandas  # noqa: F401
        import scipy.stats  # noqa: F401
    else:
        import attacks.training  # noqa: F401  what most commands import, once for all
        import dpaudit.cli.train  # noqa: F401
        from trainers.opened import open_checkpoint

        for folder in models:
            open_checkpoint(folder)
    with tempfile.TemporaryDirectory() as place:
        found = [_one(arguments, Path(place)) for arguments in commands]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main()
