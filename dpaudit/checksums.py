"""Checksums of the small files of a run: a damaged file is named when it is read, with what to do about it.

`release/SHA256SUMS` has the format of `sha256sum`, so anyone can check a release with `sha256sum -c SHA256SUMS`. It
names the files that are written whole and seldom: configuration, claim, environment, audit, benchmark, and the list of
the model's own hashes. The ledger changes at every step and carries its hash inside (`seal`).

A new hash is written to `.SHA256SUMS.next` before its file is replaced and becomes valid after it, so that a process
killed in between leaves no false alarm: either hash is accepted for that file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpaudit import untrusted
from dpaudit.errors import UsageError

SUMS = "SHA256SUMS"
NEXT = ".SHA256SUMS.next"
MOST_BYTES = 1 << 20  # a list of ten files has one kilobyte
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S[^\x00-\x1f]*)")

# What makes a file again that can be made again; the others come from a copy.
_REMEDY = {
    "audit.json": "delete it and run dpaudit audit again",
    "benchmark.json": "delete it and run dpaudit benchmark again",
}


def digest(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path) -> dict[str, str]:
    """File name -> hash; lines that are not of the format are left out, a missing file is empty."""
    try:
        text = untrusted.read_text(path, MOST_BYTES, errors="replace")
    except (OSError, UsageError):
        return {}
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {match.group(2): match.group(1) for match in found if match is not None}


def write(sums: Mapping[str, str]) -> str:
    """The text of a list, sorted by name."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def verify(path: Path, content: bytes) -> None:
    """Check what was read from `path` against the list beside it; UsageError names the file and what to do.

    A file that no list names passes: it may come from elsewhere.
    """
    listed = _accepted(path)
    if not listed or digest(content) in listed:
        return
    if digest(content) in _accepted(path):  # it was replaced while we read it
        return
    remedy = _REMEDY.get(path.name, "restore it from a copy")
    raise UsageError(f"{path}: damaged (its SHA-256 is not the one in {SUMS}); {remedy}")


def _accepted(path: Path) -> set[str]:
    places = ((path.parent, path.name), (path.parent.parent, f"{path.parent.name}/{path.name}"))  # games lie one lower
    # NEXT before SUMS: the first becomes the second.
    lists = ((read(folder / name), key) for folder, key in places for name in (NEXT, SUMS))
    return {found[key] for found, key in lists if key in found}


def seal(tree: Mapping[str, Any]) -> str:
    """The hash that a JSON object carries in its own field `sha256`: of everything else in it, whatever its layout."""
    rest = {name: value for name, value in tree.items() if name != "sha256"}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
