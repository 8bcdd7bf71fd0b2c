"""Local copies of VQA sets: found, checked, and brought into the one form that lmms-eval's tasks read."""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image

from dpaudit import untrusted, untrusted_tables
from dpaudit.errors import UsageError, rejected
from reports.heldout import write_questions
from reports.metrics import yes_no
from trainers.data import pictures, rows
from trainers.data.files import open_table
from trainers.data.formats import Sample, recognise

OPTIONAL = ("answer_type", "kind", "question_type", "group", "unit")
# Words by which files of a set say which split they hold ("validation-00000-of-00003.parquet").
SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "val2014", "dev", "test", "testdev", "lite")

PICTURE_BYTES = 1 << 27  # of one picture's file
PICTURES_BYTES = 1 << 33  # of all pictures of one file of a set


@dataclass(frozen=True)
class Copy:
    """Parquet files, or a folder of `datasets.save_to_disk`. undeclared: `image` is not declared to be a picture."""

    files: tuple[Path, ...] = ()
    disk: Path | None = None
    undeclared: bool = False


def find(task: str, path: Path, split: str | None, columns: Sequence[str], workplace: Path) -> Copy:
    """A copy of the set of `task` at `path`: a Parquet file, a folder of them, or a `save_to_disk` folder.

    GQA may lie as on the hub (questions and pictures in folders of their own), SLAKE as test.json with imgs/
    (its imgs.zip unpacked: no archive is opened here); both are joined into a file below `workplace`. Raises
    UsageError with one line.
    """
    field = f"--data {task}"
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return Copy(disk=path.resolve())
    if path.is_dir() and (path / "state.json").is_file():
        raise rejected(field, path.name, "a DatasetDict with the task's split (this folder holds a single Dataset)")
    if task == "gqa" and path.is_dir() and (joined := _gqa(field, path, workplace)):
        files: Sequence[Path] = [joined]
    elif task.startswith("slake") and path.is_dir() and (path / "test.json").is_file():
        files = [_slake(field, path, workplace)]
    else:
        files = parquet_files(field, path, split)
    metadata = [_schema(field, file) for file in files]
    for file, schema in zip(files, metadata, strict=True):
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise rejected(field, f"{file.name} without {', '.join(missing)}", f"the columns {', '.join(columns)}")
        if task.startswith("vqav2") and not _told_apart(schema):
            wanted = (
                "answers as a list of {answer, answer_id, ...}: lmms-eval takes two equal entries for one annotator"
            )
            raise rejected(field, f"{file.name}, answers of type {schema.field('answers').type}", wanted)
    if not sum(_rows(file) for file in files):
        raise rejected(field, path.name, "at least one row")
    declared = all(_declares_picture(schema) for schema in metadata)
    return Copy(tuple(file.resolve() for file in files), undeclared=not declared)


def parquet_files(field: str, path: Path, split: str | None) -> list[Path]:
    """The Parquet files of one split: all of a folder's, unless their names say that they hold different splits."""
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise rejected(field, path.name, "a .parquet file, a folder of them, or a save_to_disk folder")
        return [path]
    files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
    if not files:
        raise rejected(field, path.name, "a folder with .parquet files")
    named = {file: _split_of(file) for file in files}
    if split is None or not any(named.values()):
        return files
    chosen = [file for file, word in named.items() if word == split]
    if not chosen:
        words = ", ".join(sorted({word for word in named.values() if word}))
        raise rejected(field, f"files of {words}", f"files of the split {split}")
    return chosen


def _split_of(file: Path) -> str | None:
    first = re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0]
    return first if first in SPLIT_WORDS else None


def _schema(field: str, file: Path) -> pyarrow.Schema:
    try:
        with untrusted_tables.parquet_file(file) as opened:
            return opened.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError):
        raise UsageError(f"{field}: {file.name}: not a readable Parquet file") from None


def _rows(file: Path) -> int:
    with untrusted_tables.parquet_file(file) as opened:
        return int(opened.metadata.num_rows)


def _listed(
    field: str, file: Path, columns: Sequence[str], most: int = untrusted_tables.MOST_TABLE
) -> list[dict[str, Any]]:
    """The rows of a file, these columns alone."""
    try:
        found: list[dict[str, Any]] = untrusted_tables.read_arrow(file, columns, most=most).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{field}: {file.name}: not a readable Parquet file ({why:.80})") from None
    if found and set(found[0]) != set(columns):
        raise UsageError(f"{field}: {file.name}: needs the columns {', '.join(columns)}")
    return found


def _declares_picture(schema: pyarrow.Schema) -> bool:
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return bool(said["info"]["features"]["image"]["_type"] == "Image")
    except (ValueError, KeyError, TypeError):
        return False


def _told_apart(schema: pyarrow.Schema) -> bool:
    """VQA v2's code leaves out "the other annotators" by comparing whole entries, so each needs an id of its own."""
    entries = schema.field("answers").type
    if not (pyarrow.types.is_list(entries) or pyarrow.types.is_large_list(entries)):
        return False
    entry = entries.value_type
    return pyarrow.types.is_struct(entry) and bool(entry.get_field_index("answer_id") >= 0)


def values(copy: Copy, column: str) -> set[str]:
    """The different values of a column of text."""
    tables = (_listed("--data", file, [column]) for file in copy.files)
    return {str(row[column]).strip().lower() for table in tables for row in table}


# -- sets that lie in pieces -----------------------------------------------------------------------------------------


