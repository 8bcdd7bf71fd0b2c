"""The folder of an audit without a run: coins and plan before the first step, scores, the finished document.

It has the two parts of a run folder: `release/` (claim.json, ledger.json with the hash of the coins, audit.json) and
`private/` (settings.json, the key, coins.parquet, scores). An audit that was interrupted goes on in its folder with the
same key and coins; a finished one is never continued or overwritten.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attacks.canaries import Coins, Plan, check_coins, save_coins
from dpaudit import atomic, folders, untrusted
from dpaudit.documents import AuditDocument, Claim, ClaimDocument, LedgerDocument, LedgerRow
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.packages import OWN
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder

DEFAULT = "audits"
MOST_FOLDERS = 10_000
INSTALLED = frozenset({"site-packages", "dist-packages"})


class AuditFolder:
    """`path` with its two parts. Made by `take`; the caller holds `run.lock()` while it works."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, RunFolder(path)
        self.settings_file = self.run.private / "settings.json"
        self.runs_log = self.run.private / "runs.jsonl"

    @classmethod
    def take(cls, out: Path | None, name: str, settings: dict[str, Any]) -> "AuditFolder":
        """A new folder, or an unfinished audit with the same settings. Raises UsageError for a folder in other use.

        out None: the first of audits/NAME-001, -002, … that is new or can be gone on with.
        """
        if out is not None:
            folders.require_outside_runs("--out", out)
            folder = cls(out)
            problem = folder._problem(settings)
            if problem is not None:
                if folder.run.audit.exists():
                    with contextlib.suppress(EnvironmentFailure), folder.run.lock():
                        pass  # finishes what a process that was killed at its last write left undone
                raise UsageError(f"--out {out}: {problem}")
            return folder._create(settings)
        for number in range(1, MOST_FOLDERS):
            folder = cls(Path(DEFAULT) / f"{name}-{number:03d}")
            if folder._problem(settings) is None:
                return folder._create(settings)
        raise UsageError(f"--out: {DEFAULT}/{name}-001 and the following are all in use; name a folder")

    def _problem(self, settings: dict[str, Any]) -> str | None:
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            return "is a file; an audit needs a folder"
        if self.run.audit.exists():
            return "holds a finished audit; choose another folder"
        if not self.settings_file.is_file():
            inside = {entry.name for entry in self.path.iterdir()}
            return None if inside <= {"release", "private"} and not any(self.run.release.glob("*")) else "is not empty"
        try:
            there = untrusted.read_json(self.settings_file, untrusted.MOST_SETTINGS)
            if not isinstance(there, dict):
                raise ValueError
        except (OSError, ValueError):
            return f"{self.settings_file} is damaged; choose another folder"
        different = sorted(key for key in {*there, *settings} if there.get(key) != settings.get(key))
        if not different:
            return None
        what = {"code": "another version of your code"}.get(different[0], f"another {different[0]}")
        return f"holds an unfinished audit with {what}; choose another folder"

    def _create(self, settings: dict[str, Any]) -> "AuditFolder":
        atomic.make_folder(self.path)
        atomic.make_folder(self.run.private, mode=0o700)
        atomic.make_folder(self.run.release)
        if not self.settings_file.is_file():
            atomic.write_text(self.settings_file, json.dumps(settings, indent=2, sort_keys=True) + "\n", mode=0o600)
        return self

    def key(self, seed: int | None) -> Key:
        """The audit's key: the one on disk, else a fresh one (from `seed` where given)."""
        place = self.run.noise_key
        if place.exists():
            return Key.load(place)
        key = Key.fresh() if seed is None else Key.from_seed(seed)
        key.save(place)
        return key

    def coins(self, frame: pd.DataFrame, plan: Plan, rows: Sequence[LedgerRow]) -> Coins:
        """Write coins and plan, their hash into the ledger, and read them back; on disk already: check them.

        Raises InvalidGame when the file is not the one whose hash the ledger holds, or not these coins.
        """
        if not self.run.ledger.is_file():
            digest = save_coins(self.run.coins, frame, plan)
            ledger = LedgerDocument(coins_sha256=digest, rows=tuple(rows), spent=None)
            atomic.write_document(self.run.ledger, ledger.sealed())
        return check_coins(self.run.coins, LedgerDocument.read(self.run.ledger).coins_sha256)

    def save_scores(self, name: str, frame: pd.DataFrame) -> None:
        """Write private/NAME-scores.parquet."""
        atomic.write_frame(self.run.private / f"{name}-scores.parquet", frame, mode=0o600)

    def finish(self, document: AuditDocument, claim: Claim, reasons: Sequence[str]) -> None:
        """Write claim and document; the document is last."""
        self.run.write(ClaimDocument(claim=claim, releasable=not reasons, reasons=tuple(reasons)))
        self.run.write(document)


def loaded_code() -> str:
    """Hash of the Python files below the working directory that are imported now.

    dpaudit's own are left out, and installed packages (a virtual environment often lies inside the project): which of
    those are imported depends on flags such as the executor, not on the code under audit.
    """
    modules = list(sys.modules.items())
    own = ("dpaudit", *OWN)
    files = [getattr(module, "__file__", None) for name, module in modules if name.split(".")[0] not in own]
    folder, digest = Path.cwd().resolve(), hashlib.sha256()
    for file in sorted({Path(file).resolve() for file in files if file}):
        if file.is_relative_to(folder) and file.suffix == ".py" and file.is_file() and not INSTALLED & {*file.parts}:
            digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(untrusted.read_bytes(file, untrusted.MOST_DOCUMENT))
    return digest.hexdigest()


def settings_sha256(settings: dict[str, Any]) -> str:
    """Hash of the settings, for the document."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
