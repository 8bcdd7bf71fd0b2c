"""Temporary folders: gone with their process, or with the next one; nobody else's are touched."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpaudit import temporary

_HOLDER = """
import time
from dpaudit import temporary
with temporary.folder("jobs") as place:
    (place / "0").mkdir()
    (place / "0" / "job.json").write_text("secret")
    print(place, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder() -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_process_is_tidied_up_after(here: Path) -> None:
    process, left = holder()
    assert temporary.remove_abandoned() == 0 and left.exists(), "its process still lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    with temporary.folder("ray") as mine:
        assert mine.exists() and not left.exists()
    assert list(here.iterdir()) == []


def test_one_that_is_just_being_made_is_taken_for_abandoned_at_most_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody sweeps between the making of a folder and its lock, three times."""
    make, swept = tempfile.mkdtemp, []

    def made(prefix: str) -> str:
        path = make(prefix=prefix)
        if len(swept) < 3:
            swept.append(temporary.remove_abandoned())
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    with temporary.folder("hub") as mine:
        assert swept == [1, 1, 1] and mine.exists() and list(here.iterdir()) == [mine]
        assert temporary.remove_abandoned() == 0 and mine.exists()
    assert list(here.iterdir()) == []


def test_what_is_not_ours_stays(here: Path) -> None:
    (here / "outside").mkdir(mode=0o700)
    (here / "outside" / "thesis.tex").write_text("x")
    (here / "dpaudit-jobs-link").symlink_to(here / "outside")
    (here / "dpaudit-jobs-file").write_text("x")
    (here / "dpaudit-jobs-open").mkdir(mode=0o755)
    os.mkfifo(here / "dpaudit-hub-pipe")
    (here / "dpaudit-mine").mkdir(mode=0o700)
    before = sorted(path.name for path in here.rglob("*"))
    assert temporary.remove_abandoned() == 0
    assert sorted(path.name for path in here.rglob("*")) == before
