"""`dpaudit check` and `dpaudit bugs` end to end, in a folder that has packages of our names."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from attacks.bugs.benchmark import BugsDocument
from attacks.contract import noise
from attacks.contract.bench import Bench
from attacks.contract.loading import load_factory, source
from attacks.contract.probe import Probe
from dpaudit.cli import app
from dpaudit.cli.check import exit_code
from dpaudit.documents import Check, CheckDocument
from dpaudit.errors import UsageError
from tests import commands

DPAUDIT = Path(sys.executable).parent / "dpaudit"
TRAINER = """
from trainers.adapters.compact import Compact
print("a line of foreign output")
TRAINER = "a name that is no factory"

class Good(Compact):
    pass

class Bad(Compact):
    epsilon = None  # an accountant takes seconds to start

    def noise_std(self):
        return 0.5 * super().noise_std()

class Hangs(Compact):
    def released(self):
        while True:
            pass
"""


GLUED = """
import numpy as np

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

claim = StepClaim("gaussian", 1.0, 1.0, "poisson", 0.5, 2.0, "add-remove", "row")
factory = step_function(
    init=lambda seed: {"params": np.zeros(2)}, step=lambda state, batch: state, records=[0, 1], claim=claim,
    released=lambda state: state["params"],
)
"""


CENTRED = """
import os

import torch
from torch import nn

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

BUG, SIZE, BATCH, D = os.environ["BUG"], 24, 6, 40

def rows():
    return list(torch.randn(SIZE, D, generator=torch.Generator().manual_seed(3)))

