"""Local sets of questions about pictures: any of the formats of trainers.data.formats, in files of trainers.data.files.

Rows that show the same picture (equal pixels) are one picture with several questions, so that protecting the picture
protects all of them; rows with several pictures put all of these into one unit. `data.unit=COLUMN` groups pictures into
larger units. The order is that of the files.

`Dataset.origin` holds hashes of the files, `Dataset.warnings` counts private pictures and names files of the owner:
both are for the owner of the data and must stay out of whatever is released, since a hash of the training file settles
who is in it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpaudit.config import DataConfig
from dpaudit.documents import LedgerRow
from dpaudit.errors import UsageError, rejected
from trainers.data import files, formats, near, pictures, rows, said
from trainers.data.files import Table
from trainers.data.formats import Format, Sample, many
from trainers.data.pictures import Look
from trainers.data.rows import Source
from trainers.data.stored import Shelf, Stored, store
from trainers.records import Dataset, Picture, Question, Unit

PICTURE_UNIT = "image (with all its questions)"
_Key = tuple[str, str | int]  # ("picture", content hash) or ("unit", value of the unit column)


@dataclass
class _Rows:
    """What one split shows together: pictures in order, with their questions while these are being collected."""

    shown: tuple[Stored, ...]
    questions: list[Question] = field(default_factory=list)
    group: str | None = None


@dataclass
class Split:
    """One split while it is read. rows: by (unit, contents shown), in order of first appearance."""

    label: str
    rows: dict[tuple[_Key, tuple[str, ...]], _Rows] = field(default_factory=dict)
    pictures: dict[str, Stored] = field(default_factory=dict)  # by content
    names: dict[str, list[str]] = field(default_factory=dict)  # content -> what the files call it
    links: dict[_Key, _Key] = field(default_factory=dict)  # units that a row with several pictures joins
    notes: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    format: str = ""

    def root(self, owner: _Key) -> _Key:
        """The unit that `owner` has become part of."""
        while (above := self.links.get(owner, owner)) != owner:
            owner = above
        return owner

    def join(self, owners: Sequence[_Key]) -> _Key:
        """One unit for all of `owners`."""
        first = self.root(owners[0])
        for owner in owners[1:]:
            other = self.root(owner)
            if other != first:
                self.links[other] = first
        return first

    def see(self, content: str, shown: Stored, name: str) -> None:
        """Note a picture under the name that its file has."""
        self.pictures.setdefault(content, shown)
        known = self.names.setdefault(content, [])
        if name not in known:
            known.append(name)

    def units(self, prefix: str) -> dict[_Key, Unit]:
        """Units with ids of running numbers: an id must not carry a person's name."""
        members: dict[_Key, list[_Rows]] = {}
        for (owner, _), part in self.rows.items():
            members.setdefault(self.root(owner), []).append(part)
        return {
            owner: Unit(
                id=f"{prefix}-{index:06d}",
                pictures=tuple(_picture(f"{prefix}-{index:06d}-{place}", item) for place, item in enumerate(group)),
            )
            for index, (owner, group) in enumerate(members.items())
        }

    def groups(self, prefix: str) -> dict[str, str]:
        """The value of the group column by unit id. Raises UsageError for two values in one unit."""
        ids = {owner: unit.id for owner, unit in self.units(prefix).items()}
        found: dict[str, str] = {}
        for (owner, _), part in self.rows.items():
            unit = ids[self.root(owner)]
            if part.group is not None and found.setdefault(unit, part.group) != part.group:
                raise UsageError(f"{self.label}: the column of groups differs between rows of one unit")
        return found

    def contents(self) -> dict[_Key, str]:
        """What each unit holds, as text."""
        found: dict[_Key, str] = {}
        for owner, shown in self.rows:
            found[self.root(owner)] = found.get(self.root(owner), "") + "".join(shown)
        return found


def _picture(name: str, part: _Rows) -> Picture:
    frames = [frame for item in part.shown for frame in item.frames]
    return Picture(id=name, pixels=frames[0], questions=tuple(part.questions), beside=tuple(frames[1:]))


