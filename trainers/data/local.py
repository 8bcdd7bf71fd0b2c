"""Local VQA sets: flat Parquet or JSONL, or questions joined to a Parquet of pictures by `image_id`.

    flat     image, question, answer[, kind][, UNIT]                     one file per split
    joined   image_id, question, answer[, kind][, UNIT]  +  image_id, image[, UNIT]

Rows that show the same picture (equal pixels) are one picture with several questions, so that protecting the picture
protects all of them. `data.unit=COLUMN` groups pictures into larger units. The order is that of the files.

`Dataset.origin` holds hashes of the files and `Dataset.warnings` counts private pictures: both are for the owner of
the data and must stay out of whatever is released, since a hash of the training file settles who is in it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dpaudit.config import DataConfig
from dpaudit.documents import LedgerRow
from dpaudit.errors import UsageError, rejected
from trainers.data import rows
from trainers.data.rows import Source
from trainers.records import Dataset, Picture, Pixels, Question, Unit

PICTURE_UNIT = "image (with all its questions)"
_Key = tuple[str, str | int]  # ("picture", content hash) or ("unit", value of the unit column)


@dataclass
class _Picture:
    """A picture while its questions are being collected."""

    pixels: Pixels
    content: str
    unit: str | int | None = None
    questions: list[Question] = field(default_factory=list)


@dataclass
class _Split:
    """One split: pictures by (unit, content), in order of first appearance."""

    pictures: dict[tuple[_Key, str], _Picture] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def picture(self, pixels: Pixels, content: str, unit: str | int | None) -> _Picture:
        owner: _Key = ("picture", content) if unit is None else ("unit", unit)
        return self.pictures.setdefault((owner, content), _Picture(pixels, content, unit))

    def units(self, prefix: str) -> dict[_Key, Unit]:
        """Units with ids of running numbers: an id must not carry a person's name."""
        members: dict[_Key, list[_Picture]] = {}
        for (owner, _), picture in self.pictures.items():
            members.setdefault(owner, []).append(picture)
        return {
            owner: Unit(
                id=f"{prefix}-{index:06d}",
                pictures=tuple(
                    Picture(id=f"{prefix}-{index:06d}-{place}", pixels=item.pixels, questions=tuple(item.questions))
                    for place, item in enumerate(group)
                ),
            )
            for index, (owner, group) in enumerate(members.items())
        }


def _question(source: Source, number: int, row: rows.Row) -> Question:
    kind = rows.text(source, number, row, "kind") if row.get("kind") is not None else "question"
    return Question(
        text=rows.text(source, number, row, "question"), answer=rows.text(source, number, row, "answer"), kind=kind
    )


def _flat(source: Source, unit: str | None) -> _Split:
    split = _Split()
    decoded: dict[bytes, tuple[Pixels, str]] = {}  # the same bytes are decoded once
    columns = ["image", "question", "answer", *([unit] if unit else [])]
    for number, row in rows.read_rows(source, columns, ["kind"]):
        question = _question(source, number, row)
        data = rows.picture_bytes(source, number, row)
        digest = hashlib.sha256(data).digest()
        if digest not in decoded:
            pixels = rows.decode(source, number, data)
            decoded[digest] = pixels, rows.content_sha256(pixels)
        value = rows.key(source, number, row, unit) if unit else None
        split.picture(*decoded[digest], value).questions.append(question)
    return split


def _pictures(source: Source, unit: str | None) -> dict[str | int, _Picture]:
    found: dict[str | int, _Picture] = {}
    for number, row in rows.read_rows(source, ["image_id", "image"], [unit] if unit else []):
        name = rows.key(source, number, row, "image_id")
        if name in found:
            raise source.fault(number, "image_id", "occurs a second time in this file")
        pixels = rows.decode(source, number, rows.picture_bytes(source, number, row))
        value = rows.key(source, number, row, unit) if unit and unit in row else None
        found[name] = _Picture(pixels, rows.content_sha256(pixels), value)
    return found


def _joined(questions: Source, images: Source, unit: str | None) -> _Split:
    pictures = _pictures(images, unit)
    in_pictures = unit is not None and any(picture.unit is not None for picture in pictures.values())
    columns = ["image_id", "question", "answer", *([unit] if unit and not in_pictures else [])]
    split, used = _Split(), dict[str | int, str | int | None]()
    for number, row in rows.read_rows(questions, columns, ["kind"]):
        question = _question(questions, number, row)
        name = rows.key(questions, number, row, "image_id")
        if name not in pictures:
            raise questions.fault(number, "image_id", f"no such picture in {images.label}")
        shown = pictures[name]
        value = rows.key(questions, number, row, unit) if unit and not in_pictures else shown.unit
        if used.setdefault(name, value) != value and unit:
            raise questions.fault(number, unit, "differs from an earlier row about the same picture")
        split.picture(shown.pixels, shown.content, value).questions.append(question)
    if len(used) < len(pictures):
        split.warnings.append(f"{images.label}: {len(pictures) - len(used)} pictures have no question; left out")
    if len(split.pictures) < len(used):
        merged = len(used) - len(split.pictures)
        split.warnings.append(f"{images.label}: {merged} pictures repeat the pixels of another; treated as one each")
    return split


def _root(config: DataConfig) -> Path:
    assert config.path is not None
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UsageError(f"data.path: no folder {config.path!r}")
    return root


def _sources(config: DataConfig, root: Path) -> Iterator[tuple[Source, Source | None]]:
    for split, name, images in (
        ("train", config.train, config.train_images),
        ("test", config.test, config.test_images),
    ):
        if name is None:
            raise rejected(f"data.{split}", None, "a file name inside data.path")
        pictures = rows.open_source(root, images, f"data.{split}-images") if images is not None else None
        yield rows.open_source(root, name, f"data.{split}"), pictures


def _overlap(train: _Split, test: _Split, unit: str | None) -> list[str]:
    """Pictures and units that are in both splits: counted, so that a held-out figure can be read with care."""
    found: list[str] = []
    shared = {item.content for item in train.pictures.values()} & {item.content for item in test.pictures.values()}
    if shared:
        found.append(
            f"{len(shared)} pictures occur in both train and test (same pixels): accuracy on them is not held out"
        )
    units = {owner for owner, _ in train.pictures} & {owner for owner, _ in test.pictures}
    if unit and units:
        found.append(f"{len(units)} units (column {unit!r}) occur in both train and test")
    return found


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
    root = _root(config)
    splits: list[_Split] = []
    origin: dict[str, str] = {}
    for source, images in _sources(config, root):
        split = _flat(source, config.unit) if images is None else _joined(source, images, config.unit)
        if not split.pictures:
            raise UsageError(f"{source.label}: no rows")
        splits.append(split)
        origin |= {item.label: rows.sha256_file(item.path) for item in (source, images) if item is not None}
    train, test = splits
    units = train.units("train")
    contents: dict[_Key, str] = {}
    for (owner, content), _ in train.pictures.items():
        contents[owner] = contents.get(owner, "") + content
    kept, reserve = hold_back(units, contents, config.reserve)
    held_out = list(test.units("test").values())
    return Dataset(
        name=root.resolve().name,
        unit=PICTURE_UNIT if config.unit is None else f"{config.unit} (column {config.unit!r})",
        train=tuple(kept[: config.limit]),
        test=tuple(held_out[: config.limit]),
        reserve=tuple(reserve),
        ledger=_ledger(config),
        warnings=(*train.warnings, *test.warnings, *_overlap(train, test, config.unit)),
        source="local",
        origin=origin,
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
            evidence=f"data.unit: {owner}; pictures compared by their pixels.",
        ),
    )
