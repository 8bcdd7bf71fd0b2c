"""trainers.data.hub: the export of a set through `datasets`, and one clear line when it can't be had."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants

from dpaudit.config import DataConfig
from dpaudit.errors import EnvironmentFailure, UsageError
from tests.trainers.test_data_local import row
from trainers.data import hub, load
from trainers.data.rows import open_source, read_rows


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DPAUDIT_ONLINE", "1")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("hf")))


def test_export_keeps_pictures_as_they_are_and_caches_only_where_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads a folder as it reads a hub set; tests/trainers/test_hub.py speaks the hub's protocol."""
    pytest.importorskip("datasets")
    source = tmp_path / "set"
    source.mkdir()
    rows = [row(1, "a?") | {"unused": "x"}, row(2, "b?") | {"unused": "y"}]
    pd.DataFrame(rows).to_parquet(source / "train.parquet")
    home, cache, target = tmp_path / "home", tmp_path / "cache", tmp_path / "out.parquet"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    hub.export(str(source), {"train": target}, cache, ["image", "question", "answer", "kind"])
    exported = [
        item for _, item in read_rows(open_source(tmp_path, "out.parquet", "data.train"), ["image", "question"])
    ]
    assert [item["image"]["bytes"] for item in exported] == [item["image"]["bytes"] for item in rows]
    assert "unused" not in pd.read_parquet(target).columns
    assert not list(home.rglob("*"))
    assert list(cache.rglob("*.arrow"))


def test_a_configuration_of_somebody_else_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPAUDIT_ONLINE")
    with pytest.raises(UsageError, match=r"^data\.name: got 'nobody/nothing', a set on the hub that .*; --online"):
        load(DataConfig(name="nobody/nothing"))


def test_a_set_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        EnvironmentFailure, match=r"^data\.name nobody/nothing: train and test can't be loaded"
    ) as caught:
        load(DataConfig(name="nobody/nothing"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b/c", "a b", "-x", ""])
def test_names_that_are_not_hub_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^data\.name"):
        load(DataConfig(name=name))


def test_a_hub_set_goes_through_the_same_checks_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def export(name: str, targets: dict[str, Path], cache: Path, columns: list[str], subset: str | None) -> None:
        calls.append(name)
        for split, target in targets.items():
            pd.DataFrame([row(1, "a?"), row(1, "b?"), row(2)] if split == "train" else [row(3)]).to_parquet(target)

    monkeypatch.setattr(hub, "export", export)
    data = load(DataConfig(name="someone/something@main"))
    assert data.source == "hub"
    assert data.name == "someone/something@main"
    assert [len(unit.pictures[0].questions) for unit in data.train] == [2, 1]
    assert np.all(data.train[0].pictures[0].pixels.shape == (8, 8, 3))
    monkeypatch.delenv("DPAUDIT_ONLINE")
    again = load(DataConfig(name="someone/something@main"))  # a command that reads the run: no network
    assert [unit.id for unit in again.train] == [unit.id for unit in data.train]
    assert calls == ["someone/something@main"]
    with pytest.raises(UsageError, match="not in the local cache"):
        load(DataConfig(name="someone/something@other"))
