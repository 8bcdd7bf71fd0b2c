"""Results in the wrong place, ids that name huge numbers, and environments that make no sense: whole commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.faults.hostile_files import audit_words
from tests.faults.scenarios import SETTINGS, write_data
from tests.faults.test_hostile_files import place, refused, run, world

__all__ = ["place", "world"]  # fixtures


def train(place: Path, out: str) -> list[str]:
    write_data(place / "data")
    data = [f"data.path={place / 'data'}", "data.train=train.jsonl", "data.test=test.jsonl"]
    return ["train", f"model.path={place / 'base'}", *data, *SETTINGS, "--out", out]


def audit(place: Path, out: str) -> list[str]:
    return [*audit_words(place), "--out", out]


def keygen(place: Path, out: str) -> list[str]:
    return ["keygen", out]


def everything(place: Path) -> dict[str, bytes | None]:
    paths = [path for path in place.rglob("*") if "data" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in paths}


TARGETS = (
    "{place}/pipe", "{place}/file", "{place}/link-to-file", "{place}/link-to-folder", "{place}/link-to-nothing",
    "{place}/base", "/dev/null", "/dev/full", "/proc/self/fd/1", "/proc/new", "{place}/" + "x" * 300, "",
)  # fmt: skip


@pytest.mark.parametrize("command", [train, audit, keygen])
@pytest.mark.parametrize("target", TARGETS)
def test_results_take_the_place_of_nothing(place: Path, command: object, target: str) -> None:
    os.mkfifo(place / "pipe")
    (place / "file").write_text("precious")
    (place / "outside").mkdir()
    (place / "outside/thesis.tex").write_text("precious")
    (place / "link-to-file").symlink_to(place / "outside/thesis.tex")
    (place / "link-to-folder").symlink_to(place / "outside")
    (place / "link-to-nothing").symlink_to(place / "nowhere")
    before = everything(place)
    ended = run(command(place, target.format(place=place)), place)  # type: ignore[operator]
    told = [line for line in ended.err.splitlines() if line.startswith("dpaudit: ")]
    assert ended.code in (2, 4) and told == [ended.line] and not ended.foreign, (ended.code, ended.err)
    assert everything(place) == before


@pytest.mark.parametrize("command", [train, audit])
@pytest.mark.parametrize("name", ["base/new", "base/a/b", "adapter/../base/new", "link/new", "base/../base/x/../y"])
def test_results_do_not_go_into_a_model_that_is_read(place: Path, command: object, name: str) -> None:
    (place / "link").symlink_to(place / "base")
    before = everything(place)
    refused(command(place, str(place / name)), place, "which is read; choose a place outside of it")  # type: ignore[operator]
    assert everything(place) == before


IDS = (
    "gradient-99999999999", "gradient--1", "gradient-1e9", "gradient-0001", "canary-99999999999999999999", "gradient-٣",
    "gradient-0x7fffffff", "gradient-", "1e400", "-0",
)  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_nothing_is_as_large_as_the_number_in_an_id(place: Path, name: str) -> None:
    """Among scores an id is a name; among coins it is that of a record, or refused."""
    ids = [name, *(f"r{at}" for at in range(39))]
    frame = pd.DataFrame({"id": ids, "member": [0, 1] * 20, "score": np.arange(40.0)})
    frame.to_csv(place / "scores.csv", index=False)
    ended = run(["scores", "scores.csv", "--delta", "1e-5", "--json"], place)
    assert ended.code == 0 and ended.memory < 1 << 30 and "40 rows, 40 ids" in ended.out, ended.err
    frame[["id", "member"]].to_csv(place / "coins.csv", index=False)
    refused(audit_words(place), place, "have no coin")
    pd.concat([frame, frame[:1]]).to_csv(place / "scores.csv", index=False)
    refused(["scores", "scores.csv", "--delta", "1e-5"], place, "scores.csv", code=2)


ENVIRONMENTS = (
    {"TMPDIR": "/nonexistent"}, {"COLUMNS": "1000000000"}, {"COLUMNS": "abc"}, {"LC_ALL": "xx_XX.bogus"},
    {"PYTHONIOENCODING": "ascii"}, {"HOME": "/dev/null", "HF_HOME": "/dev/null", "TMPDIR": "/dev/null"},
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_no_environment_changes_the_answer(tmp_path: Path, environment: dict[str, str]) -> None:
    """The installed command, with scores of ids that no narrow encoding has."""
    frame = pd.DataFrame({"id": [f"ä漢{at}" for at in range(40)], "member": [0, 1] * 20, "score": np.arange(40.0)})
    frame.to_csv(tmp_path / "scores.csv", index=False)
    program = str(Path(sys.executable).with_name("dpaudit"))
    gone = ["scores", "gone-漢.csv", "--delta", "1e-5"]
    for words in (["scores", "scores.csv", "--delta", "1e-5"], gone, ["--help"]):
        done = subprocess.run(
            [program, *words], env=os.environ | environment, cwd=tmp_path, capture_output=True, timeout=300
        )
        assert done.returncode == (2 if words is gone else 0), done.stderr
        assert b"Traceback" not in done.stderr and len(done.stdout) < 1 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv"]
