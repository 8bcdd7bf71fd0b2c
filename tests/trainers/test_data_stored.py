"""trainers.data.stored: pictures that are left where they lie are the pictures that were read, and take no memory."""

import base64
import copy
import gc
import hashlib
import io
import json
import os
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attacks.canaries import content_sha256
from dpaudit.config import DataConfig
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.binding import binding
from trainers.data import load, near, pictures, rows, stored
from trainers.data.stored import Shelf
from trainers.features import Features
from trainers.inputs import UnitInputs
from trainers.records import AT_ONCE, Dataset, Picture, Question, Unit, in_batches, looked_at, pixels_sha256
from trainers.vlm import VisionLanguageModel

ASKED = (Question("what?", "this"),)


def noise(seed: int, side: tuple[int, int] = (16, 12)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*side, 3), dtype=np.uint8)


def png(seed: int, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(seed, **options)).save(out, "PNG")
    return out.getvalue()


def photograph(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(seed, (320, 200))).save(out, "JPEG", quality=97)
    return out.getvalue()


def animation(count: int) -> bytes:
    out = io.BytesIO()
    frames = [Image.fromarray(noise(seed)) for seed in range(count)]
    frames[0].save(out, "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoded picture is kept and none of a table held in memory: every look decodes again."""
    monkeypatch.setattr(stored, "_recent", stored.Recent(most=0))
    monkeypatch.setattr(Shelf.__init__, "__defaults__", (0,))


def write(folder: Path, how: str, count: int) -> Dataset:
    """A set of `count` pictures of noise as files, bytes in a table or base64 in JSON."""
    folder.mkdir()
    for split, first in (("train", 0), ("test", 1000)):
        contents = [png(seed) for seed in range(first, first + count)]
        said: list[Any] = [{"bytes": item, "path": None} for item in contents]
        if how == "files":
            for place, item in enumerate(contents):
                (folder / f"{split}{place}.png").write_bytes(item)
            said = [f"{split}{place}.png" for place in range(count)]
        elif how == "base64":
            said = [{"bytes": base64.b64encode(item).decode()} for item in contents]
        table = [{"image": item, "question": "what?", "answer": "this"} for item in said]
        if how == "parquet":
            pd.DataFrame(table).to_parquet(folder / f"{split}.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    ending = "parquet" if how == "parquet" else "jsonl"
    return load(DataConfig(path=str(folder), train=f"train.{ending}", test=f"test.{ending}"))


def held(units: tuple[Unit, ...]) -> list[Unit]:
    """The same units with their pixels in memory, as a set was read before pictures stayed where they lie."""
    return [Unit(u.id, tuple(Picture(p.id, p.pixels, p.questions, p.shown[1:]) for p in u.pictures)) for u in units]


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("how", ["files", "parquet", "base64"])
def test_every_look_gives_the_pixels_and_hashes_that_arrays_have(how: str, tmp_path: Path) -> None:
    data = write(tmp_path / "set", how, 5)
    for _ in range(2):
        for seed, unit in enumerate(data.train):
            picture, pixels = unit.pictures[0], noise(seed)
            assert np.array_equal(picture.pixels, pixels) and not isinstance(picture.images[0], np.ndarray)
            assert picture.images[0].shape == pixels.shape
            assert pixels_sha256(picture.images[0]) == pixels_sha256(pixels)
            expected = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            assert pixels_sha256(pixels) == expected
    assert [content_sha256(unit) for unit in data.train] == [content_sha256(unit) for unit in held(data.train)]


@pytest.mark.usefixtures("nothing_kept")
def test_model_inputs_answers_features_and_binding_are_those_of_arrays(tmp_path: Path) -> None:
    model = VisionLanguageModel.load(None, device="cpu")
    units = write(tmp_path / "set", "parquet", 9).train
    one, two = UnitInputs(model, units), UnitInputs(model, held(units))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one._encoded, two._encoded, strict=True))
    shown = [picture.images for unit in units for picture in unit.pictures]
    asked = ["what digit is this?"] * len(shown)
    assert model.answer(shown, asked) == model.answer([tuple(map(looked_at, item)) for item in shown], asked)
    bound = [binding(Key.from_seed(1), "c", some, model)["data"] for some in (units, held(units), units[::-1])]
    assert bound[0] == bound[1] != bound[2]
    first, second = Features(tmp_path / "f"), Features(tmp_path / "f")
    UnitInputs(model, held(units), features=first)
    UnitInputs(model, units, features=second)
    assert (first.encoded_now, second.encoded_now) == (9, 0)