def _gqa(field: str, path: Path, workplace: Path) -> Path | None:
    """Questions with their pictures, from the hub's two folders; None when the copy is one table already."""
    folders = [
        sorted(path.rglob(f"{part}/*.parquet")) for part in ("testdev_balanced_instructions", "testdev_balanced_images")
    ]
    if not all(folders):
        return None
    pictures = {
        row["id"]: row["image"] for file in folders[1] for row in _listed(field, file, ["id", "image"], PICTURES_BYTES)
    }
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "question", "answer", "image")}
    for file in folders[0]:
        for number, row in enumerate(_listed(field, file, ["id", "imageId", "question", "answer"])):
            if row["imageId"] not in pictures:
                raise UsageError(f"{field}: {file.name}, row {number + 1}, imageId: no such picture in the copy")
            for name in ("id", "question", "answer"):
                columns[name].append(row[name])
            columns["image"].append(pictures[row["imageId"]])
    workplace.mkdir(parents=True, exist_ok=True)
    write_questions(workplace / "gqa.parquet", columns)
    return workplace / "gqa.parquet"


def _slake(field: str, path: Path, workplace: Path) -> Path:
    """Rows of test.json with their pictures out of imgs/."""
    try:
        listed = untrusted.read_json(path / "test.json")
    except (OSError, ValueError):
        raise UsageError(f"{field}: test.json: not a readable JSON list") from None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise UsageError(f"{field}: test.json: not a list of objects")
    names = ("qid", "img_name", "question", "answer", "answer_type", "q_lang", "modality", "content_type")
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "image")}
    picture = _pictures(field, path)
    for number, row in enumerate(listed, 1):
        missing = [name for name in ("img_name", "question", "answer", "answer_type", "q_lang") if name not in row]
        if missing:
            raise UsageError(f"{field}: test.json, row {number}: no {', '.join(missing)}")
        for name in names:
            columns[name].append(None if row.get(name) is None else str(row[name]))
        columns["image"].append({"bytes": picture(number, str(row["img_name"])), "path": None})
    workplace.mkdir(parents=True, exist_ok=True)
    write_questions(workplace / "slake.parquet", columns)
    return workplace / "slake.parquet"


def _pictures(field: str, path: Path) -> Callable[[int, str], bytes]:
    folder = path / "imgs"
    if not folder.is_dir():
        raise UsageError(f"{field}: no imgs/ beside test.json; unpack imgs.zip there")

    def read(number: int, name: str) -> bytes:
        file = rows.inside(folder, name)
        if file is None or not file.is_file():
            raise UsageError(f"{field}: test.json, row {number}, img_name: no such file in imgs/")
        return untrusted.read_bytes(file, PICTURE_BYTES)

    return read


# -- local sets of any kind ------------------------------------------------------------------------------------------


def export_set(task: str, path: Path, target: Path, *, closed: bool) -> int:
    """Write the rows of a local set for dpaudit's own tasks; the number of rows.

    Rows: any format of trainers.data.formats, one question each; optional answer_type, kind (or question_type), group,
    unit. A file, or a folder of Parquet files (those of a test split, if names say so). Every value is checked, and an
    error names file, row and field without the value.
    """
    field = f"--data {task}"
    files = [path] if path.is_file() else parquet_files(field, path, _test_split(path))
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("question_id", "question", "answer", "answer_type", "kind", "group", "unit", "image", "beside",
                     "history")
    }  # fmt: skip
    for file in files:
        table = open_table(file.parent, file.name, field)
        how = recognise(table)
        if how.folder is not None and (file.parent / how.folder).is_dir():
            table = replace(table, folder=file.parent / how.folder)
        for source, number, row, sample in how.samples(table, OPTIONAL):
            _append(columns, source, number, row, sample, table.folder, closed)
    if not columns["question"]:
        raise rejected(field, path.name, "at least one row")
    used = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    write_questions(target, used)
    return len(columns["question"])


def _test_split(path: Path) -> str | None:
    words = {_split_of(file) for file in path.rglob("*.parquet")}
    return "test" if "test" in words else None


def _append(
    columns: dict[str, list[Any]],
    source: rows.Source,
    number: int,
    row: rows.Row,
    sample: Sample,
    folder: Path,
    closed: bool,
) -> None:
    shown = [rows.encoded(source, number, item, "image", folder) for item in sample.pictures]
    plain = [_plain(source, number, data) for data in shown]  # a damaged picture is told here, with its row
    history: list[tuple[str, str]] = []
    for turn in sample.turns:
        if closed and yes_no(turn.answer) is None:
            raise source.fault(number, "answer", "must be yes or no")
        kind = row.get("kind") if row.get("kind") is not None else row.get("question_type")
        columns["question_id"].append(len(columns["question_id"]))
        columns["question"].append(turn.text)
        columns["answer"].append(turn.answer)
        columns["kind"].append(rows.text(source, number, {"kind": kind}, "kind") if kind is not None else None)
        for name in ("answer_type", "group", "unit"):
            columns[name].append(str(rows.key(source, number, row, name)) if row.get(name) is not None else None)
        columns["image"].append({"bytes": plain[0], "path": None})
        columns["beside"].append([{"bytes": data, "path": None} for data in plain[1 : turn.shown]] or None)
        columns["history"].append(json.dumps(history) if history else None)
        history.append((turn.text, turn.answer))


def _plain(source: rows.Source, number: int, data: bytes) -> bytes:
    """A picture as it is where any decoder shows the same, else (transparency, inks, EXIF) as the pixels seen here."""
    shown = rows.look_at(source, number, data)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as picture:
        same = picture.mode in ("RGB", "L", "1") and "transparency" not in picture.info and not picture.getexif()
    if same:
        return data
    Image.fromarray(shown.frames[0]).save(buffer, "PNG")
    return buffer.getvalue()
