"""The run folder: what lies where, one process at a time, and nothing used before it is whole.

`release/` may be published, `private/` (mode 0700) may not. A run is finished when `release/model/complete.json`
exists: it is written last and holds the SHA-256 of every file of the model.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpaudit import atomic, checksums, folders, untrusted
from dpaudit.config import RunConfig, read_yaml, resolve
from dpaudit.documents import Document
from dpaudit.errors import EnvironmentFailure, UsageError

MODEL_COMPLETE = "complete.json"
MODEL_CARD = "README.md"  # about the model and no part of it: its owner completes it, audits renew it (reports.card)
WAIT_FOR_LOCK = "DPAUDIT_WAIT_FOR_LOCK"
PARTS = ("release", "private")
# What dpaudit writes into the two parts, by name: `discard` removes a folder only where it knows all that is in it.
RELEASED = {
    "config.yaml", "claim.json", "ledger.json", "model", "audit.json", "benchmark.json", "environment.json", "games",
    "signature.json", checksums.SUMS, checksums.NEXT,
}  # fmt: skip
KEPT = {
    "coins.parquet", "scores.parquet", "membership.parquet", "answers.parquet", "metrics.jsonl", "noise.key", "lock",
    "folders.json", "plan.json", "settings.json", "checkpoints", "features", "references", "adapter.tmp", "games",
    "benchmark.log",
}  # fmt: skip


def _from(start: Path, given: str | None) -> str | None:
    """A path of a configuration as it reads from here; hub ids and absolute paths are the same everywhere."""
    if given is None or Path.cwd() == start or not (start / given).is_dir():
        return given
    return str(start / given)


def discard(place: Path) -> None:
    """Remove a folder that dpaudit made for itself and that holds nothing but a run: an unfinished twin.

    UsageError, and nothing removed, where it is a link or holds anything that no run has at its top.
    """
    if folders.kind(place) != "folder":
        raise UsageError(f"{place}: is {folders.kind(place)}; accepted: a folder that dpaudit made, or nothing")
    run = RunFolder(place)
    run.require_plain()
    foreign = sorted(entry.name for entry in folders.entries(place) if entry.name not in PARTS)
    foreign += sorted(f"release/{entry.name}" for entry in folders.entries(run.release) if entry.name not in RELEASED)
    foreign += sorted(f"private/{entry.name}" for entry in folders.entries(run.private) if not _ours(entry.name))
    if foreign:
        raise UsageError(f"{place}: would start over, but holds {foreign[0]!r}, which is not of a run; move it away")
    if run.private.is_dir():
        with run.lock():
            pass  # nobody else works on it
    shutil.rmtree(place)


def _ours(name: str) -> bool:
    return (
        name in KEPT or atomic.is_temporary(name) or name.startswith("benchmark-") or name.endswith("-scores.parquet")
    )


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. The properties name its files; they need not exist yet."""

    path: Path

    @property
    def release(self) -> Path:
        return self.path / "release"

    @property
    def private(self) -> Path:
        return self.path / "private"

    @property
    def config(self) -> Path:
        return self.release / "config.yaml"

    @property
    def claim(self) -> Path:
        return self.release / "claim.json"

    @property
    def ledger(self) -> Path:
        return self.release / "ledger.json"

    @property
    def model(self) -> Path:
        return self.release / "model"

    @property
    def audit(self) -> Path:
        return self.release / "audit.json"

    @property
    def games(self) -> Path:
        """`release/games/`: one document a game that was played (dpaudit.record)."""
        return self.release / "games"

    @property
    def benchmark(self) -> Path:
        return self.release / "benchmark.json"

    @property
    def environment(self) -> Path:
        return self.release / "environment.json"

    @property
    def coins(self) -> Path:
        return self.private / "coins.parquet"

    @property
    def scores(self) -> Path:
        return self.private / "scores.parquet"

    @property
    def metrics(self) -> Path:
        return self.private / "metrics.jsonl"

    @property
    def noise_key(self) -> Path:
        return self.private / "noise.key"

    @property
    def folders(self) -> Path:
        return self.private / "folders.json"

    @property
    def checkpoints(self) -> Path:
        return self.private / "checkpoints"

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Make the folders of a new run, or take up an unfinished creation; UsageError for a folder in other use."""
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path}: is a file; a run needs a folder")
        try:
            names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        except OSError as error:
            raise atomic.failure(path, error, "read") from error
        if names and not run._looks_like_a_run(names):
            raise UsageError(f"--out {path}: is not empty and not a run folder; choose a new or empty folder")
        atomic.make_folder(path)
        run.require_plain()
        run.make_parts()
        return run

    def make_parts(self) -> None:
        """Make what is missing of the folders. UsageError where `private/` is not ours alone (`require_private`)."""
        atomic.make_folder(self.private, mode=0o700)
        self.require_private()
        atomic.make_folder(self.release)
        atomic.make_folder(self.model)
        atomic.make_folder(self.checkpoints, mode=0o700)

    def require_plain(self) -> None:
        """UsageError unless both parts hold ordinary files and folders only; twins are runs of their own."""
        for name in PARTS:
            folders.require_plain(self.path / name)

    def require_private(self) -> None:
        """UsageError unless `private/` belongs to this user and is closed to all others: noise keys lie there."""
        try:
            info = self.private.lstat()
        except OSError as error:
            raise atomic.failure(self.private, error, "read") from error
        if info.st_uid != os.geteuid():
            raise UsageError(f"{self.private}: belongs to another user; train in a folder of your own")
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise UsageError(
                f"{self.private}: has mode {stat.S_IMODE(info.st_mode):04o}, so others may reach the noise key; "
                "accepted: 0700, on a file system that keeps modes; train in a new folder"
            )

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration of a new run.

        `release/config.yaml` names no folder of this machine (`RunConfig.public`); the paths as they were given, and
        the folder that relative ones start from, are noted in the private part first.
        """
        note = {"started-in": str(Path.cwd()), "data.path": config.data.path, "model.path": config.model.path}
        note["sha256"] = checksums.seal(note)
        atomic.write_text(self.folders, json.dumps(note, indent=2) + "\n", mode=0o600)
        atomic.write_text(self.config, config.public().to_yaml())

    def read_config(self) -> RunConfig:
        """The configuration of this run with the paths that it was given, where the private part is at hand.

        Relative paths are taken from where the run was started. UsageError for a damaged file.
        """
        config = resolve(read_yaml(self.config))
        if not self.folders.is_file():
            return config
        try:
            note = untrusted.read_json(self.folders, untrusted.MOST_SETTINGS)
            paths = note["data.path"], note["model.path"]
            if note["sha256"] != checksums.seal(note) or not isinstance(note["started-in"], str):
                raise ValueError
            if not all(path is None or isinstance(path, str) for path in paths):
                raise ValueError
        except OSError as error:
            raise atomic.failure(self.folders, error, "read") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{self.folders}: damaged; restore it from a copy") from None
        start = Path(note["started-in"])
        data = config.data.model_copy(update={"path": _from(start, note["data.path"])})
        model = config.model.model_copy(update={"path": _from(start, note["model.path"])})
        return config.model_copy(update={"data": data, "model": model})

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run; UsageError when `path` holds none."""
        run = cls(path)
        if not path.is_dir():
            raise UsageError(f"run {path}: no such folder")
        run.require_plain()
        if not run.config.is_file():
            raise UsageError(f"run {path}: not a run folder (release/config.yaml is missing)")
        try:
            checksums.verify(run.config, untrusted.read_bytes(run.config, untrusted.MOST_CONFIGURATION))
        except OSError as error:
            raise atomic.failure(run.config, error, "read") from error
        return run

    def _looks_like_a_run(self, names: set[str]) -> bool:
        if self.config.is_file():
            return True
        # A creation that was interrupted before the configuration was written. `private` comes first and has mode
        # 0700, which tells it from somebody's build folder that happens to have a `release`.
        return (
            names <= {"release", "private"} and self.private.is_dir() and self.private.lstat().st_mode & 0o777 == 0o700
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run alone; EnvironmentFailure at once when another process has it.

        The operating system drops the lock with the process, also after kill -9, so none is ever stale. On a cluster
        that may take a while: DPAUDIT_WAIT_FOR_LOCK in the environment gives it so many seconds.
        """
        path = self.private / "lock"
        if self.release.is_dir() and not os.path.lexists(self.private):  # a release that was handed over alone
            atomic.make_folder(self.private, mode=0o700)
        try:
            descriptor = atomic.open_own(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise atomic.failure(path, error) from error
        try:
            self._take(descriptor, path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            self.require_plain()
            atomic.remove_leftovers(self.path)
            self._settle()
            yield
        finally:
            os.close(descriptor)

    def _in_use(self) -> bool:
        """Whether another process holds the lock at this moment."""
        try:
            descriptor = atomic.open_own(self.private / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _take(self, descriptor: int, path: Path) -> None:
        waiting = os.environ.get(WAIT_FOR_LOCK, "")
        deadline = time.monotonic() + (float(waiting) if waiting.isdecimal() else 0.0)
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise atomic.failure(path, error, "locked") from error
                if time.monotonic() >= deadline:
                    owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                    who = f" (process {owner})" if owner.isdigit() else ""
                    raise EnvironmentFailure(f"run {self.path}: in use by another process{who}; wait for it") from error
            time.sleep(0.2)

    def write(self, document: Document) -> None:
        """Write `release/KIND.json` (claim, environment, audit or benchmark) and its checksum."""
        self.write_sealed(self.release / f"{document.kind}.json", document.to_json().encode())

    def seal(self, path: Path) -> str:
        """Put the checksum of a file directly under `release/` into the list; returns it."""
        found = atomic.sha256_file(path)
        self._list(checksums.SUMS, {path.name: found})
        return found

    def write_sealed(self, path: Path, content: bytes) -> None:
        """Write a file below `release/` and its checksum."""
        sums = self._list(checksums.NEXT, {path.relative_to(self.release).as_posix(): checksums.digest(content)})
        atomic.write_bytes(path, content)
        atomic.write_text(self.release / checksums.SUMS, checksums.write(sums))
        (self.release / checksums.NEXT).unlink(missing_ok=True)

    def _settle(self) -> None:
        """Finish a list of checksums whose writer was killed between announcing a hash and listing it."""
        if (self.release / checksums.NEXT).exists():
            self._list(checksums.SUMS, {})
            (self.release / checksums.NEXT).unlink(missing_ok=True)

    def _list(self, name: str, new: dict[str, str]) -> dict[str, str]:
        sums = checksums.read(self.release / checksums.SUMS)
        for file, value in checksums.read(self.release / checksums.NEXT).items():
            # A process was killed between announcing a hash and listing it: it counts if its file was replaced.
            if sums.get(file) != value and (own := folders.ordinary(self.release, file)) is not None:
                found = untrusted.sha256(own, untrusted.MOST_DOCUMENT, links=False)
                sums[file] = value if found == value else sums.get(file, value)
        sums |= new
        atomic.write_text(self.release / name, checksums.write(sums))
        return sums

    def finish_model(self) -> None:
        """Declare the model complete: hash every file of `release/model`; the last write of a training."""
        hashes = {
            file.relative_to(self.model).as_posix(): atomic.sha256_file(file)
            for file in sorted(self.model.rglob("*"))
            if file.is_file() and not file.name.startswith(".") and file.name not in (MODEL_COMPLETE, MODEL_CARD)
        }
        if not hashes:
            raise ValueError("a model without files can't be complete")
        self._list(checksums.SUMS, {f"{self.model.name}/{name}": value for name, value in hashes.items()})
        atomic.write_text(self.model / MODEL_COMPLETE, json.dumps({"sha256": hashes}, indent=2) + "\n")

    def traces(self) -> tuple[Path, ...]:
        """What only a training leaves that drew its key: the key itself, training curves, checkpoints."""
        kept = sorted(self.checkpoints.glob("*")) if self.checkpoints.is_dir() else []
        return tuple(path for path in (self.noise_key, self.metrics, *kept) if os.path.lexists(path))

    def discard_damaged_checkpoints(self) -> tuple[str, ...]:
        """Delete checkpoints whose tensors are not those written; returns their names. The caller holds the lock.

        Going on from an older one repeats steps that are paid for already, with the same batches and noise.
        """
        damaged = [path for path in sorted(self.checkpoints.glob("*.safetensors")) if not atomic.tensors_intact(path)]
        for path in damaged:
            path.unlink(missing_ok=True)
        return tuple(path.name for path in damaged)

    @property
    def finished(self) -> bool:
        """Whether the model was declared complete (its hashes are not checked here)."""
        return (self.model / MODEL_COMPLETE).is_file()

    def require_finished(self) -> None:
        """Check that the run is whole, hash by hash; UsageError that names the file and what to do."""
        marker = self.model / MODEL_COMPLETE
        if not marker.is_file():
            after = "wait for it" if self._in_use() else f"dpaudit train --resume {self.path}"
            raise UsageError(f"run {self.path}: its training has not finished; {after}")
        remedy = f"restore it from a copy, or delete {self.model} and run dpaudit train --resume {self.path}"
        try:
            hashes = untrusted.read_json(marker, untrusted.MOST_SETTINGS)["sha256"]
            if not isinstance(hashes, dict) or not hashes or any("\0" in name for name in hashes):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{marker}: damaged; {remedy}") from None
        for name, expected in hashes.items():
            file = self.model / name
            if not file.resolve().is_relative_to(self.model.resolve()):
                raise UsageError(f"{marker}: damaged (names a file outside the model); {remedy}")
            if not file.is_file():
                raise UsageError(f"{file}: missing; {remedy}")
            if untrusted.sha256(file, untrusted.MOST_RELEASED) != expected:
                raise UsageError(f"{file}: damaged (its SHA-256 is not the one recorded); {remedy}")