def test_a_picture_found_in_the_cache_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, units = VisionLanguageModel.load(None, device="cpu"), write(tmp_path / "set", "files", 4).train
    UnitInputs(model, units, features=Features(tmp_path / "f"))
    monkeypatch.setattr(stored, "_recent", stored.Recent(most=0))
    monkeypatch.setattr(pictures, "decode", None)
    UnitInputs(model, units, features=Features(tmp_path / "f"))
    with pytest.raises(TypeError):
        _ = units[0].pictures[0].pixels


@pytest.mark.usefixtures("nothing_kept")
def test_a_file_that_changed_is_one_line(tmp_path: Path) -> None:
    data = write(tmp_path / "set", "files", 4)
    (tmp_path / "set" / "train1.png").write_bytes(png(77))
    (tmp_path / "set" / "train2.png").unlink()
    (tmp_path / "set" / "train3.png").unlink()
    os.mkfifo(tmp_path / "set" / "train3.png")  # must not wait for a writer
    assert np.array_equal(data.train[0].pictures[0].pixels, noise(0))
    for place in (1, 2, 3):
        with pytest.raises(UsageError, match=rf"^train.jsonl, row {place + 1}, image: its file has changed") as caught:
            _ = data.train[place].pictures[0].pixels
        assert "train1" not in str(caught.value)


@pytest.mark.usefixtures("nothing_kept")
def test_limits_of_a_picture_hold_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "set", "files", 2)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10)
    with pytest.raises(UsageError, match=r"^train.jsonl, row 1, image: 12x16 pixels; at most 10"):
        _ = data.train[0].pictures[0].pixels


