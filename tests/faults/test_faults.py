"""A sample of the fault table (`benchmarks/faults.py` plays every site): kill, torn write and full disk at all kinds of
writes; a held lock; a folder that can't be written; a clock that goes backwards."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpaudit.runs import RunFolder
from tests.faults import harness
from tests.faults.scenarios import (
    DUAL_PRIV,
    SCENARIOS,
    WITH_CANARIES,
    Scenario,
    World,
    distinct,
    play,
    state,
    uninterrupted,
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    harness.warm_up()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-faults-"))  # short, and open to other users for one of the tests
    root.chmod(0o755)
    yield World.make(root)
    shutil.rmtree(root)


def check(world: World, scenario: Scenario, stride: int) -> int:
    ended, expected = uninterrupted(world, scenario)
    assert ended.foreign == (), f"{scenario.name} writes outside its folders: {ended.foreign}"
    chosen = distinct(ended.sites)[::stride]
    kinds: tuple[harness.Kind, ...] = ("torn", "full", "kill")
    for place, at in enumerate(chosen):
        case = play(world, scenario, kinds[place % 3], at, expected)
        assert case.problem is None, f"{scenario.name}, {case.kind} at site {at} ({case.site}): {case.problem}"
    return len(ended.sites)


@pytest.mark.slow
def test_a_training_survives_a_fault_at_any_write(world: World) -> None:
    assert check(world, SCENARIOS["train"], 4) > 80


@pytest.mark.slow
def test_an_audit_survives_a_fault_at_any_write(world: World) -> None:
    assert check(world, SCENARIOS["audit"], 4) >= 8


def test_a_report_survives_a_fault_at_any_write(world: World) -> None:
    assert check(world, SCENARIOS["report"], 2) >= 3


@pytest.mark.slow
def test_an_audit_of_a_trainer_survives_a_fault_at_any_write(world: World) -> None:
    assert check(world, SCENARIOS["audit of a trainer"], 10) > 60


def test_a_second_process_is_refused(world: World) -> None:
    place = world.place("lock")
    shutil.copytree(world.finished("second", *WITH_CANARIES), place / "run")
    before = state(place)
    with RunFolder(place / "run").lock():
        for command in (["audit", str(place / "run")], ["train", "--resume", str(place / "run")]):
            ended = harness.run(command, [place], world.root)
            assert ended.code == 4 and "in use by another process" in ended.line
            assert len(ended.err.strip().splitlines()) == 1
    assert state(place) == before


def test_a_folder_that_may_not_be_written(world: World) -> None:
    place = world.place("read-only")
    shutil.copytree(world.finished("second", *WITH_CANARIES), place / "run")
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    prepare = nobody if os.getuid() == 0 else None  # for root there are no read-only folders
    try:
        for command in (
            ["audit", str(place / "run")],
            ["train", "--resume", str(place / "run")],
            world.train(place / "new", *DUAL_PRIV),
            ["report", str(place / "run"), "-o", str(place / "report.html")],
        ):
            ended = harness.run(command, [place], world.root, prepare=prepare)
            assert ended.code == 4, (command[0], ended.code, ended.err)
            assert "permission denied" in ended.line.lower() and "Traceback" not in ended.err
    finally:
        for path in (place, *(path for path in place.rglob("*") if path.is_dir())):
            path.chmod(0o755)


def test_the_limit_of_a_file_system_in_libraries_of_others(world: World) -> None:
    """safetensors and Arrow write by themselves: their failure is one line too, and the run goes on afterwards."""
    scenario = SCENARIOS["train"]
    _, expected = uninterrupted(world, scenario)
    for limit in (2_000, 12_000):
        place = world.place("whole")
        ended = harness.run(
            scenario.command(world, place),
            [place],
            world.root,
            prepare=lambda size=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),  # type: ignore[misc]
        )
        assert ended.code == 4 and "Traceback" not in ended.err, ended.err
        assert "can't be written" in ended.line
        for command in scenario.again(world, place):
            if (ended := harness.run(command, [place], world.root)).code == 0:
                break
        assert state(place) == expected


def test_a_clock_that_goes_backwards(world: World) -> None:
    scenario = SCENARIOS["train"]
    _, expected = uninterrupted(world, scenario)
    place = world.place("whole")
    now = time.time()

    def backwards() -> None:
        ticks = iter(range(10_000_000))
        time.time = lambda: now - 3600.0 * next(ticks)
        time.time_ns = lambda: int(1e9 * (now - 3600.0 * next(ticks)))

    first = harness.run(scenario.command(world, place), [place], world.root, kind="kill", at=70, prepare=backwards)
    assert first.code == -9
    for path in place.rglob("*"):
        os.utime(path, (now + 1e9, now + 1e9))  # every file is from the future
    again = harness.run(["train", "--resume", str(place / "run")], [place], world.root, prepare=backwards)
    assert again.code == 0, again.err
    assert state(place) == expected
