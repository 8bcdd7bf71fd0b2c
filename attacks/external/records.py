"""The records and coins of a model's owner: local files, checked row by row before anything is computed from them.

Records have the columns of our local data format (trainers.data.local) and an `id`: rows with the same id are one unit,
what one person contributes. With `--images` rows name their picture by `image_id`. Coins are `id, member`, one row an
id. Ids appear in messages to their owner, never in a document.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dpaudit.analysis import tables
from dpaudit.errors import UsageError, rejected
from trainers.data import rows
from trainers.data.pictures import PLAINLY
from trainers.data.rows import Row, Source
from trainers.data.stored import Shelf, Stored, store
from trainers.records import Image, Picture, Question, Unit


def open_file(path: Path, flag: str) -> Source:
    """A data file named on the command line."""
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    if path.suffix.lower() not in (".parquet", ".jsonl"):
        raise rejected(flag, path.name, "a .parquet or .jsonl file")
    return Source(path=path, label=f"{flag} {path.name}", root=path.parent.resolve())


def read_units(records: Path, images: Path | None = None) -> dict[str, Unit]:
    """Units by id, in the order of their first rows. Raises UsageError that names file, row and field."""
    source = open_file(records, "--records")
    pictures = {} if images is None else _pictures(open_file(images, "--images"))
    where = "image" if images is None else "image_id"
    shelf = Shelf()
    found: dict[str, dict[str, tuple[Image, list[Question]]]] = {}  # by unit and content
    for number, row in rows.read_rows(source, ["id", where, "question", "answer"], ["kind"]):
        unit = str(rows.key(source, number, row, "id"))
        if images is None:
            picture = _stored(source, number, row, shelf)
        else:
            name = str(rows.key(source, number, row, "image_id"))
            if name not in pictures:
                raise source.fault(number, "image_id", "no such picture in --images")
            picture = pictures[name]
        kind = rows.text(source, number, row, "kind") if row.get("kind") is not None else "question"
        question = Question(rows.text(source, number, row, "question"), rows.text(source, number, row, "answer"), kind)
        shown = found.setdefault(unit, {}).setdefault(picture.content, (picture.frames[0], []))
        shown[1].append(question)
    if not found:
        raise UsageError(f"{source.label}: no rows")
    return {
        unit: Unit(
            id=unit,
            pictures=tuple(
                Picture(f"{unit}-{place}", image, tuple(questions))
                for place, (image, questions) in enumerate(shown.values())
            ),
        )
        for unit, shown in found.items()
    }


def _stored(source: Source, number: int, row: Row, shelf: Shelf) -> Stored:
    data, file = rows.found(source, number, row.get("image"), "image", source.path.parent)
    return store(source, number, data, PLAINLY, file or shelf)


def _pictures(source: Source) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    shelf = Shelf()
    for number, row in rows.read_rows(source, ["image_id", "image"]):
        name = str(rows.key(source, number, row, "image_id"))
        if name in found:
            raise source.fault(number, "image_id", "occurs a second time in this file")
        found[name] = _stored(source, number, row, shelf)
    return found


def read_coins(path: Path) -> pd.DataFrame:
    """id (text) and member (bool), in the order of the file. Raises UsageError with one line."""
    return tables.read_coins(path, f"--coins {path}")


def join(units: Mapping[str, object], coins: pd.DataFrame) -> pd.DataFrame:
    """The coins in the order of the records. UsageError when an id has no coin or no record, or too few of a class."""
    tossed = set(coins["id"])
    without = [unit for unit in units if unit not in tossed]
    if without:
        raise UsageError(f"--coins: {len(without)} ids of --records have no coin, the first is {without[0]!r}")
    foreign = [name for name in coins["id"] if name not in units]
    if foreign:
        raise UsageError(f"--coins: {len(foreign)} ids are not in --records, the first is {foreign[0]!r}")
    ordered = coins.set_index("id").loc[list(units)].reset_index()
    tables.both_classes(ordered["member"].to_numpy(dtype=bool), "--coins:", "of", "records")
    return ordered


def shared_pictures(units: Mapping[str, Unit]) -> list[tuple[str, str]]:
    """Pairs of different ids that show a picture of equal pixels."""
    owner: dict[str, str] = {}
    pairs = []
    for name, unit in units.items():
        for content in {rows.content_sha256(picture.pixels) for picture in unit.pictures}:
            first = owner.setdefault(content, name)
            if first != name:
                pairs.append((first, name))
    return pairs