@pytest.mark.usefixtures("nothing_kept")
def test_a_table_counts_its_pictures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again and again is no bomb: the limit of a whole table is held while it is read."""
    monkeypatch.setattr(rows, "MAX_DECODED", 6 * 16 * 12 * 3)
    monkeypatch.setattr(rows, "MAX_PICTURE_RATIO", 0)
    data = write(tmp_path / "set", "parquet", 6)
    assert all(np.array_equal(data.train[0].pictures[0].pixels, noise(0)) for _ in range(5))
    with pytest.raises(UsageError, match="unpack to"):
        write(tmp_path / "more", "parquet", 7)


@pytest.mark.usefixtures("nothing_kept")
def test_frames_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(animation(3))
    (tmp_path / "b.png").write_bytes(png(9))
    for name, files in (("train", ("a.webp", "b.png")), ("test", ("b.png",))):
        said = [{"image": file, "question": "q", "answer": "a"} for file in files]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    config = DataConfig(path=str(tmp_path), train="train.jsonl", test="test.jsonl", frames="all")
    picture = load(config).train[0].pictures[0]
    assert [np.array_equal(item, noise(seed)) for seed, item in enumerate(picture.shown)] == [True] * 3
    assert len(picture.images) == 3 and len(picture.beside) == 2


def test_copies_are_the_picture_itself_and_another_process_gets_pixels(tmp_path: Path) -> None:
    picture = write(tmp_path / "set", "parquet", 2).train[0].pictures[0]
    assert copy.deepcopy(picture).images[0] is picture.images[0] is copy.copy(picture).images[0]
    sent = pickle.loads(pickle.dumps(picture))
    assert isinstance(sent.images[0], np.ndarray) and np.array_equal(sent.pixels, noise(0))


def test_a_signature_that_was_not_kept_is_that_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST", 0)
    write(tmp_path / "none", "files", 3)
    source = rows.Source(tmp_path / "x", "x", tmp_path)
    kept, other = (stored.store(source, 1, png(3), pictures.PLAINLY, Shelf(), mark=mark) for mark in (True, False))
    assert other.seen is None and np.array_equal(kept.mark.fine, other.mark.fine)


def test_the_derived_picture_stays_where_it_lies_and_a_replaced_one_is_right(tmp_path: Path) -> None:
    picture = write(tmp_path / "set", "files", 2).train[0].pictures[0]
    other = picture.derived(id="other", questions=ASKED)
    assert other.images[0] is picture.images[0] and (other.id, other.questions) == ("other", ASKED)
    assert picture.derived(questions=ASKED).id == picture.id and picture.derived(id="x").questions == picture.questions
    assert np.array_equal(replace(picture, id="x").pixels, picture.pixels)
    with pytest.raises(TypeError, match="pixels"):
        Picture("without")  # type: ignore[call-arg]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=30), st.integers(0, 200))
def test_what_is_put_on_a_shelf_is_what_is_taken(contents: list[bytes], most: int) -> None:
    shelf = Shelf(most)
    places = [shelf.put(item) for item in contents]
    assert shelf.size <= most and sum(len(item) for item in places if isinstance(item, bytes)) == shelf.size
    for place, item in zip(places, contents, strict=True):
        assert item == (place if isinstance(place, bytes) else place.shelf.get(place.start, place.length))


def test_a_shelf_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored.tempfile, "tempdir", str(tmp_path))
    shelf = Shelf(0)
    shelf.put(b"x" * 100)
    assert list(tmp_path.iterdir()) == []  # it has no name
    number = shelf._opened()
    assert os.fstat(number).st_size == 100 and os.fstat(number).st_mode & 0o077 == 0
    del shelf
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.os, "pwrite", full)
    with pytest.raises(EnvironmentFailure, match=r"no room for the pictures of a table \(No space left on device\)"):
        Shelf(0).put(b"picture")


def test_the_last_decoded_pictures_are_kept_up_to_a_limit() -> None:
    kept, frame = stored.Recent(most=1000), (np.zeros((10, 10, 3), np.uint8),)  # 300 bytes
    for name in (b"a", b"b", b"c"):
        kept.put((name, pictures.PLAINLY), frame)
    assert kept.get((b"a", pictures.PLAINLY)) is frame
    kept.put((b"d", pictures.PLAINLY), frame)
    assert [kept.get((name, pictures.PLAINLY)) is None for name in (b"a", b"b", b"c", b"d")] == [
        False,
        True,
        False,
        False,
    ]
    kept.put((b"large", pictures.PLAINLY), (np.zeros((20, 20, 3), np.uint8),))
    assert kept.size == 900 and kept.get((b"large", pictures.PLAINLY)) is None


def test_batches_hold_a_bounded_number_of_bytes() -> None:
    side = int((AT_ONCE / 3 / 4) ** 0.5)  # four of them fill a batch
    images = [np.zeros((side, side, 3), np.uint8)] * 9 + [np.zeros((1, 1, 3), np.uint8)]
    assert [len(batch) for batch in in_batches(images)] == [4, 4, 2] and list(in_batches([])) == []


@pytest.mark.usefixtures("nothing_kept")
def test_reading_and_encoding_hold_few_pictures(tmp_path: Path) -> None:
    """150 pictures of 192 kB, 14 MB in a table and 29 MB decoded: a small part of it is in memory at any time."""
    for split, count in (("train", 150), ("test", 1)):
        table = [{"image": {"bytes": photograph(seed)}, "question": "q", "answer": "a"} for seed in range(count)]
        pd.DataFrame(table).to_parquet(tmp_path / f"{split}.parquet", row_group_size=10)
        assert count == 1 or (tmp_path / "train.parquet").stat().st_size > 12 << 20
    model = VisionLanguageModel.load(None, device="cpu")
    tracemalloc.start()
    try:
        data = load(DataConfig(path=str(tmp_path), train="train.parquet", test="test.parquet"))
        after, reading = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        UnitInputs(model, data.train, batch_size=8)
        _, encoding = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < 1 << 20 and reading < 6 << 20 and encoding < 6 << 20


def test_near_duplicates_are_compared_as_before() -> None:
    """Small signatures of 8 bits hold what float32 ones held: weights are multiplied afterwards."""
    pixels = noise(3, (40, 60))
    small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX).convert("YCbCr")
    expected = (np.asarray(small, np.float32) * np.asarray(near.WEIGHTS, np.float32)).reshape(-1)
    assert np.array_equal(near._stack([near.signature(pixels)])[0], expected)
    assert random_units(1)[0].pictures[0].images[0] is not None