def init(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    model = nn.Linear(D, 3, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)

def step(state, batch):
    model, optimizer = state
    public = torch.Generator().manual_seed(7)
    centre, total = torch.randn(D, generator=public), torch.zeros(3, D)
    for x in batch:
        optimizer.zero_grad()
        (model(x - centre) - 1).square().sum().backward()
        total += model.weight.grad * min(1.0, 1.0 / max(float(model.weight.grad.norm()), 1e-12))
    noise = torch.randn(3, D, generator=public) if BUG == "public-noise" else torch.randn_like(total)
    model.weight.grad = (total + (0.4 if BUG == "half-noise" else 0.8) * noise) / BATCH
    optimizer.step()
    return state

claim = StepClaim("gaussian", 1.0, 0.8, "poisson", BATCH / SIZE, float(BATCH), "add-remove", "row", 50, 1e-5)
factory = step_function(init=init, step=step, records=rows, claim=claim)
"""


NOTICES = """
import warnings

warnings.warn("this argument will be removed", FutureWarning)
warnings.warn("the loss is not finite", UserWarning)
"""


def test_notices_of_libraries_to_developers_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library tells its own developers is left out; what foreign code warns its user of is not."""
    (tmp_path / "notices_of_mine.py").write_text(NOTICES)
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    monkeypatch.setattr("warnings.showwarning", lambda message, *_, **__: shown.append(str(message)))
    assert app.run(["check", "notices_of_mine:factory"]) == 2  # it has none
    assert shown == ["the loss is not finite"]


def test_a_loop_under_test_lies_where_its_owner_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory is a function of ours, but SARIF must point at the owner's line."""
    (tmp_path / "glued_by_me.py").write_text(GLUED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = source("glued_by_me:factory", load_factory("glued_by_me:factory"))
    assert (found.file, found.line) == ("glued_by_me.py", 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's own packages carry our names, and importing one of them by mistake ends the process."""
    for name in ("trainers", "attacks", "reports"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} of the folder was imported')")
    (tmp_path / "mine.py").write_text(TRAINER)
    return tmp_path


def run(folder: Path, *arguments: str, module: bool | None = None) -> subprocess.CompletedProcess[str]:
    """module: `python -m dpaudit`, or the installed script; None: a copy of a process that has our packages already."""
    if module is None:
        done = commands.run(*arguments, cwd=folder, timeout=120)
        return subprocess.CompletedProcess(arguments, done.code, done.stdout, done.stderr)
    start = [sys.executable, "-m", "dpaudit"] if module else [str(DPAUDIT)]
    return subprocess.run([*start, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_correct_trainer_passes_beside_packages_of_our_names(folder: Path) -> None:
    done = run(folder, "check", "mine:Good", "--json", module=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)  # exactly one document, foreign output went to stderr
    Draft202012Validator(CheckDocument.json_schema()).validate(tree)
    assert tree["verdict"] == "pass" and "a line of foreign output" in done.stderr


def test_a_package_of_the_users_that_is_named_like_ours_is_tried_too(folder: Path) -> None:
    done = run(folder, "check", "trainers.mine:factory", module=False)
    assert done.returncode == 2 and "import trainers.mine: raised SystemExit" in done.stderr, done.stderr


def test_a_wrong_trainer_fails_with_measured_allowed_and_the_usual_bug(folder: Path) -> None:
    done = run(folder, "check", "mine:Bad")
    assert done.returncode == 1
    assert "FAIL  noise level" in done.stdout
    assert re.search(r"measured  0\.(49|5)\d* x the claimed noise", done.stdout)
    assert "usually" in done.stdout and "mine:Bad: fail" in done.stdout


def test_a_constant_that_is_drawn_in_the_step_is_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public centre from a generator that the step makes and seeds with one number."""
    (tmp_path / "centred.py").write_text(CENTRED)
    monkeypatch.setenv("BUG", "none")
    done = run(tmp_path, "check", "centred:factory", "--json")
    assert done.returncode == 0, done.stdout
    assert not [check for check in json.loads(done.stdout)["checks"] if check["status"] == "fail"]


@pytest.mark.parametrize(
    ("bug", "failed"), [("half-noise", {"noise level"}), ("public-noise", {"noise level", "noise over steps"})]
)
def test_and_it_hides_no_fault(bug: str, failed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUG", bug)
    namespace: dict[str, Any] = {}
    exec(CENTRED, namespace)
    made = noise.checks(Bench(Probe(namespace["factory"])))
    found = {check.name for check in made if check.status == "fail"}
    assert found >= failed and noise.OF_DATA not in found


def test_inconclusive_is_3_only_when_strict() -> None:
    check = Check(name="clipping", status="not applicable", measured="-", allowed="-", explanation="-")
    document = CheckDocument(verdict="inconclusive", checks=(check,))
    assert [exit_code(document, strict=strict) for strict in (False, True)] == [0, 3]


def test_a_hang_is_one_line_and_exit_2(folder: Path) -> None:
    done = run(folder, "check", "mine:Hangs", "--time-limit", "1", module=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "dpaudit: released(): did not return within 1 s (--time-limit)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["mine:Missing"], "accepted: a callable of mine: Compact, Good, Bad"),
        (["mine:TRAINER"], "accepted: a callable; TRAINER is str"),
        (["nowhere:factory"], "no module of this name"),
        (["mine"], "accepted: module:factory"),
        (["mine:Good", "--time-limit", "0"], "--time-limit"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    folder: Path,
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    # The watchdog thread ends the process; it must not outlive this test.
    monkeypatch.setattr("attacks.contract.guard.start_watchdog", lambda _report: None)
    assert app.run(["check", *arguments]) == 2
    shown = capsys.readouterr()
    assert line in " ".join(shown.err.split()) and shown.out == ""


def test_bugs_as_json(folder: Path) -> None:
    done = run(folder, "bugs", "no-noise", "--json")
    assert done.returncode == 0
    tree = json.loads(done.stdout)
    Draft202012Validator(BugsDocument.json_schema()).validate(tree)
    assert tree["bugs"][0]["contract"][0] == "noise level"


def test_an_unknown_bug_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bugs", "no-such-bug"]) == 2
    assert "BUG: got 'no-such-bug'; accepted: one of" in " ".join(capsys.readouterr().err.split())


def test_import_errors_of_foreign_code_keep_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(UsageError, match="import needs_more: raised ModuleNotFoundError: No module named 'a_package"):
        load_factory("needs_more:factory")
    (tmp_path / "broken_code.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=r"import broken_code: raised ZeroDivisionError.*broken_code.py:1"):
        load_factory("broken_code:factory")
