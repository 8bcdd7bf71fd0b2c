"""Places that somebody else prepared or named."""

import os
import socket
from pathlib import Path

import pytest

from dpaudit import checksums, folders
from dpaudit.errors import UsageError
from dpaudit.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    place = tmp_path / "run"
    (place / "release" / "games").mkdir(parents=True)
    (place / "private").mkdir(mode=0o700)
    (place / "release" / "config.yaml").write_text("method: dp-sgd\n")
    (place / "release" / "games" / "01-canaries.json").write_text("{}")
    return place


NAMES = ("/etc/hostname", "../private/noise.key", "games/../../secret", "./config.yaml", "games//01-canaries.json",
         "games",
         "link", "linked/file", "fifo", "a/b/c/d/e/f", "x" * 300, "nothing", "ä" * 200)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_checksums_names_no_other_file(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would hang for ever, a kernel's log too; a link leads outside."""
    release = run / "release"
    (run / "secret").write_text("s")
    (run / "other").mkdir()
    (run / "other" / "file").write_text("o")
    (release / "link").symlink_to(run / "secret")
    (release / "linked").symlink_to(run / "other")
    os.mkfifo(release / "fifo")
    assert folders.ordinary(release, name) is None
    (release / checksums.NEXT).write_text(f"{'0' * 64}  {name}\n")
    monkeypatch.setattr("dpaudit.untrusted.sha256", lambda *_args, **_options: pytest.fail("it was opened"))
    RunFolder(run)._list(checksums.SUMS, {})


def test_a_list_of_checksums_names_the_files_of_its_release(run: Path) -> None:
    release = run / "release"
    for name in ("config.yaml", "games/01-canaries.json"):
        assert folders.ordinary(release, name) == release / name
        digest = checksums.digest((release / name).read_bytes())
        (release / checksums.NEXT).write_text(f"{digest}  {name}\n")
        assert RunFolder(run)._list(checksums.SUMS, {})[name] == digest


@pytest.mark.parametrize("inside", ["release", "release/sub", "private", "private/a/b", "link", "link/deeper"])
def test_results_never_go_into_a_run(run: Path, inside: str) -> None:
    from attacks.external.folder import AuditFolder
    from attacks.training import start_run
    from dpaudit.config import resolve
    from reports.sweep.board import locked

    (run / "link").symlink_to(run / "private")
    with pytest.raises(UsageError, match="a part of a run"):
        folders.require_outside_runs("--out", run / inside)
    with pytest.raises(UsageError, match="a part of a run"):
        start_run(resolve({}), run / inside)
    with pytest.raises(UsageError, match="a part of a run"):
        AuditFolder.take(run / inside, "x", {})
    with pytest.raises(UsageError, match="a part of a run"), locked(run / inside):
        pass
    for outside in (run / "twin-canaries", run, run.parent / "release", run.parent / "private" / "x"):
        folders.require_outside_runs("--out", outside)


@pytest.mark.parametrize("kind", ["folder link", "dangling link", "file", "fifo", "socket"])
def test_a_twin_is_an_ordinary_folder(run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attacks.games.twins import latest
    from attacks.membership.members import member_twin
    from dpaudit.config import resolve

    other, twin = run.parent / "other", run / "twin-members"
    RunFolder.create(other)
    folders.require_own(twin)
    if "link" in kind:
        twin.symlink_to(other if kind == "folder link" else run / "nowhere")
    elif kind == "socket":
        monkeypatch.chdir(run)
        socket.socket(socket.AF_UNIX).bind(twin.name)
    else:
        twin.write_text("") if kind == "file" else os.mkfifo(twin)
    before = sorted(other.rglob("*"))
    for take in (
        lambda: folders.require_own(twin),
        lambda: latest(RunFolder(run), "twin-members"),
        lambda: member_twin(resolve({}), twin),
    ):
        with pytest.raises(UsageError, match="accepted for a twin"):
            take()
    assert sorted(other.rglob("*")) == before
