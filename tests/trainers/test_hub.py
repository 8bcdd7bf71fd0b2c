"""Models and data sets by name, by the installed command against a hub on loopback (tests.hub)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.commands import Done, run_all
from tests.hub import Hub, Repository, serving
from tests.tiny import save_tiny_llava
from tests.trainers.test_data_local import row

TOKEN, OTHER = "hf_mYsEcReTtOkEn", "hf_sOmEbOdYeLsEs"
RUN = ["training.batch-size=2", "training.steps=2", "method=non-private", "data.test=validation"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories: two revisions of a model, a set with splits train and validation in a configuration."""
    pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("old", "new")):
        save_tiny_llava(root / name, seed=seed)
    (root / "old" / "notes.txt").write_bytes(bytes(12 << 20))
    (root / "set" / "plain").mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 2)):
        rows = [row(count * 10 + index, f"{index}?") for index in range(count)]
        pd.DataFrame(rows).to_parquet(root / "set" / "plain" / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"plain/{split}-*"} for split in ("train", "validation")]
    card = {"configs": [{"config_name": "plain", "data_files": files}]}
    (root / "set" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return root


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Hub]:
    models = {"main": place / "new", "v1": place / "old"}
    served = {
        ("models", "me/model"): Repository(models, TOKEN),
        ("models", "you/model"): Repository(models, OTHER),
        ("datasets", "me/set"): Repository({"main": place / "set"}, TOKEN),
        ("datasets", "you/set"): Repository({"main": place / "set"}, OTHER),
    }
    with serving(Hub(served)) as found:
        yield found


def run(hub: Hub, place: Path, *commands: list[str]) -> list[Done]:
    """Commands of one user, who is signed in with a token."""
    return run_all(commands, cwd=place, env=_user(hub, place), timeout=1200)


def _user(hub: Hub, place: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


FIND = """
import sys
from pathlib import Path
from dpaudit.errors import DpauditError
from trainers.fetched import model
from trainers.model_files import WANTED
for name in sys.argv[2:]:
    try:
        print("found", model(name, "model.path", WANTED, sys.argv[1] == "online"))
    except DpauditError as error:
        print(error.exit_code, error)
"""


def find(hub: Hub, place: Path, mode: str, *names: str) -> list[str]:
    """What the loader says of models by name, a line each: libraries read where the hub is when they are imported."""
    root = str(Path(__file__).parents[2])
    env = {**os.environ, **_user(hub, place), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", FIND, mode, *names], cwd=place, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout
    return lines


def test_a_line_that_breaks_a_revision_and_who_may_not_read(hub: Hub, place: Path) -> None:
    hub.cut = "model.safetensors"
    hub.once = "notes.txt"  # of 12 MB: huggingface_hub writes pieces of 10
    (broken,) = find(hub, place, "online", "me/model@v1")
    assert hub.downloads("notes.txt") == [None, "bytes=10485760-"]
    assert broken.startswith("4 model.path: 'me/model@v1' can't be fetched from the hub")
    assert broken.endswith("try again: files that came whole are kept")
    hub.cut = None
    hub.asked.clear()
    found, foreign, gone, nobody = find(hub, place, "online", "me/model@v1", "you/model", "me/model@v9", "me/nothing")
    assert found.startswith("found ")
    assert hub.downloads("model.safetensors") == [None]
    assert hub.downloads("tokenizer.json") == []
    folder = Path(found.removeprefix("found "))
    assert (folder / "model.safetensors").read_bytes() == (place / "old" / "model.safetensors").read_bytes()
    for said in (foreign, gone, nobody):
        assert said.startswith("2 model.path: got '")
        assert "or it is private: hf auth login" in said
    hub.asked.clear()
    cached, other = find(hub, place, "offline", "me/model@v1", "me/model")
    assert cached == found
    assert other == "2 model.path: got 'me/model', which is not in the local cache; --online fetches it"
    assert hub.asked == []


def test_train_by_name_and_audit_without_a_network(hub: Hub, place: Path) -> None:
    data = ["data.name=me/set", "data.subset=plain"]
    no_set, trained = run(
        hub,
        place,
        ["train", "--dry-run", "data.name=you/set", *RUN],
        ["train", "--model", "me/model@v1", *data, *RUN, "--out", "run"],
    )
    assert no_set.code == 2
    assert "data.name you/set: the hub has no such set or revision, or it is private" in no_set.line
    assert trained.code == 0, trained.stderr
    released = place / "run" / "release" / "model"
    assert (released / "adapter_model.safetensors").is_file()
    adapter = json.loads((released / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/model", "v1")

    hub.asked.clear()
    (audited,) = run(hub, place, ["audit", "run", "--mia", "--json"])
    assert audited.code in (0, 3), audited.stderr  # six units show nothing
    assert [item for item in hub.asked if "me/" in item[1]] == []  # model and data lie in the cache

    said = "".join(done.stdout + done.stderr for done in (no_set, trained, audited))
    files = [file for folder in ("run", "home") for file in (place / folder).rglob("*") if file.is_file()]
    assert len(files) > 20
    for token in (TOKEN, OTHER):
        assert token not in said
        assert [file for file in files if token.encode() in file.read_bytes()] == []
