"""Copies of a process: imports are paid once, and nothing else is shared."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpaudit import forks
from dpaudit.cli import demo
from dpaudit.errors import DpauditError, EnvironmentFailure
from dpaudit.executors import LocalExecutor, job_environment
from dpaudit.forks import ForkServer

MODULE = "tests.dpaudit.forked"
HERE = {**job_environment(1), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def written(server: ForkServer, out: Path, **options: Any) -> list[Any]:
    assert server.start(f"{MODULE}:write", str(out), **options).wait(60) == 7
    found: list[Any] = ast.literal_eval(out.read_text())
    return found


def test_modules_are_imported_once_and_nothing_else_is_shared(tmp_path: Path) -> None:
    with ForkServer([MODULE], HERE) as server:
        one, two = (written(server, tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0] and len({one[0], one[1], two[1], os.getpid()}) == 4  # the server imported, two copies ran
    assert one[2] == two[2] == 1  # what a job leaves in a module, the next one does not see
    assert all(mine != theirs for mine, theirs in zip(one[3], two[3], strict=True))  # three sources of randomness
    with ForkServer((), HERE) as server:
        alone = written(server, tmp_path / "alone")
    assert alone[0] == alone[1]


@pytest.mark.parametrize("why", ["an accelerator", "another system", "a thread"])
def test_nothing_is_imported_ahead_where_copies_are_not_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "an accelerator":
        monkeypatch.setattr(forks, "ACCELERATORS", ("/dev/no-such-device", "/dev/null"))
    if why == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    modules = [MODULE, "tests.dpaudit.forked_threads"] if why == "a thread" else [MODULE]
    assert (forks.ahead(modules) == ()) == (why != "a thread")
    with ForkServer(modules, HERE) as server:
        alone = written(server, tmp_path / "alone")
    assert alone[0] == alone[1]


def test_a_copy_has_its_own_streams_folder_arguments_and_environment(tmp_path: Path) -> None:
    log, errors = tmp_path / "log", tmp_path / "errors"
    log.write_text("before\n")
    errors.touch()
    with ForkServer((), HERE) as server:
        options: dict[str, Any] = {"stdout": log, "stderr": errors, "folder": tmp_path, "argv": ["a", "b c"]}
        found = written(server, tmp_path / "out", environment={"ADDED": "yes"}, **options)
        assert written(server, tmp_path / "out")[5] is None
    assert found[4:6] == [["a", "b c"], "yes"]
    assert log.read_text() == "before\nsaid on standard output\n" and errors.read_text() == f"in {tmp_path}\n"


@pytest.mark.parametrize("apart", [True, False])
def test_copies_lead_groups_of_their_own_or_stay_in_that_of_the_terminal(tmp_path: Path, apart: bool) -> None:
    """A terminal stops what writes to it from another group than the foreground's (stty tostop)."""
    with ForkServer((), HERE, apart=apart) as server:
        found = written(server, tmp_path / "out")
        assert found[6] == (found[1] if apart else os.getpgrp())
        stays = [server.start(f"{MODULE}:stay", str(tmp_path / f"stays {index}")) for index in range(2)]
        stays[0].tell(signal.SIGSTOP)
        began = time.monotonic()
        forks.end(stays)
        assert [fork.poll() for fork in stays] == [-signal.SIGTERM] * 2 and time.monotonic() - began < forks.GRACE


def test_exit_codes_are_those_of_a_process(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.touch()
    with ForkServer(["no.such.module"], HERE) as server:
        codes = [server.start(f"{MODULE}:stop", code, stderr=errors).wait(60) for code in (0, 5, None, "text")]
        assert codes == [0, 5, 0, 1]
        assert server.start(f"{MODULE}:fail", stderr=errors).wait(60) == 70
        assert "ZeroDivisionError: division by nothing" in errors.read_text()
        stays = server.start(f"{MODULE}:stay", str(tmp_path / "stays"))
        assert stays.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            stays.wait(0.2)
        stays.tell(signal.SIGKILL)
        assert stays.wait(60) == stays.poll() == -signal.SIGKILL


def test_copies_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "stays"
    with ForkServer((), HERE) as server:
        stays = server.start(f"{MODULE}:stay", str(place))
        deadline = time.monotonic() + 30
        while not (place.exists() and place.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        server._process.kill()
        assert stays.wait(30) == -signal.SIGKILL
        while Path(f"/proc/{place.read_text()}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{place.read_text()}").exists()
        with pytest.raises(EnvironmentFailure, match="has ended"):
            server.start(f"{MODULE}:stay", str(place))


def test_a_server_that_still_imports_is_not_waited_for(tmp_path: Path) -> None:
    """As when somebody presses Ctrl-C in the first seconds."""
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(60)")
    path = os.pathsep.join([str(tmp_path), HERE["PYTHONPATH"]])
    began = time.monotonic()
    with ForkServer(["slow_to_import"], {**HERE, "PYTHONPATH": path}):
        time.sleep(0.5)
    assert time.monotonic() - began < 20


def test_an_executor_imports_its_modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE["PYTHONPATH"])
    jobs = "tests.dpaudit.jobs:imported"
    ahead = list(LocalExecutor(modules=("tests.dpaudit.jobs",)).run(jobs, [{}, {}, {}]))
    servers = {outcome.result["by"] for outcome in ahead if outcome.result}
    assert len(servers) == 1 and servers.isdisjoint(outcome.result["pid"] for outcome in ahead if outcome.result)


def test_the_demo_runs_chains_and_ends_all_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [["--version"], ["bound", "--help"]]
    with ForkServer((), HERE) as server:
        demo._together(server, [good, good, good])
        began = time.monotonic()
        monkeypatch.setattr(demo, "AT_ONCE", 3)
        waits = ["train", "--resume", str(tmp_path), "--no-such-option"]
        with pytest.raises(DpauditError, match=r"dpaudit train --resume .* ended with exit code 2"):
            demo._together(server, [good, [waits], good])
        assert time.monotonic() - began < 30
        demo._together(server, [good])
