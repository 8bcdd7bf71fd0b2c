"""The feature cache: the same numbers with and without, nothing trusted that is not whole, nothing outside the run."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from attacks.training import resume_run, start_run
from dpaudit import atomic
from dpaudit.cli.app import run as command
from dpaudit.config import ReducerConfig, RunConfig, resolve
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.tiny import random_units, save_tiny_llava
from tests.tiny_families import save_tiny_idefics3
from trainers import feature_folder, features, probe
from trainers.features import Features, cache_of
from trainers.inputs import UnitInputs
from trainers.records import Dataset, Picture, Unit
from trainers.vlm import VisionLanguageModel

UNITS = random_units(6, pictures=2)
DATA = Dataset("probe", "person", UNITS, UNITS[:2])
VISIONZIP = ReducerConfig(name="visionzip", keep=5, fuse=3)


def load(tiny: Path, reducer: ReducerConfig = VISIONZIP) -> VisionLanguageModel:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(reducer)
    return model


def rows_equal(one: UnitInputs, other: UnitInputs) -> bool:
    found = [
        inputs.select(range(inputs.units), key=Key.from_seed(1), step=3, fusion_std=0.1) for inputs in (one, other)
    ]
    heads = [rows.packed.head for rows in found]
    assert heads[0] is not None and heads[1] is not None
    same = torch.equal(heads[0].slot, heads[1].slot) and torch.equal(heads[0].positions, heads[1].positions)
    return same and torch.equal(found[0].tokens, found[1].tokens)


def test_a_second_run_finds_what_the_first_encoded(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    plain = UnitInputs(model, UNITS)
    first, second = Features(tmp_path / "f"), Features(tmp_path / "f")
    assert rows_equal(plain, UnitInputs(model, UNITS, features=first, batch_size=5))
    assert rows_equal(plain, UnitInputs(model, UNITS, features=second))
    assert (first.encoded_now, second.encoded_now) == (12, 0)
    files = list((tmp_path / "f").iterdir())
    assert len(files) == 3 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o700
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(files[0]) in maps.read_text(), "mapped, not read into memory"


def test_fusion_noise_is_fresh_at_every_use_and_never_stored(tiny: Path, tmp_path: Path) -> None:
    inputs = UnitInputs(load(tiny), UNITS, features=Features(tmp_path / "f"))
    one, other = (inputs.select([0], key=Key.from_seed(1), step=step, fusion_std=1.0).tokens for step in (1, 2))
    assert torch.equal(one[:, :-3], other[:, :-3]) and not torch.isclose(one[:, -3:], other[:, -3:]).any()
    again = UnitInputs(load(tiny), UNITS, features=Features(tmp_path / "f"))
    quiet = again.select([0]).tokens
    assert torch.equal(quiet, UnitInputs(load(tiny), UNITS).select([0]).tokens)


def truncated(content: bytes) -> bytes:
    return content[:-40]


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


def emptied(_content: bytes) -> bytes:
    return b""


def foreign(_content: bytes) -> bytes:
    return safetensors.torch.save({"tokens": torch.zeros(3)}, {"format": "dpaudit-features-1"})


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, foreign])
def test_a_damaged_file_is_encoded_again_with_a_warning(
    tiny: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    model, said = load(tiny), list[str]()
    whole = UnitInputs(model, UNITS, features=Features(tmp_path / "f"), batch_size=8)
    path = sorted((tmp_path / "f").iterdir())[0]
    atomic.write_bytes(path, damage(path.read_bytes()))  # a new file: the old one is mapped
    mended = Features(tmp_path / "f", warn=said.append)
    assert rows_equal(whole, UnitInputs(model, UNITS, features=mended, batch_size=8))
    assert 0 < mended.encoded_now < 12 and len(said) == 1 and path.name in said[0] and "\n" not in said[0]
    last = Features(tmp_path / "f", warn=said.append)
    UnitInputs(model, UNITS, features=last, batch_size=8)
    assert last.encoded_now == 0 and len(said) == 1, "the damaged file was replaced"


def test_other_weights_layers_reducers_or_precision_find_nothing(tiny: Path, tmp_path: Path) -> None:
    UnitInputs(load(tiny), UNITS[:1], features=Features(tmp_path / "f"))
    other = save_tiny_llava(tmp_path / "other", seed=1, reserved=32)
    cases = [
        load(tiny, replace_reducer(keep=4)),
        load(tiny, replace_reducer(layer=-1)),
        load(other),
        VisionLanguageModel.load(str(tiny), device="cpu"),
    ]
    for index, model in enumerate(cases):
        said: list[str] = []
        copied = shutil.copytree(tmp_path / "f", tmp_path / "copies" / str(index))
        features = Features(copied, warn=said.append)
        UnitInputs(model, UNITS[:1], features=features)
        assert features.encoded_now == 2 and "other settings" in said[0]


def replace_reducer(**changes: int) -> ReducerConfig:
    return VISIONZIP.model_copy(update=changes)


def test_pictures_of_several_sizes(tmp_path: Path) -> None:
    model = VisionLanguageModel.load(str(save_tiny_idefics3(tmp_path / "model")), device="cpu")
    rng = np.random.default_rng(0)
    units = tuple(
        Unit(
            str(index),
            (Picture(str(index), rng.integers(0, 256, (*size, 3), np.uint8), UNITS[0].pictures[0].questions),),
        )
        for index, size in enumerate([(32, 32), (32, 64), (64, 32)])
    )
    plain = UnitInputs(model, units)
    UnitInputs(model, units, features=Features(tmp_path / "f"))
    assert rows_equal(plain, UnitInputs(model, units, features=Features(tmp_path / "f")))


class Killed(BaseException):
    """As from a signal: no handler of ours may swallow it."""


def test_a_kill_while_writing_leaves_nothing_half_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny)

    def kill(_source: object, _target: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(Path, "unlink", lambda _path: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            UnitInputs(model, UNITS, features=Features(tmp_path / "f"))
    left = list((tmp_path / "f").iterdir())
    assert len(left) == 1 and left[0].name.startswith("."), "the temporary file only"
    said: list[str] = []
    after = Features(tmp_path / "f", warn=said.append)
    assert rows_equal(UnitInputs(model, UNITS), UnitInputs(model, UNITS, features=after))
    assert after.encoded_now == 12 and not said


def config(tiny: Path, cache: str) -> RunConfig:
    settings = ["training.batch-size=3", "training.steps=2", "privacy.noise-multiplier=1", "privacy.delta=1e-2"]
    settings += ["reducer={name: visionzip, keep: 5, fuse: 3, noise: 0.1}", "seed=3", "model.lora.rank=2"]
    return resolve({}, [f"model.path={tiny}", "model.device=cpu", f"training.feature-cache={cache}", *settings])


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    with safe_open(str(run.model / "adapter_model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def cache(run: RunFolder) -> Features:
    return Features(run.private / "features", pytest.fail)


def forge(path: Path) -> None:
    """What an owner could do: other tokens with a checksum that fits."""
    with safe_open(str(path), framework="pt") as file:
        said = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors["tokens"] += 1.0
    atomic.write_tensors(path, tensors, said | {"checksum": features._checksum(tensors)}, mode=0o600)


def test_same_weights_with_and_without_and_a_twin_neither_reads_nor_writes(tiny: Path, tmp_path: Path) -> None:
    plain = start_run(config(tiny, "never"), tmp_path / "plain", dataset=DATA)
    run = start_run(config(tiny, "always"), tmp_path / "run", dataset=DATA)
    assert not (plain.private / "features").exists() and (run.private / "features").is_dir()
    expected, found = weights(plain), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for path in (run.private / "features").iterdir():
        forge(path)
    assert not rows_equal(UnitInputs(load(tiny), UNITS), UnitInputs(load(tiny), UNITS, features=cache(run)))
    before = {path: path.stat().st_mtime_ns for path in (run.private / "features").iterdir()}
    twin = start_run(config(tiny, "always"), run.path / "twin", dataset=DATA)
    assert {path: path.stat().st_mtime_ns for path in (run.private / "features").iterdir()} == before
    assert (twin.private / "features").is_dir()
    assert all(torch.equal(expected[name], value) for name, value in weights(twin).items())
    assert not any("features" in str(path) for path in run.release.rglob("*"))


def test_auto_keeps_nothing_for_a_small_tower(tiny: Path, tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), load(tiny)
    assert cache_of(run, "auto", model, print) is None and cache_of(run, "never", model, print) is None
    assert cache_of(run, "always", model, print) is not None
    large = replace_tower(model)
    assert cache_of(run, "auto", large, print) is not None
    assert cache_of(None, "auto", large, print) is None, "a rank that may not touch the run"


def replace_tower(model: VisionLanguageModel) -> VisionLanguageModel:
    model.family.hf.model.vision_tower.extra = torch.nn.Linear(5000, 2001)
    return model


def test_resume_goes_through_the_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start_run(config(tiny, "always"), tmp_path / "run", dataset=DATA)
    expected = weights(run)
    for path in run.model.iterdir():
        path.unlink()
    monkeypatch.setattr(probe, "check", lambda *_: None)  # it encodes a picture of noise
    monkeypatch.setattr(VisionLanguageModel, "encoded", lambda *_: pytest.fail("encoded again"))
    assert all(
        torch.equal(expected[name], value) for name, value in weights(resume_run(run.path, dataset=DATA)).items()
    )


def test_runs_of_a_project_share_one_folder_which_a_command_removes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "features"
    monkeypatch.setenv(feature_folder.VARIABLE, str(place))
    plain = start_run(config(tiny, "never"), tmp_path / "plain", dataset=DATA)
    assert not place.exists()
    first = start_run(config(tiny, "always"), tmp_path / "first", dataset=DATA)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700 and not (first.private / "features").exists()
    counted: list[int] = []
    encode = VisionLanguageModel.encoded

    def count(model: VisionLanguageModel, pixels: list[np.ndarray], **more: int) -> object:
        counted.append(len(pixels))
        return encode(model, pixels, **more)

    monkeypatch.setattr(probe, "check", lambda *_: None)  # it encodes a picture of noise
    monkeypatch.setattr(VisionLanguageModel, "encoded", count)
    second = start_run(config(tiny, "always"), tmp_path / "second", dataset=DATA)
    assert counted == [], "the second run computed no feature"
    expected = weights(plain)
    for run in (first, second):
        assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
        assert not any("features" in str(path) for path in run.release.rglob("*"))
    (part,) = feature_folder.parts(place)
    assert part.pictures == 12
    assert command(["features", str(place), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["settings"], said["pictures"], said["deleted"]) == (1, 12, False) and said["bytes"] == part.size
    (place / part.settings / "letter.txt").write_text("mine")
    assert command(["features", str(place), "--delete"]) == 2 and len(list(place.rglob("*.safetensors"))) == 1
    (place / part.settings / "letter.txt").unlink()
    assert command(["features", str(place), "--delete"]) == 0 and not place.exists()
    assert command(["features", str(place)]) == 2


def test_a_project_folder_is_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_, release = tmp_path / "open", tmp_path / "run" / "release"
    open_.mkdir(mode=0o755)
    open_.chmod(0o755)
    release.mkdir(parents=True)
    (release / "config.yaml").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("x")
    for place, words in (
        (open_, "mode 0755"),
        (release / "features", "lies in a release"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "file", "is file"),
    ):
        monkeypatch.setenv(feature_folder.VARIABLE, str(place))
        with pytest.raises(UsageError, match=words) as error:
            feature_folder.named()
        assert "\n" not in str(error.value)
    monkeypatch.delenv(feature_folder.VARIABLE)
    assert feature_folder.named() is None
    with feature_folder.shared(tmp_path / "mine"):
        assert feature_folder.named() == tmp_path / "mine"
    assert feature_folder.named() is None
