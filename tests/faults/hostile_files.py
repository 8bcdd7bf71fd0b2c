"""What a hostile owner hands over: a model, an adapter, records, coins and a run, each with one thing wrong with it.

`World` makes the sound things once, in seconds; the cases of tests/faults/test_hostile_files.py and the grammar of
tests/fuzz bend copies of them.
"""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpaudit.config import LoraConfig, resolve
from dpaudit.runs import RunFolder
from tests.attacks.test_external_model import random_answers, write_coins, write_records
from tests.tiny import random_units, save_tiny_llava
from tests.tiny_families import save_tiny_idefics3
from trainers.vlm import VisionLanguageModel

COUNT = 40


def handed_over(root: Path) -> Path:
    """base/, tiles/ (a model with a chat template of its own), adapter/, full/, records.parquet and coins.csv."""
    root.mkdir(parents=True, exist_ok=True)
    save_tiny_llava(root / "base")
    save_tiny_idefics3(root / "tiles")
    units = random_answers(random_units(COUNT, seed=3))
    write_records(root / "records.parquet", units)
    write_coins(root / "coins.csv", units, np.arange(COUNT) % 2 == 0)
    model = VisionLanguageModel.load(str(root / "base"), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=4), generator=np.random.default_rng(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.1 * torch.randn_like(value))
    model.save_adapter(root / "adapter")
    shutil.copytree(root / "base", root / "full")
    return root


def audit_words(place: Path, **changed: str) -> list[str]:
    """`dpaudit audit --model` on what lies in `place`."""
    named = {
        "model": "adapter", "base": "base", "records": "records.parquet", "coins": "coins.csv", "epsilon": "1",
    } | changed  # fmt: skip
    paths = {name: str(place / value) if name != "epsilon" else value for name, value in named.items()}
    return ["audit", *(word for name, value in paths.items() for word in (f"--{name}", value)), "--device", "cpu"]


def run_folder(place: Path, base: str) -> Path:
    """A finished run, by all that its own files say, of the adapter in `place` on a base that it names."""
    run = RunFolder.create(place / "run")
    run.write_config(resolve({"model": {"path": base, "device": "cpu"}, "seed": 1}))
    for file in (place / "adapter").iterdir():
        shutil.copy(file, run.model / file.name)
    run.finish_model()
    return run.path


# -- one thing wrong -------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def settings(name: str, **changes: Any) -> Damage:
    """Change a JSON file; `a__b` is b inside a."""

    def change(place: Path) -> None:
        tree = json.loads((place / name).read_text())
        for key, value in changes.items():
            at = tree
            *path, last = key.split("__")
            for part in path:
                at = at[part]
            at[last] = value
        (place / name).write_text(json.dumps(tree))

    return change


def content(name: str, data: bytes) -> Damage:
    """Replace a file."""
    return lambda place: _replaced(place / name, lambda path: path.write_bytes(data))


def pipe(name: str) -> Damage:
    """A FIFO in place of a file."""
    return lambda place: _replaced(place / name, os.mkfifo)


def device(name: str) -> Damage:
    """A link to /dev/zero in place of a file."""
    return lambda place: _replaced(place / name, lambda path: path.symlink_to("/dev/zero"))


def folder(name: str) -> Damage:
    """A folder in place of a file."""
    return lambda place: _replaced(place / name, Path.mkdir)


def sparse(name: str, size: int = 20 << 30) -> Damage:
    """20 GB of holes in place of a file."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return lambda place: _replaced(place / name, make)


def cut(name: str, keep: float = 0.5) -> Damage:
    """The first part of a file."""
    return lambda place: os.truncate(place / name, int((place / name).stat().st_size * keep))


def gone(name: str) -> Damage:
    """No file."""
    return lambda place: (place / name).unlink()


def _replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def pickled_only(name: str, marker: Path) -> Damage:
    """An adapter that is nothing but a pickle, which makes a folder when it is opened."""
    call = b"cposix\nmkdir\n(V" + str(marker).encode() + b"\ntR."

    def make(place: Path) -> None:
        (place / name / "adapter_model.safetensors").unlink()
        (place / name / "adapter_model.bin").write_bytes(call)

    return make


def tensors(name: str, ending: str, shape: tuple[int, ...]) -> Damage:
    """Other shapes in an adapter's file, and the rank that goes with them."""

    def change(place: Path) -> None:
        path = place / name / "adapter_model.safetensors"
        found = {key: torch.zeros(shape) if ending in key else value for key, value in load_file(path).items()}
        save_file(found, path)
        settings(f"{name}/adapter_config.json", r=shape[0])(place)

    return change


