"""Whether the files of a release are those that were written: in sentences, for the page and for machines.

Hashes beside the files find accidents and careless edits. Whoever edits a file can edit its hash as well: only a
signature by somebody else's key, or a hash that was published elsewhere, says more (docs/threat-model.md).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpaudit import checksums
from dpaudit.runs import MODEL_CARD, MODEL_COMPLETE
from dpaudit.untrusted import MOST_DOCUMENT, read_bytes
from reports.text import clean

COMPLETE = f"model/{MODEL_COMPLETE}"
CARD = f"model/{MODEL_CARD}"
MOST_NAMED = 8  # files of one kind in a notice


def notices(folder: Path, hashes: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with a release; nothing where all fits. hashes: SHA-256 of every file in it, by its name there."""
    found: list[str] = []
    if "config.yaml" in hashes and "ledger.json" not in hashes:  # no list names it: it changes at every step
        found.append("ledger.json is missing: nothing tells where private data was touched.")
    sums = checksums.read(folder / checksums.SUMS)
    if not sums:
        missing = "is empty" if checksums.SUMS in hashes else "is missing"
        found.append(f"{checksums.SUMS} {missing}: nothing tells whether these files are those that dpaudit wrote.")
    else:
        unlisted = [name for name in hashes if _worth_listing(name) and name not in sums]
        found += _about("not listed in SHA256SUMS", unlisted)
    found += _about("listed in SHA256SUMS and missing", [name for name in sums if name not in hashes])
    found += _about("not the file listed in SHA256SUMS", [n for n in sums if hashes.get(n, sums[n]) != sums[n]])
    return (*found, *_model(folder, hashes))


def _worth_listing(name: str) -> bool:
    """Documents, configuration and weights; the list itself, the ledger (sealed inside) and a signature are not."""
    known = ("config.yaml", "claim.json", "audit.json", "benchmark.json", "environment.json")
    return name in known or name.endswith(".safetensors") or name.startswith("games/")


def _about(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        yield f"{what[0].upper()}{what[1:]}: {', '.join(clean(name, 60) for name in sorted(names)[:MOST_NAMED])}{more}."


def _model(folder: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    """The list that was written when training ended against the files of the model."""
    weights = [name for name in hashes if name.startswith("model/") and name not in (COMPLETE, CARD)]
    if COMPLETE not in hashes:
        if weights:
            yield f"{COMPLETE} is missing: nothing tells whether the model is the one that was trained."
        return
    try:
        listed = json.loads(read_bytes(folder / COMPLETE, MOST_DOCUMENT))["sha256"]
        recorded = {f"model/{name}": str(value) for name, value in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield f"{COMPLETE} is damaged: nothing tells whether the model is the one that was trained."
        return
    changed = [name for name, value in recorded.items() if name in hashes and hashes[name] != value]
    yield from _about("changed since training ended", changed)
    yield from _about("missing since training ended", [name for name in recorded if name not in hashes])
    yield from _about("in the model, but not when training ended", [name for name in weights if name not in recorded])
