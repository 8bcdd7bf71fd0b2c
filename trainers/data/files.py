"""Tables of rows in files that somebody else may have made: JSONL, JSON, Parquet (whole or in shards), Arrow folders.

`open_table` finds what a name inside `data.path` means:

    train.jsonl, train.json, train.parquet        a file
    FOLDER                                        Parquet shards, or what `datasets.Dataset.save_to_disk` wrote
    train                                         train.jsonl …; train-00000-of-00003.parquet …, also below data/

Nothing outside `data.path` is opened, nothing is unpickled, no code that comes with data is run.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpaudit import untrusted, untrusted_tables
from dpaudit.errors import UsageError, rejected
from trainers.data import rows
from trainers.data.rows import Row, Source, Volume, inside

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
LOOK_AT = 100  # rows of JSON that may differ in their keys
MOST_JSON = 1 << 30  # bytes of a .json list, which is read whole; JSONL is read line by line
JSON_RATIO = 6  # of what its rows may take to its bytes, beyond untrusted.MOST_DECODED
ACCEPTED = "a .jsonl, .json or .parquet file, a folder of Parquet shards or of save_to_disk, or the name of a split"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?\.(parquet|arrow)$")


@dataclass(frozen=True)
class Table:
    """Rows of one split. parts: its files, in order. folder: where pictures lie that rows name by path."""

    label: str
    parts: tuple[Source, ...]
    folder: Path

    @property
    def kind(self) -> str:
        """What it is, in words."""
        suffix = self.parts[0].path.suffix.lower().removeprefix(".")
        words = {"jsonl": "JSONL", "json": "JSON", "parquet": "Parquet", "arrow": "save_to_disk"}[suffix]
        return words if len(self.parts) == 1 else f"{words}, {len(self.parts)} shards"

    def columns(self) -> tuple[str, ...]:
        """Names of the columns; of JSON those of the first rows. Raises UsageError for a damaged or empty table."""
        first = self.parts[0]
        if first.path.suffix.lower() in (".parquet", ".arrow"):
            return tuple(_schema_names(first))
        names: dict[str, None] = {}
        for _, row in itertools.islice(_rows(first, None), LOOK_AT):
            names |= dict.fromkeys(row)
        if not names:
            raise UsageError(f"{self.label}: no rows")
        return tuple(names)

    def first(self) -> Row:
        """The first row, whole."""
        for part in self.parts:
            for _, row in _rows(part, None):
                return row
        raise UsageError(f"{self.label}: no rows")

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[Source, int, Row]]:
        """Rows in order, reduced to the columns named, each with its file and its number there (from 1)."""
        for part in self.parts:
            for number, row in _rows(part, wanted):
                yield part, number, row


def open_table(root: Path, name: str, field: str, pictures: Path | None = None) -> Table:
    """The table that the configuration field `field` names; errors name that field."""
    path = inside(root, name)
    if path is None:
        raise rejected(field, name, "a file name inside data.path (not absolute, no '..', no link that leads out)")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise rejected(field, name, f"{ACCEPTED}{_convert(path)}")
        files = [path]
    elif path.is_dir():
        files = _folder(path, name, field)
    else:
        files = _split(root, name)
    if not files:
        raise UsageError(f"{field}: no file {name!r} in {root}; accepted: {ACCEPTED}")
    home = root.resolve()
    for file in files:
        if not file.resolve().is_relative_to(home):
            raise rejected(field, name, "files inside data.path (no link that leads out)")
    _whole(files, field)
    volume = Volume(sum(file.stat().st_size for file in files))  # of all shards together
    labels = [name if len(files) == 1 else f"{name}/{file.name}" for file in files]
    parts = tuple(Source(file.resolve(), label, home, volume) for file, label in zip(files, labels, strict=True))
    return Table(name, parts, pictures or files[0].resolve().parent)


def _convert(path: Path) -> str:
    """The line that turns a table of another kind into one that is read."""
    reader = {".csv": "read_csv(I)", ".tsv": "read_csv(I, sep='\\t')", ".xlsx": "read_excel(I)"}.get(
        path.suffix.lower()
    )
    if reader is None:
        return ""
    call = reader.replace("I", repr(path.name))
    return f"; convert it: python -c \"import pandas as p; p.{call}.to_parquet('{path.stem}.parquet')\""


def _folder(path: Path, name: str, field: str) -> list[Path]:
    if (path / "state.json").is_file():
        return _saved(path, name)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        shown = ", ".join(f"{name}/{split}" for split in splits) or "its splits (there are none)"
        raise rejected(field, name, f"one split of this DatasetDict: {shown}")
    files = sorted(file for file in path.glob("*.parquet") if file.is_file())
    stems = {match["stem"] for file in files if (match := _SHARD.match(file.name))}
    if len(stems) > 1:
        raise rejected(field, name, f"the shards of one split: {', '.join(f'{name}/{stem}' for stem in sorted(stems))}")
    if not files:
        raise rejected(field, name, "a folder with .parquet files, or with what save_to_disk wrote (state.json)")
    return files


def _saved(path: Path, name: str) -> list[Path]:
    """The Arrow files of a folder of `Dataset.save_to_disk`."""
    try:
        state = untrusted.read_json(untrusted.part_of(path, "state.json"), untrusted.MOST_CONFIGURATION)
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{name}: state.json is not that of save_to_disk") from None
    if state.get("_indices_files"):
        raise UsageError(f"{name}: rows are chosen by an index; save it again after .flatten_indices()")
    files = [inside(path, item) for item in names]
    missing = [item for item, file in zip(names, files, strict=True) if file is None or not file.is_file()]
    if missing:
        raise UsageError(f"{name}: {len(missing)} of {len(names)} Arrow files are missing; copy the folder again")
    return [file for file in files if file is not None]


def _split(root: Path, name: str) -> list[Path]:
    """Files of a split by its name: one file, or shards as the hub lays them out."""
    given = Path(name)
    for suffix in SUFFIXES[:3]:
        single = inside(root, f"{name}{suffix}")
        if single is not None and single.is_file():
            return [single]
    for folder in (root / given.parent, root / given.parent / "data"):
        if folder.is_dir():
            found = sorted(file for file in folder.glob(f"{_plain(given.name)}-*.parquet") if _SHARD.match(file.name))
            if found:
                return found
    return []


def _plain(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _whole(files: Sequence[Path], field: str) -> None:
    """All shards of a split, or one line that names those that are missing."""
    numbered = [match for file in files if (match := _SHARD.match(file.name))]
    if not numbered:
        return
    total = int(numbered[0]["total"])
    gone = sorted(set(range(total)) - {int(match["number"]) for match in numbered})
    if gone:
        shown = f"{numbered[0]['stem']}-{gone[0]:05d}-of-{total:05d}"
        raise UsageError(f"{field}: {total - len(gone)} of {total} shards are here; missing: {shown} and the like")


def _rows(source: Source, wanted: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    suffix = source.path.suffix.lower()
    if suffix in (".parquet", ".jsonl"):
        yield from rows.read_rows(source, [], wanted)
    elif suffix == ".json":
        yield from _json_rows(source, wanted)
    else:
        yield from _arrow_rows(source, wanted)


def _json_rows(source: Source, wanted: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    data = untrusted.read_bytes(source.path, MOST_JSON)
    try:
        with untrusted.bounded_memory(untrusted.MOST_DECODED + JSON_RATIO * len(data)):
            tree: Any = untrusted.parse_json(data.decode("utf-8-sig"))
    except MemoryError:
        raise UsageError(f"{source.label}: takes too much memory as a whole; save it as JSON Lines (.jsonl)") from None
    except ValueError:
        first = data.lstrip(b"\xef\xbb\xbf \r\n\t").split(b"\n", 1)[0]
        if not _is_object(first):
            raise UsageError(f"{source.label}: not JSON in UTF-8, or cut off") from None
        raise UsageError(f"{source.label}: is JSON Lines; rename it to {source.path.stem}.jsonl") from None
    if isinstance(tree, dict):
        lists = [key for key, value in tree.items() if isinstance(value, list)]
        if len(lists) != 1:
            found = "no list" if not lists else f"{len(lists)} lists ({', '.join(map(str, lists[:5]))})"
            line = f"jq '.{lists[0]}' {source.path.name} > rows.json" if lists else "a list of objects"
            raise UsageError(f"{source.label}: an object with {found}; accepted: a list of rows, e.g. {line}")
        tree = tree[lists[0]]
    if not isinstance(tree, list):
        raise UsageError(f"{source.label}: must be a list of objects, got {type(tree).__name__}")
    for number, row in enumerate(tree, 1):
        if not isinstance(row, dict):
            raise source.fault(number, "row", f"must be a JSON object, got {type(row).__name__}")
        yield number, row if wanted is None else {name: row[name] for name in wanted if name in row}


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(untrusted.parse_json(line), dict)
    except ValueError:
        return False


def _schema_names(source: Source) -> list[str]:
    parquet = source.path.suffix.lower() == ".parquet"
    try:
        if parquet:
            with untrusted_tables.parquet_file(source.path) as file:
                return list(file.schema_arrow.names)
        with untrusted_tables.arrow_stream(source.path) as stream:
            return list(stream.schema.names)
    except (OSError, ValueError):
        kind = "Parquet" if parquet else "Arrow"
        raise UsageError(f"{source.label}: not a readable {kind} file") from None


def _arrow_rows(source: Source, wanted: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    try:
        with untrusted_tables.arrow_stream(source.path) as stream:
            yield from enumerate(untrusted_tables.arrow_rows(stream, wanted, rows.ROWS_AT_ONCE), 1)
    except (OSError, ValueError):
        raise UsageError(f"{source.label}: not a readable Arrow file") from None