# -- reading one split -----------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """How the rows of one split are read. library: pictures by image_id, where they lie in a table of their own."""

    table: Table
    look: Look
    unit: str | None
    group: str | None
    library: dict[str | int, Stored] | None = None
    library_label: str = ""
    owners: dict[str | int, str | int] = field(default_factory=dict)  # unit of a picture, from its own table
    group_of: dict[Any, Any] = field(default_factory=dict)  # group of a picture, from its own table
    used: dict[str | int, str | int | None] = field(default_factory=dict)
    cache: dict[bytes, Stored] = field(default_factory=dict)  # the same bytes are decoded once
    shelf: Shelf = field(default_factory=Shelf)

    def read(self, how: Format) -> Split:
        """All rows of the split."""
        split = Split(self.table.label)
        mine = (None if self.owners else self.unit, None if self.group_of else self.group)
        more = [name for name in mine if name is not None]
        for source, number, row, sample in how.samples(self.table, more):
            contents = []
            for reference in sample.pictures:
                shown, name = self._picture(source, number, reference)
                split.see(shown.content, shown, name)
                contents.append(shown.content)
            owner = self._owner(split, source, number, row, sample, contents)
            for turn_owner, seen, question in _questions(owner, sample, contents):
                part = split.rows.setdefault((turn_owner, seen), _Rows(tuple(split.pictures[item] for item in seen)))
                part.questions.append(question)
                self._group(source, number, row, sample.pictures[0], part)
        split.notes += list(how.counts.notes(self.table.label))
        split.format = f"{how.name} ({self.table.kind})"
        return split

    def _group(self, source: Source, number: int, row: rows.Row, reference: Any, part: _Rows) -> None:
        if self.group is None:
            return
        given = self.group_of.get(reference) if self.group_of else row.get(self.group)
        if given is None and not self.group_of and self.group not in row:
            raise source.fault(number, self.group, "missing")
        value = " ".join(str(rows.key(source, number, {self.group: given}, self.group)).split())[:80]
        if part.group not in (None, value):
            raise source.fault(number, self.group, "differs from an earlier row of the same unit")
        part.group = value

    def _picture(self, source: Source, number: int, reference: Any) -> tuple[Stored, str]:
        if self.library is not None:
            name = rows.key(source, number, {"image_id": reference}, "image_id")
            if name not in self.library:
                raise source.fault(number, "image_id", f"no such picture in {self.library_label}")
            return self.library[name], str(name)
        data, file = rows.found(source, number, reference, "image", self.table.folder)
        digest = hashlib.sha256(data).digest()
        if digest not in self.cache:
            few = len(self.cache) < near.MOST  # beyond that near-duplicates are not looked for
            self.cache[digest] = store(source, number, data, self.look, file or self.shelf, mark=few)
        return self.cache[digest], _name_of(reference) or f"bytes {digest.hex()[:8]}"

    def _owner(
        self, split: Split, source: Source, number: int, row: rows.Row, sample: Sample, contents: Sequence[str]
    ) -> _Key:
        if self.unit is None:
            return split.join([("picture", content) for content in contents])
        if self.owners:
            return split.join([("unit", self.owners[name]) for name in sample.pictures])
        if self.unit not in row:
            raise source.fault(number, self.unit, "missing")
        value = rows.key(source, number, row, self.unit)
        if self.library is not None:
            for name in sample.pictures:
                if self.used.setdefault(name, value) != value:
                    raise source.fault(number, self.unit, "differs from an earlier row about the same picture")
        return ("unit", value)


def _name_of(reference: Any) -> str | None:
    """What a file calls a picture, if anything."""
    if isinstance(reference, dict):
        reference = reference.get("path")
    return reference[-80:] if isinstance(reference, str) and not reference.startswith("data:") else None


def _questions(
    owner: _Key, sample: Sample, contents: Sequence[str]
) -> Iterator[tuple[_Key, tuple[str, ...], Question]]:
    """The turns of a sample as questions, each with what was said before it and the pictures shown by then."""
    history: tuple[tuple[str, str], ...] = ()
    for turn in sample.turns:
        yield owner, tuple(contents[: turn.shown]), Question(turn.text, turn.answer, turn.kind, turn.accepted, history)
        history = (*history, (turn.text, turn.answer))


def _library(
    table: Table, look: Look, unit: str | None, group: str | None
) -> tuple[dict[str | int, Stored], dict[str | int, str | int], dict[Any, Any]]:
    """(pictures, units, groups) by image_id of a table of pictures."""
    columns = table.columns()
    name = next((name for name in ("image_id", "imageId", "id") if name in columns), None)
    if name is None or "image" not in columns:
        gone = "image_id" if name is None else "image"
        raise UsageError(f"{table.label}: no column {gone!r}; columns: {', '.join(columns[:20])}")
    found: dict[str | int, Stored] = {}
    owners: dict[str | int, str | int] = {}
    groups: dict[Any, Any] = {}
    shelf = Shelf()
    for source, number, row in table.rows([name, "image", *(item for item in (unit, group) if item)]):
        key = rows.key(source, number, row, name)
        if key in found:
            raise source.fault(number, name, "occurs a second time in this file")
        data, file = rows.found(source, number, row.get("image"), "image", table.folder)
        found[key] = store(source, number, data, look, file or shelf, mark=len(found) < near.MOST)
        if unit and unit in row:
            owners[key] = rows.key(source, number, row, unit)
        if group and group in row:
            groups[key] = row[group]
    return found, owners, groups


