"""Jobs in processes: outcomes, failures of one job alone, ends of parents and children."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpaudit.errors import UsageError
from dpaudit.executors import LocalExecutor, load_function

JOBS = "tests.dpaudit.jobs"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def gone(*pids: int, seconds: float = 20.0) -> bool:
    """Whether all processes end in time (a zombie has ended)."""

    def alive(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_every_payload_has_one_outcome_in_a_process_of_its_own() -> None:
    begun: list[int] = []
    executor = LocalExecutor(processes=2, threads_per_process=3)
    outcomes = list(executor.run(f"{JOBS}:double", [{"value": v} for v in (1.5, -2, 7)], started=begun.append))
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2] and begun == [0, 1, 2]
    values = {outcome.index: outcome.result["value"] for outcome in outcomes if outcome.result}
    assert values == {0: 3.0, 1: -4, 2: 14}
    assert len({outcome.result["pid"] for outcome in outcomes if outcome.result} | {os.getpid()}) == 4
    assert all(o.result and o.result["threads"] == "3" and o.error is None and o.seconds > 0 for o in outcomes)
    assert list(executor.run(f"{JOBS}:double", [])) == []


def test_a_job_has_the_command_line_that_the_user_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in the run's environment.json; `dpaudit 0`, the name of a job's folder, would reproduce nothing."""
    monkeypatch.setattr(sys, "argv", ["dpaudit", "sweep", "--out", "a b"])
    [outcome] = LocalExecutor().run(f"{JOBS}:arguments", [{}])
    assert outcome.result == {"arguments": ["sweep", "--out", "a b"]}


def test_never_more_jobs_at_once_than_asked_for() -> None:
    begun: list[int] = []
    outcomes = LocalExecutor(processes=2).run(f"{JOBS}:double", [{"value": v} for v in range(6)], started=begun.append)
    at_once = [len(begun) - ended for ended, _ in enumerate(outcomes)]
    assert max(at_once) == 2


def test_a_failure_is_the_outcome_of_that_job_alone(tmp_path: Path) -> None:
    kinds = ["usage", "bug", "kill", "exit", "unwritable", "fine", "disk"]
    executor = LocalExecutor(processes=2, logs=tmp_path / "logs")
    outcomes = {o.index: o for o in executor.run(f"{JOBS}:mixed", [{"kind": kind} for kind in kinds])}
    errors = [outcomes[index].error for index in range(len(kinds))]
    assert errors[0] == "field: got 1; accepted: 2"
    assert errors[1] == "its process ended with exit code 70: ZeroDivisionError: division by nothing"
    assert errors[2] == "its process was ended by SIGKILL"
    assert errors[3] is not None and errors[3].startswith("its process ended with exit code 7")
    assert errors[4] is not None and "JSON" in errors[4]
    assert errors[5] is None and outcomes[5].result == {"kind": "fine"}
    assert all(outcomes[index].result is None for index in range(5))
    codes = [outcomes[index].failure("job").exit_code for index in (0, 1, 2, 3, 4, 6)]
    assert codes == [2, 2, 4, 2, 2, 4]  # of a command that can't go on without the job
    assert str(outcomes[6].failure("job")) == "job: FILE: can't be written: the disk is full"
    logs = [outcome.log.read_text() for _, outcome in sorted(outcomes.items()) if outcome.log]
    assert len(logs) == 7 and "said by usage" in logs[0] and "Traceback" in logs[1]


def test_functions_that_do_not_exist_are_named() -> None:
    for name in ("json", ":dumps", "json:", "no.such.module:f", "json:no_such", "json:__name__"):
        with pytest.raises(UsageError, match="function: got"):
            load_function(name)
    with pytest.raises(UsageError, match="threads-per-process"):
        LocalExecutor(threads_per_process=0)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_jobs_and_all_that_they_started_end_with_their_parent(tmp_path: Path, kind: signal.Signals) -> None:
    code = (
        "from dpaudit.executors import LocalExecutor\n"
        f"list(LocalExecutor().run('{JOBS}:wait', [{{'folder': {str(tmp_path)!r}}}] * 3))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while [bool(path.read_text()) for path in tmp_path.iterdir()] != [True, True] and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(kind)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode == -kind and ("KeyboardInterrupt" in said) == (kind == signal.SIGINT)
    pids = [int(path.name) for path in tmp_path.iterdir()] + [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 4 and gone(*pids)


def test_closing_the_iterator_ends_what_runs(tmp_path: Path) -> None:
    outcomes = LocalExecutor(processes=2).run(f"{JOBS}:first_is_quick", [{"index": i} for i in range(3)])
    first = next(outcomes)
    assert first.index == 0
    began = time.monotonic()
    assert isinstance(outcomes, Iterator)
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 20 and list(outcomes) == []


def test_a_job_pays_only_for_what_it_imports_and_never_takes_the_users_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dpaudit").mkdir()
    (tmp_path / "dpaudit" / "__init__.py").write_text("raise SystemExit('the wrong dpaudit')")
    (tmp_path / "mine.py").write_text("def job(payload): return {'sum': sum(payload['values'])}")
    monkeypatch.chdir(tmp_path)
    (outcome,) = LocalExecutor().run("mine:job", [{"values": [1, 2, 3.5]}])
    assert outcome.result == {"sum": 6.5}
    monkeypatch.chdir(ROOT)
    (outcome,) = LocalExecutor().run(f"{JOBS}:heavy", [{}])
    assert outcome.result is not None and outcome.result["loaded"] == []
