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
from trainers.data.local import read_split
from trainers.records import Dataset, Pixels

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
    names = ("question_id", "question", "answer", "answers", "history", "kind", "unit", "group", "image", "beside")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    digest = hashlib.sha256()
    for unit in units:
        for picture in unit.pictures:
            shown = [_encoded(pixels) for pixels in picture.shown]
            for pixels in picture.shown:
                digest.update(repr(pixels.shape).encode() + pixels.tobytes())
            for question in picture.questions:
                more = [question.accepted, question.history] if question.accepted or question.history else []
                digest.update(json.dumps([question.text, question.answer, question.kind, *more]).encode())
                columns["question_id"].append(len(columns["question_id"]))
                columns["question"].append(question.text)
                columns["answer"].append(question.answer)
                columns["answers"].append(json.dumps(question.accepted) if question.accepted else None)
                columns["history"].append(json.dumps(question.history) if question.history else None)
                columns["kind"].append(question.kind)
                columns["unit"].append(unit.id)
                columns["group"].append((unit_groups or {}).get(unit.id))
                columns["image"].append({"bytes": shown[0], "path": None})
                columns["beside"].append([{"bytes": item, "path": None} for item in shown[1:]])
    if not columns["question"]:
        raise UsageError(f"data.test: {dataset.name} has no test questions to measure utility on")
    write_questions(path, columns)
    return Questions(
        tuple(columns["question"]),
        tuple(columns["answer"]),
        tuple(columns["kind"]),
        tuple(columns["unit"]),
        digest.hexdigest(),
    )


def _encoded(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # lossless: the model sees the very pixels
    return buffer.getvalue()


def write_questions(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of text as a Parquet file that Hugging Face datasets reads.

    `image` holds {"bytes", "path"}, `beside` lists of these.
    """
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: pa.int64() for name in NUMBERS} | {"image": image, "beside": pa.list_(image)}
    said: dict[str, Any] = {"image": {"_type": "Image"}, "beside": {"feature": {"_type": "Image"}, "_type": "List"}}
    features = {
        name: said.get(name, {"dtype": "int64" if name in NUMBERS else "string", "_type": "Value"}) for name in columns
    }
    schema = pa.schema(
        [(name, types.get(name, pa.string())) for name in columns],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    pq.write_table(pa.table(dict(columns), schema=schema), path)


def unit_groups(config: DataConfig, dataset: Dataset, column: str) -> dict[str, str]:
    """The value of `column` in the test file for each held-out unit, by unit id.

    Raises UsageError: no local data, no such column, values that aren't
    short text or whole numbers, more than 20 of them, or two values in one unit.
    """
    if config.path is None or config.test is None:
        raise rejected("--group", column, "a column of a local test file (data.path); this run has no such file")
    known = {unit.id for unit in dataset.test}  # data.limit may leave some out
    split = read_split(config, "test", column)
    groups = {unit: value for unit, value in split.groups("test").items() if unit in known}
    distinct = len(set(groups.values()))
    if distinct > MOST_UNIT_GROUPS:
        raise rejected("--group", column, f"a column with at most {MOST_UNIT_GROUPS} values; this one has {distinct}")
    return groups


def majority(dataset: Dataset, questions: Questions) -> Metric:
    """What a constant answer per question kind reaches, without any picture.

    Embedded data: the most common answers of *public synthetic* pictures with the same questions. Other sets: the
    most common answers of the held-out questions themselves, the best constant there is; no training row is read.
    """
    if dataset.source == "embedded":
        from trainers.public.synthetic import synthetic_pictures

        pictures = synthetic_pictures("base", PUBLIC_SAMPLE, np.random.default_rng(0))
        pairs = [(question.kind, question.answer) for picture in pictures for question in picture.questions]
    else:
        pairs = list(zip(questions.kinds, questions.targets, strict=True))
    correct = constant_answers(questions.targets, questions.kinds, commonest(pairs))
    return cluster_metric(correct, questions.clusters)
