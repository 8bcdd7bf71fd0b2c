"""A repository with packages of our names: the pytest plugin, the door and `dpaudit check` work in it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MINE = '''
"""A correct trainer, and one with half of the noise, in a package named like one of ours."""
import numpy as np
import torch

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

SIGMA, BATCH, SIZE = 1.0, 2, 8


class Loop:
    share = 1.0

    @classmethod
    def noisy(cls, each, rng):
        factor = np.minimum(1.0, 1.0 / np.maximum(np.linalg.norm(each, axis=1), 1e-12))
        return (factor @ each + cls.share * SIGMA * rng.standard_normal(each.shape[1])) / BATCH

    @classmethod
    def step(cls, state, batch):
        from trainers.helpers import scale  # the repository's own, imported while it runs
        each = scale * np.array(batch).reshape(-1, 40) - state["params"]
        mean = cls.noisy(each, state["rng"])
        return {"params": state["params"] - 0.1 * mean, "rng": state["rng"]}


class Half(Loop):
    share = 0.5


def make(loop):
    records = list(3 * np.random.default_rng(0).standard_normal((SIZE, 40)))
    claim = StepClaim("gaussian", 1.0, SIGMA, "poisson", BATCH / SIZE, float(BATCH), "add-remove", "row")
    init = lambda seed: {"params": np.zeros(40), "rng": np.random.default_rng(seed)}
    seen = (loop, "noisy")
    return step_function(
        init=init, step=loop.step, records=records, claim=claim, released=seen, per_record_gradients=seen
    )


factory, half = make(Loop), make(Half)
'''

TESTS = """
from trainers.mine import factory, half
import attacks.own


def test_contract(dp_trainer):
    assert attacks.own.NAME == "theirs"
    assert dp_trainer(factory).verdict == "pass"
    import trainers.helpers
    assert trainers.helpers.scale == 1.0


def test_half(dp_trainer):
    dp_trainer(half)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, text in {
        "trainers/__init__.py": "",
        "trainers/mine.py": MINE,
        "trainers/helpers.py": "scale = 1.0\n",
        "attacks/__init__.py": "",
        "attacks/own.py": "NAME = 'theirs'\n",
        "test_privacy.py": TESTS,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )


def test_the_fixture_in_a_repository_with_packages_of_our_names(repository: Path) -> None:
    # An installed dpaudit brings the plugin along; beside a bare source tree it has to be named.
    installed = any(point.value == "dpaudit.pytest_plugin" for point in entry_points(group="pytest11"))
    named = () if installed else ("-p", "dpaudit.pytest_plugin")
    done = run(repository, "-m", "pytest", "-q", *named, "-p", "no:cacheprovider")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "the step contract fails" in done.stdout and "noise level: measured 0.5" in done.stdout


def test_the_command_in_such_a_repository(repository: Path) -> None:
    words = ("-c", "from dpaudit.cli import main; main()", "check", "trainers.mine:half")
    done = run(repository, *words)
    assert done.returncode == 1 and "FAIL  noise level" in done.stdout, done.stdout + done.stderr


def test_the_plugin_and_the_door_are_light(tmp_path: Path) -> None:
    code = "import sys, dpaudit.under_test, dpaudit.packages; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(tmp_path, "-c", code).stdout.split() == ["False", "False"]


FOLDERS = """
import dpaudit.under_test, dpaudit.packages
import trainers.own, trainers.deep.own
assert trainers.own.NAME == trainers.deep.own.NAME == "theirs"
with dpaudit.packages.ours():
    import trainers.protocol, attacks, reports.text
import trainers.later
assert trainers.later.NAME == "theirs" and "trainers.protocol" not in __import__("sys").modules
import reports.text
print(trainers.__path__ is not None, reports.__file__)
"""


def test_folders_without_init_files(tmp_path: Path) -> None:
    """Python takes our package before such a folder wherever it stands; a folder of pages is no package."""
    for name, text in {
        "trainers/own.py": "NAME = 'theirs'\n",
        "trainers/later.py": "NAME = 'theirs'\n",
        "trainers/deep/own.py": "NAME = 'theirs'\n",
        "reports/page.html": "<html></html>\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run(tmp_path, "-c", FOLDERS)
    assert done.returncode == 0, done.stderr