def read_split(config: DataConfig, split: str, group: str | None = None) -> Split:
    """The split `train` or `test` of a local set. Raises UsageError."""
    root = _root(config)
    name, images = getattr(config, split), getattr(config, f"{split}_images")
    if name is None:
        raise rejected(f"data.{split}", None, "a file name inside data.path")
    look = Look(pictures.colour(config.background), config.frames)
    folder, library = None, None
    owners: dict[str | int, str | int] = {}
    groups: dict[Any, Any] = {}
    origin: dict[str, str] = {}
    if images is not None:
        folder = rows.inside(root, images)
        if folder is None or not folder.is_dir() or (folder / "state.json").is_file():
            folder = None
            shown = files.open_table(root, images, f"data.{split}-images")
            library, owners, groups = _library(shown, look, config.unit, group)
            origin = _hashes(shown)
    table = files.open_table(root, name, f"data.{split}", folder)
    how = formats.recognise(table, config.post_prompt, joined=library is not None)
    if how.folder is not None and folder is None and (table.folder / how.folder).is_dir():
        table = Table(table.label, table.parts, table.folder / how.folder)
    reader = _Reader(table, look, config.unit, group, library, images or "", owners, groups)
    found = reader.read(how)
    found.origin = origin | _hashes(table)
    if not found.rows:
        raise UsageError(f"{table.label}: no rows" + (" with a picture" if how.counts.without_picture else ""))
    if library is not None and len({name for names in found.names.values() for name in names}) < len(library):
        unused = len(library) - len({name for names in found.names.values() for name in names})
        found.notes.append(f"{images}: {many(unused, 'picture')} without a question left out")
    found.notes += said.merged(found)
    return found


def _hashes(table: Table) -> dict[str, str]:
    return {part.label: rows.sha256_file(part.path) for part in table.parts}


def _root(config: DataConfig) -> Path:
    assert config.path is not None
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UsageError(f"data.path: no folder {config.path!r}")
    return root


# -- the data set ----------------------------------------------------------------------------------------------------


def hold_back(units: dict[_Key, Unit], contents: dict[_Key, str], count: int) -> tuple[list[Unit], list[Unit]]:
    """(train, reserve): the `count` units with the smallest salted hash of their content are held back.

    Chosen by content, not by position: taking one unit out of the file then changes the training set by one unit only,
    while a drawn subset of positions would be reshuffled and the guarantee for one unit would no longer hold.
    """
    if count > max(0, len(units) - 2):
        raise rejected("data.reserve", count, f"at most {max(0, len(units) - 2)} ({len(units)} train units)")
    rank = {
        owner: hashlib.sha256(f"dpaudit reserve:{owner[0]}:{owner[1]}:{contents[owner]}".encode()).digest()
        for owner in units
    }
    held = set(sorted(units, key=lambda owner: rank[owner])[:count])
    return (
        [unit for owner, unit in units.items() if owner not in held],
        [unit for owner, unit in units.items() if owner in held],
    )


def load_local(config: DataConfig) -> Dataset:
    """The local data set of `config` (`data.path`, `data.train`, `data.test`, …). Raises UsageError.

    Units are in file order, `reserve` holds `data.reserve` units of the train file, `data.limit` is applied last.
    """
    train, test = read_split(config, "train"), read_split(config, "test")
    units = train.units("train")
    kept, reserve = hold_back(units, train.contents(), config.reserve)
    held_out = list(test.units("test").values())
    facts = said.facts_of(train, test)
    notes = [
        f"train: {train.format}; test: {test.format}",
        *(note for split in (train, test) for note in said.on_pixels(split, config)),
    ]
    return Dataset(
        name=_root(config).resolve().name,
        unit=PICTURE_UNIT if config.unit is None else f"{config.unit} (column {config.unit!r})",
        train=tuple(kept[: config.limit]),
        test=tuple(held_out[: config.limit]),
        reserve=tuple(reserve),
        ledger=_ledger(config),
        notes=tuple(notes),
        warnings=(*train.notes, *test.notes, *said.joined(train), *said.warnings(facts, train, test, config.unit)),
        facts=facts,
        source="local",
        origin=train.origin | test.origin,
    )


def _ledger(config: DataConfig) -> tuple[LedgerRow, ...]:
    owner = "the picture" if config.unit is None else f"column {config.unit!r}"
    return (
        LedgerRow(
            path="grouping into units",
            stage="preprocessing",
            status="per-example preprocessing",
            explanation="Questions about the same picture are put together, so that one unit holds all that one person "
            "contributes. Nothing else (vocabulary, answer list, normalisation) is computed from the rows.",
            evidence=f"data.unit: {owner}; pictures compared by their content before anything is lost in decoding; "
            f"transparency is shown on {config.background}.",
        ),
    )
