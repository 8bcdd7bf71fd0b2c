"""Commands that are killed leave folders in the temporary directory; the next command of dpaudit removes them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.scenarios import write_data
from tests.tiny import save_tiny_llava

PROGRAM = str(Path(sys.executable).with_name("dpaudit"))
WAITING = 300  # seconds, on a machine that is busy with other things


def left(place: Path) -> list[Path]:
    """What dpaudit made in a temporary directory."""
    return sorted(place.glob("dpaudit-*"))


def sweep(root: Path) -> list[str]:
    model, data = save_tiny_llava(root / "model"), write_data(root / "data")
    settings = [f"model.path={model}", f"data.path={data}", "data.train=train.jsonl", "data.test=test.jsonl"]
    grid = "name: x\ngrid:\n  training.steps: [2, 3]\n"
    (root / "grid.yaml").write_text(grid)
    more = ["training.batch-size=8", "model.device=cpu", "privacy.noise-multiplier=1"]
    return ["sweep", str(root / "grid.yaml"), *settings, *more, "--out", str(root / "sweep"), "--processes", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [["bound", "--help"], ["scores", "missing.csv", "--delta", "1e-5"]])
def test_the_next_command_removes_what_a_killed_one_left(tmp_path: Path, again: Sequence[str]) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    typed = sweep(tmp_path)
    begun = subprocess.Popen([PROGRAM, *typed], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    end = time.monotonic() + WAITING
    while not left(place):
        assert begun.poll() is None and time.monotonic() < end, begun.stderr and begun.stderr.read()
        time.sleep(0.02)
    subprocess.run([PROGRAM, *again], env=environment, capture_output=True, cwd=tmp_path)
    assert left(place), "that of a command that runs is left alone"
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert left(place), "the control: it could not remove it"
    assert begun.stderr is not None
    begun.stderr.read()  # to its end: its children are gone too
    subprocess.run([PROGRAM, *again], env=environment, capture_output=True, cwd=tmp_path)
    assert left(place) == []
