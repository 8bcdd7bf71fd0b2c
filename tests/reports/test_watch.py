"""`dpaudit report --watch`: a page that follows its documents, in a process that Ctrl-C ends with exit code 0."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from dpaudit import atomic
from reports.watch import marks
from tests.reports.fixtures import write_run
from tests.reports.sweep.fakes import write_sweep

PROGRAM = Path(sys.executable).with_name("dpaudit")
PATIENCE = 60.0


@contextmanager
def watching(place: Path, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """The command in a process of its own, with the lines that it has said so far."""
    typed = [str(PROGRAM), "report", *arguments, "--watch"]
    process = subprocess.Popen(typed, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    assert process.stdout is not None
    out = process.stdout
    reader = Thread(target=lambda: said.extend(iter(out.readline, "")), daemon=True)
    reader.start()
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()
        reader.join()


def until(true: Callable[[], bool], said: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def test_it_follows_an_audit_and_survives_a_half_written_folder(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "elsewhere", "dual-priv")
    run, page = tmp_path / "run", tmp_path / "page.html"
    with watching(tmp_path, "run", "-o", "page.html") as (process, said):
        until(lambda: any("waiting: RUN: run: no such folder" in line for line in said), said)
        assert not page.exists()
        (run / "release").mkdir(parents=True)
        for name in ("config.yaml", "claim.json", "ledger.json"):
            shutil.copy(whole / "release" / name, run / "release" / name)
        until(lambda: any("page.html" in line and "1 not audited" in line for line in said), said)
        first = page.read_bytes()
        (run / "release" / "audit.json").write_text('{"kind": "audit", "schema')  # cut off
        until(lambda: "waiting" in said[-1], said)
        assert page.read_bytes() == first and process.poll() is None
        shutil.copytree(whole / "release", run / "release", dirs_exist_ok=True)
        until(lambda: "1 inconclusive" in said[-1] or "1 not refuted" in said[-1], said)
        assert page.read_bytes() != first
        count = len(said)
        time.sleep(2.5)  # nothing changes, nothing is said
        assert len(said) == count
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0, said
    assert not [line for line in said if "Traceback" in line]
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_only_what_a_page_reads_wakes_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dual-priv")
    write_sweep(tmp_path / "sweep", seeds=(0,))
    subjects = [run, tmp_path / "sweep"]
    seen = marks(subjects)
    (run / "private").mkdir(exist_ok=True)
    (run / "private" / "metrics.jsonl").write_text("{}\n")
    with atomic.replacing(run / "release" / "claim.json") as half:
        half.write_text("x")
        assert marks(subjects) == seen
        shutil.copy(run / "release" / "claim.json", half)
        half.touch()
    assert marks(subjects) != seen
    seen = marks(subjects)
    assert marks(subjects) == seen
    (tmp_path / "sweep" / "report.html").write_text("x")
    assert marks(subjects) == seen
    card = run / "release" / "model" / "README.md"
    card.parent.mkdir(exist_ok=True)
    card.write_text("x")
    assert marks(subjects) != seen and marks(subjects, [card]) == seen
    assert marks([run / "release"]) == marks([run])
    card.unlink()
    cell = next(path for path in (tmp_path / "sweep" / "runs").iterdir() if (path / "release").is_dir())
    for changed in (run / "release" / "claim.json", cell / "release" / "claim.json", tmp_path / "sweep" / "sweep.json"):
        before = marks(subjects)
        os.utime(changed, ns=(1, 1))
        assert marks(subjects) != before
