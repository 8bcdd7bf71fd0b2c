"""A run's own held-out questions: exported for lmms-eval, with the unit of each, and what needs no picture."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpaudit.config import DataConfig
from dpaudit.documents import Metric
from dpaudit.errors import UsageError, rejected
from reports.metrics import cluster_metric, commonest, constant_answers
from trainers.data import rows
from trainers.records import Dataset

PUBLIC_SAMPLE = 300  # pictures
MOST_UNIT_GROUPS = 20
NUMBERS = ("question_id",)


@dataclass(frozen=True)
class Questions:
    """The held-out questions in evaluation order. `clusters`: the privacy unit that each belongs to."""

    texts: tuple[str, ...]
    targets: tuple[str, ...]
    kinds: tuple[str, ...]
    clusters: tuple[str, ...]
    sha256: str


def export(
    dataset: Dataset, path: Path, *, limit: int | None = None, unit_groups: Mapping[str, str] | None = None
) -> Questions:
    """Write the test units (the first `limit`) as Parquet with a Hugging Face `Image` column; return what it holds.

    unit_groups: the group of each unit by its id, for accuracy by group.
    """
    units = dataset.test[:limit]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("question_id", "question", "answer", "kind", "unit", "group", "image")
    }
    digest = hashlib.sha256()
    for unit in units:
        for picture in unit.pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture.pixels).save(buffer, "PNG")  # lossless: the model sees the very pixels
            digest.update(repr(picture.pixels.shape).encode() + picture.pixels.tobytes())
            for question in picture.questions:
                digest.update(json.dumps([question.text, question.answer, question.kind]).encode())
                columns["question_id"].append(len(columns["question_id"]))
                columns["question"].append(question.text)
                columns["answer"].append(question.answer)
                columns["kind"].append(question.kind)
                columns["unit"].append(unit.id)
                columns["group"].append((unit_groups or {}).get(unit.id))
                columns["image"].append({"bytes": buffer.getvalue(), "path": None})
    if not columns["question"]:
        raise UsageError(f"data.test: {dataset.name} has no held-out questions to measure utility on")
    write_questions(path, columns)
    return Questions(
        tuple(columns["question"]),
        tuple(columns["answer"]),
        tuple(columns["kind"]),
        tuple(columns["unit"]),
        digest.hexdigest(),
    )


def write_questions(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of text (and `image` as {"bytes", "path"}) as a Parquet file that Hugging Face datasets reads."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: pa.int64() for name in NUMBERS} | {"image": image}
    features = {"image": {"_type": "Image"}} | {
        name: {"dtype": "int64" if name in NUMBERS else "string", "_type": "Value"}
        for name in columns
        if name != "image"
    }
    schema = pa.schema(
        [(name, types.get(name, pa.string())) for name in columns],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    pq.write_table(pa.table(dict(columns), schema=schema), path)


def unit_groups(config: DataConfig, dataset: Dataset, column: str) -> dict[str, str]:
    """The value of `column` in the test file for each held-out unit, by unit id.

    Units are found by what their pictures show. Raises UsageError: no local data, no such column, values that aren't
    short text or whole numbers, more than 20 of them, or two values in one unit.
    """
    if config.path is None or config.test is None:
        raise rejected("--group", column, "a column of a local test file (data.path); this run has no such file")
    root = Path(config.path).expanduser()
    name, field = (config.test_images, "data.test-images") if config.test_images else (config.test, "data.test")
    source = rows.open_source(root, name, field)
    owner = {rows.content_sha256(picture.pixels): unit.id for unit in dataset.test for picture in unit.pictures}
    groups: dict[str, str] = {}
    for number, row in rows.read_rows(source, ["image", column]):
        pixels = rows.decode(source, number, rows.picture_bytes(source, number, row))
        unit = owner.get(rows.content_sha256(pixels))
        if unit is None:
            continue  # not among the units in use (data.limit)
        value = " ".join(str(rows.key(source, number, row, column)).split())[:80]
        if groups.setdefault(unit, value) != value:
            raise source.fault(number, column, "differs from an earlier row of the same unit")
    distinct = len(set(groups.values()))
    if distinct > MOST_UNIT_GROUPS:
        raise rejected("--group", column, f"a column with at most {MOST_UNIT_GROUPS} values; this one has {distinct}")
    return groups


def majority(dataset: Dataset, questions: Questions) -> Metric:
    """What a constant answer per question kind reaches, without any picture.

    Embedded data: the commonest answers of *public synthetic* pictures with the same questions. Other sets: the
    commonest answers of the held-out questions themselves, the best constant there is; no training row is read.
    """
    if dataset.source == "embedded":
        from trainers.public.synthetic import synthetic_pictures

        pictures = synthetic_pictures("base", PUBLIC_SAMPLE, np.random.default_rng(0))
        pairs = [(question.kind, question.answer) for picture in pictures for question in picture.questions]
    else:
        pairs = list(zip(questions.kinds, questions.targets, strict=True))
    correct = constant_answers(questions.targets, questions.kinds, commonest(pairs))
    return cluster_metric(correct, questions.clusters)