def replaces(*pairs: tuple[dict[str, str], str]) -> Damage:
    """A normaliser of replacements, one after the other, in base/tokenizer.json."""
    steps = [{"type": "Replace", "pattern": pattern, "content": text} for pattern, text in pairs]
    return settings("base/tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})


def splits(pattern: str) -> Damage:
    """A pre-tokeniser with a regular expression in base/tokenizer.json."""
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return settings("base/tokenizer.json", pre_tokenizer=part)


# -- bombs -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A picture of one colour: a few kilobytes that unpack to width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def scans(count: int = 100) -> bytes:
    """A progressive JPEG whose last scan, 33 bytes that touch every pixel, comes `count` times."""
    buffer = io.BytesIO()
    Image.new("L", (512, 512), 128).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def pages(count: int = 70_000, *, circle: bool = False) -> bytes:
    """A TIFF of `count` pages of one pixel, or of two that name one another as the next."""
    named = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1), (278, 1), (279, 1))
    page = struct.pack("<H", len(named)) + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in named)
    size, number = len(page) + 4, 2 if circle else count
    after = [8 + (index + 1) * size for index in range(number - 1)] + [8 if circle else 0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(page + struct.pack("<I", place) for place in after)


def pictured(make: Callable[[], bytes]) -> Damage:
    """Records of which one has this picture."""

    def change(place: Path) -> None:
        row = {"id": "u0", "image": make(), "question": "what?", "answer": "one"}
        pq.write_table(pa.Table.from_pylist([row]), place / "records.parquet")

    return change


def solid_pictures(count: int = 75) -> Damage:
    """Pictures of 4096 x 4096 pixels, each another, 3.7 GB once they are decoded."""

    def make(place: Path) -> None:
        pictures = [png(4096, 4096 - index) for index in range(count)]
        rows = [
            {"id": f"u{index}", "image": picture, "question": "what?", "answer": "one"}
            for index, picture in enumerate(pictures)
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / "records.parquet")

    return make


def named_again(column: str, value: Any, rows: int, file: str = "records.parquet") -> Damage:
    """One large value that every row names: a small file that unpacks to `rows` times its size."""

    def make(place: Path) -> None:
        plain = {"id": "u0", "image": png(4, 4), "question": "what?", "answer": "one", "member": "1", "score": "1"}
        columns = {}
        for name, short in plain.items():
            entries = pa.array([value if name == column else short])
            index = pa.array(np.zeros(rows, dtype=np.int32))
            columns[name] = pa.DictionaryArray.from_arrays(index, entries)
        pq.write_table(pa.table(columns), place / file, compression="zstd", store_schema=False)

    return make


def quadratic_yaml(place: Path) -> None:
    """A megabyte of keys."""
    (place / "run.yaml").write_text("".join(f"k{index:06d}: 1\n" for index in range(90_000)))


def cubic_grid(place: Path) -> None:
    """27 million cells in a few lines."""
    values = ", ".join(str(index) for index in range(1, 301))
    lines = [f"  {name}: [{values}]\n" for name in ("training.steps", "training.batch-size", "model.lora.rank")]
    (place / "grid.yaml").write_text("name: x\ngrid:\n" + "".join(lines))


def scores_csv(place: Path) -> pd.DataFrame:
    """A sound file of scores."""
    frame = pd.DataFrame({"id": [f"r{index}" for index in range(40)], "member": [0, 1] * 20, "score": np.arange(40.0)})
    frame.to_csv(place / "scores.csv", index=False)
    return frame


KINDS: Mapping[str, Callable[[str], Damage]] = {
    "pipe": pipe, "device": device, "sparse": sparse, "folder": folder, "cut": cut, "gone": gone,
    "empty": lambda name: content(name, b""), "rubbish": lambda name: content(name, bytes(range(256)) * 4),
    "null": lambda name: content(name, b"null"), "deep": lambda name: content(name, b"[" * 100_000),
    "list": lambda name: content(name, b"[1, 2]"), "text": lambda name: content(name, b'{"a": "' + b"x" * 1000 + b'"}'),
}  # fmt: skip
