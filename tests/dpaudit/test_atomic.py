"""Old file or new file, never something between; every failure of the disk is one line."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dpaudit import atomic
from dpaudit.documents import BoundDocument
from dpaudit.errors import EnvironmentFailure, UsageError

FRAME = pd.DataFrame({"id": ["a", "b"], "member": [True, False]})
DOCUMENT = BoundDocument(method="steinke", epsilon_lower=1.0, ceiling=2.0, confidence=0.95, delta=1e-5, assumes="none")
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: atomic.write_text(path, "new ε\n"),
    "bytes": lambda path: atomic.write_bytes(path, b"\x00\xff"),
    "document": lambda path: atomic.write_document(path, DOCUMENT),
    "tensors": lambda path: atomic.write_tensors(path, {"w": torch.arange(6.0).reshape(2, 3)}),
    "frame": lambda path: atomic.write_frame(path, FRAME),
}


def test_round_trips(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
    assert (tmp_path / "text").read_text(encoding="utf-8") == "new ε\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert BoundDocument.read(tmp_path / "document") == DOCUMENT
    assert torch.equal(load_file(tmp_path / "tensors")["w"], torch.arange(6.0).reshape(2, 3))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "frame"), FRAME)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(WRITERS)


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"embedding": weight, "head": weight, "turned": weight.T, "part": weight[1:]}
    atomic.write_tensors(tmp_path / "t.safetensors", tensors, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_secret_mode_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    original = os.replace

    def watch(source: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        original(source, target)

    monkeypatch.setattr(os, "replace", watch)
    for number, writer in enumerate((atomic.write_text, atomic.write_bytes, atomic.write_tensors, atomic.write_frame)):
        content = ["x", b"x", {"x": torch.zeros(1)}, FRAME][number]
        writer(tmp_path / str(number), content, mode=0o600)  # type: ignore[operator]
        assert stat.S_IMODE((tmp_path / str(number)).stat().st_mode) == 0o600
    assert modes == [0o600] * 4


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_failing_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, words: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentFailure) as caught:
        WRITERS[name](path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
def test_impossible_places(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "missing" / "x", tmp_path / "plain" / "x", tmp_path / "taken"):
        with pytest.raises(EnvironmentFailure) as caught:
            WRITERS[name](path)
        assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain", "taken"]


# A real limit of the operating system on the size of files (EFBIG), set in a process of its own.
_LIMITED = """
import resource, sys
from pathlib import Path
import pandas as pd, torch
from dpaudit import atomic
from dpaudit.errors import EnvironmentFailure
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
writers = [
    lambda path: atomic.write_bytes(path, bytes(100_000)),
    lambda path: atomic.write_tensors(path, {"w": torch.zeros(100_000)}),
    lambda path: atomic.write_frame(path, pd.DataFrame({"x": torch.rand(100_000).numpy()})),
]
for number, write in enumerate(writers):
    try:
        write(folder / str(number))
    except EnvironmentFailure as failure:
        print(failure)
try:
    for _ in range(1000):
        atomic.append_line(folder / "log", "x" * 99)
except EnvironmentFailure as failure:
    print(failure)
"""


def test_a_real_limit_of_the_file_system(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4, done.stdout + done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]
    assert (tmp_path / "log").read_text() == ("x" * 99 + "\n") * 10


# Dies like kill -9 at the n-th call of the operating system that the writer makes.
_KILLED = """
import os, sys
from pathlib import Path
from dpaudit import atomic
count = int(sys.argv[2])
def dying(function):
    def call(*arguments, **named):
        global count
        count -= 1
        if count < 0:
            os._exit(9)
        return function(*arguments, **named)
    return call
for name in ("open", "close", "fsync", "replace", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
atomic.write_bytes(Path(sys.argv[1]), b"new" * 1000)
"""


def test_killed_at_every_call(tmp_path: Path) -> None:
    outcomes = []
    for count in range(30):
        path = tmp_path / "file"
        path.write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", _KILLED, str(path), str(count)], check=False)
        assert path.read_bytes() in (b"old", b"new" * 1000)
        outcomes.append((done.returncode, path.read_bytes() == b"old"))
        atomic.remove_leftovers(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
        if done.returncode == 0:
            break
    assert outcomes[-1] == (0, False)
    assert (9, True) in outcomes and (9, False) in outcomes


def test_append_line_mends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    atomic.append_line(path, '{"step": 1}')
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo' + b"x" * 200_000)
    atomic.append_line(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b"torn from the start")
    atomic.append_line(path, "whole")
    assert path.read_text() == "whole\n"
    with pytest.raises(ValueError):
        atomic.append_line(path, "two\nlines")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert atomic.sha256_bytes(b"abc") == atomic.sha256_file(tmp_path / "abc") == expected
    with pytest.raises(EnvironmentFailure):
        atomic.sha256_file(tmp_path / "missing")


def test_our_own_files_are_opened_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious\n")
    (tmp_path / "soft").symlink_to(tmp_path / "victim")
    os.link(tmp_path / "victim", tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("soft", "symbolic link"), ("hard", "hard link"), ("pipe", "no ordinary file")):
        with pytest.raises(EnvironmentFailure, match=why):
            atomic.append_line(tmp_path / name, "x")
    assert (tmp_path / "victim").read_text() == "precious\n"
    atomic.write_text(tmp_path / "hard", "mine\n")  # a new file takes the place of the name
    assert (tmp_path / "victim").read_text() == "precious\n"
    with pytest.raises(UsageError, match="device, pipe or socket"):
        atomic.write_text(tmp_path / "pipe", "x")
    for name in ("/dev/null", "/dev/stdout", "/proc/self/fd/1"):  # asked only: for root a mistake would be lasting
        with pytest.raises(UsageError, match="device, pipe or socket"):
            atomic.require_ordinary(Path(name))
