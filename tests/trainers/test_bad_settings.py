"""Settings and data that can't work: each stops before training with exit code 2 and one line that names the field."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from attacks.training import start_run
from dpaudit.config import resolve
from dpaudit.errors import UsageError
from dpaudit.runs import RunFolder
from tests import commands
from tests.tiny import random_units
from trainers.records import Dataset

DATA = Dataset("random", "image (with all its questions)", random_units(24), random_units(4, seed=9, prefix="t"))
FAST = ["seed=1", "training.batch-size=8", "training.steps=2", "model.lora.rank=2", "model.device=cpu"]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def tiff(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF")
    return out.getvalue()


def rows(**changed: object) -> list[dict[str, object]]:
    """Twelve good rows, the last one with some values changed."""
    good = [{"image": png(index), "question": "what?", "answer": "this"} for index in range(12)]
    return [*good[:-1], {**good[-1], **changed}]


def local(folder: Path, train: list[dict[str, object]]) -> list[str]:
    pd.DataFrame(train).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows()).to_parquet(folder / "test.parquet")
    return [f"data.path={folder}", "data.train=train.parquet", "data.test=test.parquet"]


def stopped(settings: list[str], out: Path, dataset: Dataset | None = None) -> str:
    """The one line of a run that never starts."""
    with pytest.raises(UsageError) as error:
        start_run(resolve({}, settings), out, dataset=dataset)
    assert error.value.exit_code == 2
    line = str(error.value)
    assert "\n" not in line and len(line) < 400
    run = RunFolder(out)
    assert not run.finished and not run.ledger.exists() and not run.claim.exists() and not run.metrics.exists()
    return line


SETTINGS = [
    ("privacy.epsilon=0", "privacy.epsilon"),
    ("privacy.epsilon=-1", "privacy.epsilon"),
    ("privacy.epsilon=nan", "privacy.epsilon"),
    ("privacy.epsilon=.nan", "privacy.epsilon"),
    ("privacy.delta=0", "privacy.delta"),
    ("privacy.delta=0.0417", "privacy.delta"),  # 1 / 24
    ("privacy={epsilon: 3, noise-multiplier: 1}", "privacy.epsilon"),
    ("privacy.noise-multiplier=0", "privacy.noise-multiplier"),
    ("privacy.max-grad-norm=-1", "privacy.max-grad-norm"),
    ("privacy.relation=neighbours", "privacy.relation"),
    ("method=dpsgd", "method"),
    ("privcy.epsilon=3", "privcy"),
    ("training.batch-size=25", "training.batch-size"),
    ("training.batch-size=0", "training.batch-size"),
    ("training.learning-rate=.nan", "training.learning-rate"),
    ("training.learning-rate=0", "training.learning-rate"),
    ("training.steps=0", "training.steps"),
    ("training.epochs=.inf", "training.epochs"),
    ("training.optimizer=lion", "training.optimizer"),
    ("training.gradient-path=shadow", "training.gradient-path"),
    ("training.rows-at-once=0", "training.rows-at-once"),
    ("training.checkpoint-every=0", "training.checkpoint-every"),
    ("reducer={name: cls-topk, keep: 16}", "reducer.keep"),
    ("reducer={name: tome, keep: 16}", "reducer.keep"),
    ("reducer={name: divprune, keep: 40}", "reducer.keep"),
    ("reducer={name: visionzip, keep: 10, fuse: 7}", "reducer.fuse"),
    ("reducer={name: visionzip, keep: 4, fuse: 0}", "reducer.fuse"),
    ("reducer={name: visionzip, keep: 4, fuse: 2, layer: 9}", "reducer.layer"),
    ("reducer={name: visionzip, keep: 4, fuse: 2, layer: 0}", "reducer.layer"),
    ("reducer={name: tome, keep: 4, noise: mean}", "reducer.noise"),
    ("reducer.name=prumerge", "reducer.name"),
    ("pruning.keep=0", "pruning.keep"),
    ("pruning.by=gradient", "pruning.by"),
    ("model.lora.targets=[nothing]", "model.lora.targets"),
    ('model.lora.targets=["(q_proj"]', "model.lora.targets"),
    ("model.lora.targets=[]", "model.lora.targets"),
    ("model.lora.rank=0", "model.lora.rank"),
    ("model.path=/no/such/folder", "model.path"),
    ("canaries={count: 4, kinds: [ghost]}", "canaries.kinds"),
    ("canaries={count: 4, kinds: []}", "canaries.kinds"),
    ("canaries={count: 40, kinds: [new-token]}", "canaries"),
    ("canaries={count: 4, kinds: [mislabelled]}", "canaries"),
    ("zeroth-order.noise=laplace", "zeroth-order.noise"),
    ("seed=-1", "seed"),
]


@pytest.mark.parametrize(("setting", "field"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_a_bad_setting_stops_before_training(tiny: Path, tmp_path: Path, setting: str, field: str) -> None:
    base = [f"model.path={tiny}", "privacy.noise-multiplier=1.5", *FAST]
    if setting.startswith("privacy"):
        base = [f"model.path={tiny}", *FAST]
    assert re.match(rf"{re.escape(field)}[\s.:\[(]", stopped([*base, setting], tmp_path / "run", DATA))


def nan_picture() -> np.ndarray:
    pixels = np.ones((8, 8), dtype=np.float32)
    pixels[2, 3] = np.nan
    return pixels


PICTURES: list[tuple[str, object, str]] = [
    ("empty", b"", "image"),
    ("no picture", b"not a picture at all", "image"),
    ("truncated", png(1)[:90], "image"),
    ("missing", None, "image"),
    ("NaN pixels", tiff(nan_picture()), "image"),
    ("16 bits", tiff(np.full((8, 8), 40_000, dtype=np.uint16)), "image"),
]


@pytest.mark.parametrize(("what", "value", "field"), PICTURES, ids=[what for what, _, _ in PICTURES])
def test_a_bad_picture_is_named_by_file_and_row(
    tiny: Path, tmp_path: Path, what: str, value: object, field: str
) -> None:
    settings = [f"model.path={tiny}", *FAST, *local(tmp_path, rows(image=value))]
    assert stopped(settings, tmp_path / "run").startswith(f"train.parquet, row 12, {field}: ")


LOCAL: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("longer than the context", lambda folder: local(folder, rows(answer="qzx " * 120)), "data.train: "),
    ("empty answer", lambda folder: local(folder, rows(answer=" ")), "train.parquet, row 12, answer: "),
    ("answer too long", lambda folder: local(folder, rows(answer="a" * 501)), "data.train: "),
    ("no such column", lambda folder: [*local(folder, rows()), "data.unit=person"], "train.parquet, row 1, person: "),
    ("no such file", lambda folder: [*local(folder, rows()), "data.train=other.parquet"], "data.train: "),
    ("outside", lambda folder: [*local(folder, rows()), "data.train=../train.parquet"], "data.train: "),
    ("no such folder", lambda folder: [*local(folder, rows()), f"data.path={folder}/none"], "data.path: "),
    ("two sources", lambda folder: [*local(folder, rows()), "data.name=digits"], "data: "),
    ("all held back", lambda folder: [*local(folder, rows()), "data.reserve=12"], "data.reserve: "),
    ("one unit", lambda folder: local(folder, rows()[:1]), "data.train: "),
    (
        "batch beyond the declared size",
        lambda folder: [*local(folder, rows()), "data.public-size=7"],
        "training.batch-size: ",
    ),
    (
        "delta above the declared size",
        lambda folder: [*local(folder, rows()), "data.public-size=100", "privacy.delta=0.02"],
        "privacy.delta: ",
    ),
]


@pytest.mark.parametrize(("what", "settings", "start"), LOCAL, ids=[what for what, _, _ in LOCAL])
def test_bad_data_stops_before_training(
    tiny: Path, tmp_path: Path, what: str, settings: Callable[[Path], list[str]], start: str
) -> None:
    line = stopped([f"model.path={tiny}", *FAST, *settings(tmp_path)], tmp_path / "run")
    assert line.startswith(start), line


def test_after_a_stop_the_same_folder_takes_the_mended_run(tiny: Path, tmp_path: Path) -> None:
    base = [f"model.path={tiny}", *FAST, "canaries={count: 4, kinds: [noise]}", "privacy.noise-multiplier=1.5"]
    stopped([*base, "model.lora.targets=[nothing]"], tmp_path / "run", DATA)
    run = start_run(resolve({}, base), tmp_path / "run", dataset=DATA)
    run.require_finished()


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["privacy.epsilon=-1"], "privacy.epsilon: got -1"),
        (["data.limit=40", "training.batch-size=999"], "training.batch-size: got 999"),
        (["method=dp-zo", "pruning.keep=0.5", "--seed", "1"], "pruning.keep: got 0.5"),
        (["-c", "missing.yaml"], "--config missing.yaml: can't be read"),
    ],
    ids=["value", "size", "together", "file"],
)
def test_the_command_ends_with_code_2_and_one_line(tmp_path: Path, arguments: list[str], start: str) -> None:
    done = commands.run("train", *arguments, "model.device=cpu", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.code == 2 and done.line.startswith(f"dpaudit: {start}")
    assert not RunFolder(tmp_path / "run").finished
