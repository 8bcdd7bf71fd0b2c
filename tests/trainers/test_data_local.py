"""trainers.data.local and trainers.data.rows: layouts, grouping into units, and what is refused."""

import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpaudit.config import DataConfig
from dpaudit.errors import UsageError
from trainers.data import load
from trainers.data.local import hold_back
from trainers.records import Dataset, Picture, Question, Unit

SECRET = "SECRET-alice"  # must never show up in a message


def png(value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def row(value: int, question: str = "what?", answer: str = "this", **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": png(value), "path": None}, "question": question, "answer": answer, **more}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    else:
        pd.DataFrame(rows).to_parquet(folder / name)
    return name


def flat(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None, **more: Any) -> Dataset:
    write(folder, "train.parquet", train)
    write(folder, "test.parquet", test if test is not None else [row(1000)])
    return load(DataConfig(path=str(folder), train="train.parquet", test="test.parquet", **more))


def refused(call: Any, *parts: str) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    for part in parts:
        assert part in message, message
    return message


def test_flat_rows_with_one_picture_are_one_unit(tmp_path: Path) -> None:
    data = flat(tmp_path, [row(1, "a?"), row(2, "b?", kind="colour"), row(1, "c?"), row(3)])
    assert [[question.text for question in unit.pictures[0].questions] for unit in data.train] == [
        ["a?", "c?"],
        ["b?"],
        ["what?"],
    ]
    assert data.unit == "image (with all its questions)"
    assert data.train[0].pictures[0].pixels.shape == (8, 8, 3)
    assert data.train[0].pictures[0].pixels.dtype == np.uint8
    assert len({unit.id for unit in (*data.train, *data.test)}) == 4


def test_equal_pixels_in_another_format_are_the_same_picture(tmp_path: Path) -> None:
    other = row(1, "again?") | {"image": {"bytes": png(1, kind="BMP"), "path": None}}
    assert len(flat(tmp_path, [row(1), other, row(2)]).train) == 2


def test_the_three_ways_to_give_a_picture_agree(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for value in (1, 2):
        (tmp_path / "pictures" / f"{value}.png").write_bytes(png(value))
    by_path = [row(value) | {"image": f"pictures/{value}.png"} for value in (1, 2)]
    by_bytes = [row(value) | {"image": png(value)} for value in (1, 2)]
    structs = flat(tmp_path, [row(1), row(2)])
    for rows, name in ((by_path, "train.jsonl"), (by_bytes, "train.parquet"), (by_path, "train.parquet")):
        write(tmp_path, name, rows)
        data = load(DataConfig(path=str(tmp_path), train=name, test="test.parquet"))
        for ours, theirs in zip(data.train, structs.train, strict=True):
            np.testing.assert_array_equal(ours.pictures[0].pixels, theirs.pictures[0].pixels)


def test_joined_layout_counts_and_agrees_with_a_plain_pandas_join(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [{"image_id": index, "image": png(index), "who": f"p{index % 3}"} for index in range(12)]
    questions = [
        {"image_id": int(rng.integers(12)), "question": f"q{index}?", "answer": str(index)} for index in range(40)
    ]
    write(tmp_path, "images.parquet", pictures)
    write(tmp_path, "train.jsonl", questions)
    config = DataConfig(
        path=str(tmp_path),
        train="train.jsonl",
        test="train.jsonl",
        train_images="images.parquet",
        test_images="images.parquet",
        unit="who",
    )
    data = load(config)
    table = pd.DataFrame(questions).merge(pd.DataFrame(pictures), on="image_id")
    expected = {frozenset(group["question"]) for _, group in table.groupby("who")}
    found = {frozenset(q.text for p in unit.pictures for q in p.questions) for unit in data.train}
    assert found == expected
    assert data.unit == "who (column 'who')"
    assert f"{table['image_id'].nunique()} pictures in both train and test" in " ".join(data.warnings)
    assert "3 units (column 'who') in both" in " ".join(data.warnings)
    assert not {unit.id for unit in data.train} & {unit.id for unit in data.test}


def test_shared_pictures_are_counted(tmp_path: Path) -> None:
    data = flat(tmp_path, [row(1), row(2), row(3)], [row(2), row(3, "new?"), row(4)])
    assert any(line.startswith("2 pictures in both") for line in data.warnings)
    assert flat(tmp_path, [row(1), row(2)], [row(4)]).warnings == ()


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    rows = [row(index % 30, f"{index}?") for index in range(60)]
    first, second = (flat(tmp_path, rows, reserve=5, limit=20) for _ in range(2))
    assert [unit.id for unit in first.train] == [unit.id for unit in second.train]
    assert [unit.id for unit in first.reserve] == [unit.id for unit in second.reserve]
    assert len(first.train) == 20
    assert len(first.reserve) == 5
    assert not {unit.id for unit in first.train} & {unit.id for unit in first.reserve}


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 30), st.data())
def test_removing_one_unit_changes_the_training_set_by_one_unit(count: int, data: st.DataObject) -> None:
    """The reason for choosing the reserve by content: the split itself must not break the unit's guarantee."""
    names = [("picture", f"content {index}") for index in range(count)]
    units = {name: Unit(id=name[1], pictures=()) for name in names}
    contents = {name: name[1] for name in names}
    held = data.draw(st.integers(0, count - 3))
    gone = data.draw(st.sampled_from(names))
    before, _ = hold_back(units, contents, held)
    after, _ = hold_back({name: unit for name, unit in units.items() if name != gone}, contents, held)
    assert {unit.id for unit in after} <= {unit.id for unit in before}
    assert len(before) - len(after) == 1


def test_a_full_size_row_is_in_the_ledger_unless_the_size_is_declared(tmp_path: Path) -> None:
    paths = [line.path for line in flat(tmp_path, [row(1), row(2)]).ledger]
    assert "size of the training set" in paths
    assert "size of the training set" not in [
        line.path for line in flat(tmp_path, [row(1), row(2)], public_size=3).ledger
    ]
    assert all(line.status != "UNACCOUNTED" for line in flat(tmp_path, [row(1), row(2)], limit=2).ledger)


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"question": ""}, "question", "empty"),
    ({"question": "  \n"}, "question", "empty"),
    ({"question": SECRET * 5000}, "question", "at most 20000"),
    ({"answer": SECRET * 5000}, "answer", "at most 20000"),
    ({"answer": None}, "answer", "missing"),
    ({"question": SECRET + "\x1b[2J"}, "question", "control character"),
    ({"kind": SECRET * 20}, "kind", "at most 100"),
    ({"image": {"bytes": b"", "path": None}}, "image", "empty"),
    ({"image": {"bytes": None, "path": None}}, "image", "got nothing"),
    ({"image": {"bytes": SECRET.encode() * 10, "path": None}}, "image", "not a readable picture"),
    ({"image": {"bytes": png(1)[:60], "path": None}}, "image", "not a readable picture"),
    ({"image": {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n", "path": None}}, "image", "not a readable picture"),
]


@pytest.mark.parametrize(("change", "field", "problem"), BAD_ROWS, ids=[f"{b}-{c}" for _, b, c in BAD_ROWS])
def test_a_bad_row_is_named_and_never_quoted(tmp_path: Path, change: dict[str, Any], field: str, problem: str) -> None:
    rows = [row(1, kind="k"), row(2, kind="k"), row(3, kind="k") | change]
    refused(lambda: flat(tmp_path, rows), f"train.parquet, row 3, {field}", problem)


@pytest.mark.parametrize("value", [3, True, 1.5, {"a": 1}])
def test_an_answer_that_is_not_text_is_refused(tmp_path: Path, value: Any) -> None:
    flat(tmp_path, [row(1), row(2)])
    (tmp_path / "1.png").write_bytes(png(1))
    write(tmp_path, "train.jsonl", [{"image": "1.png", "question": "a?", "answer": value}])
    config = DataConfig(path=str(tmp_path), train="train.jsonl", test="test.parquet")
    refused(lambda: load(config), "train.jsonl, row 1, answer", "must be text")


@pytest.mark.parametrize(
    "line",
    [b"{not json", b"[1, 2]", b"\xff\xfe{}", b'{"a":' * 100_000, b'{"question": ' + b"1" * 5000 + b"}"],
    ids=["broken", "list", "not utf-8", "deep", "huge number"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    good = json.dumps({"image": "1.png", "question": "a?", "answer": SECRET}).encode()
    (tmp_path / "train.jsonl").write_bytes(good + b"\n" + line + b"\n")
    write(tmp_path, "test.parquet", [row(2)])
    config = DataConfig(path=str(tmp_path), train="train.jsonl", test="test.parquet")
    refused(lambda: load(config), "train.jsonl, row 2, line")


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    """A PNG that says 100,000 x 100,000 pixels, with a correct header and almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (100_000, 5_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        rows = [row(1), row(2) | {"image": {"bytes": bomb + chunk(b"IEND", b""), "path": None}}]
        refused(lambda rows=rows: flat(tmp_path, rows), "train.parquet, row 2, image", "pixels")


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "inner-parent"])
def test_pictures_outside_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / SECRET
    outside.mkdir()
    (outside / "x.png").write_bytes(png(1))
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "in.png").write_bytes(png(3))
    os.symlink(outside / "x.png", folder / "link.png")
    name = {
        "parent": f"../{SECRET}/x.png",
        "absolute": str(outside / "x.png"),
        "link": "link.png",
        "inner-parent": "sub/../in.png",
    }[kind]
    write(folder, "train.jsonl", [{"image": name, "question": "a?", "answer": "b"}])
    write(folder, "test.parquet", [row(2)])
    config = DataConfig(path=str(folder), train="train.jsonl", test="test.parquet")
    refused(lambda: load(config), "train.jsonl, row 1, image", "path")


@pytest.mark.parametrize("field", ["train", "test", "train_images", "test_images"])
@pytest.mark.parametrize("name", ["../x.jsonl", "/etc/passwd", "link.jsonl", "gone.jsonl", "folder", "x.csv"])
def test_a_bad_file_name_names_its_field(tmp_path: Path, field: str, name: str) -> None:
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    (folder / "x.csv").write_text("")
    (tmp_path / "x.jsonl").write_text("")
    os.symlink(tmp_path / "x.jsonl", folder / "link.jsonl")
    write(folder, "images.parquet", [{"image_id": 1, "image": png(1)}])
    write(folder, "ok.jsonl", [{"image_id": 1, "question": "a?", "answer": "b"}])
    names = {"train": "ok.jsonl", "test": "ok.jsonl", "train_images": "images.parquet", "test_images": "images.parquet"}
    config = DataConfig(path=str(folder), **(names | {field: name}))
    if name == "folder" and field.endswith("images"):  # a folder of pictures, which these rows do not name
        refused(lambda: load(config), "no column 'image'", "data.train-images and data.test-images")
    else:
        refused(lambda: load(config), f"data.{field.replace('_', '-')}:")


def test_joined_faults_are_named(tmp_path: Path) -> None:
    write(tmp_path, "images.parquet", [{"image_id": 1, "image": png(1)}, {"image_id": 2, "image": png(2)}])
    write(tmp_path, "test.jsonl", [{"image_id": 1, "question": "a?", "answer": "b", "who": "x"}])

    def attempt(rows: list[dict[str, Any]], **more: Any) -> Any:
        write(tmp_path, "train.jsonl", rows)
        files = {"train_images": "images.parquet", "test_images": "images.parquet"}
        return lambda: load(DataConfig(path=str(tmp_path), train="train.jsonl", test="test.jsonl", **(files | more)))

    good = {"image_id": 1, "question": "a?", "answer": "b", "who": "x"}
    refused(
        attempt([good, good | {"image_id": 9}]), "train.jsonl, row 2, image_id", "no such picture in images.parquet"
    )
    refused(attempt([good, good | {"image_id": "1"}]), "train.jsonl, row 2, image_id", "no such picture")
    refused(attempt([good | {"image_id": None}]), "train.jsonl, row 1, image_id", "got nothing")
    refused(attempt([good, good | {"who": SECRET}], unit="who"), "train.jsonl, row 2, who", "differs")
    refused(attempt([good], unit="person"), "train.jsonl, row 1, person", "missing")
    write(tmp_path, "images.parquet", [{"image_id": 1, "image": png(1)}, {"image_id": 1, "image": png(2)}])
    refused(attempt([good]), "images.parquet, row 2, image_id", "second time")


def test_damaged_and_wrong_parquet(tmp_path: Path) -> None:
    flat(tmp_path, [row(1), row(2)])
    config = DataConfig(path=str(tmp_path), train="train.parquet", test="test.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[: len(content) // 2])
    refused(lambda: load(config), "train.parquet: not a readable Parquet file")
    pd.DataFrame({"image": [png(1)], "question": ["a?"]}).to_parquet(tmp_path / "train.parquet")
    refused(lambda: load(config), "train.parquet: no column 'answer'; columns: image, question")
    pd.DataFrame({"image": [], "question": [], "answer": []}).to_parquet(tmp_path / "train.parquet")
    refused(lambda: load(config), "train.parquet: no rows")


def test_a_reserve_that_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    refused(
        lambda: flat(tmp_path, [row(1), row(2), row(3)], reserve=2), "data.reserve: got 2", "at most 1 (3 train units)"
    )


def test_embedded_digits_refuse_the_fields_of_local_sets() -> None:
    refused(lambda: load(DataConfig(unit="person")), "data.unit: got 'person'", "embedded digits")
    refused(lambda: load(DataConfig(reserve=3)), "data.reserve: got 3")


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    flat(tmp_path, [row(1), row(2)])
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*") if path.is_file()}
    load(DataConfig(path=str(tmp_path), train="train.parquet", test="test.parquet"))
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


def test_pictures_carry_their_questions_in_file_order(tmp_path: Path) -> None:
    data = flat(tmp_path, [row(1, "z?", "1", kind="a"), row(1, "y?", "2", kind="b"), row(2)])
    expected = (Question("z?", "1", "a"), Question("y?", "2", "b"))
    assert data.train[0].pictures[0].questions == expected
    assert isinstance(data.train[0].pictures[0], Picture)
