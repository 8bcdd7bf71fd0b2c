"""The examples: each passes when it is correct, and each mistake planted by flag is found.

Seeds are fixed. A correct example is tested at level 1e-6, which bounds the false alarms of this file.
"""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attacks.external.options import TrainerOptions
from attacks.external.trainer import audit_trainer
from dpaudit.cli import app
from dpaudit.documents import AuditDocument
from trainers.progress import Silent

EXAMPLES = Path(__file__).parents[2] / "examples"
DPAUDIT = Path(sys.executable).parent / "dpaudit"


@pytest.fixture(autouse=True)
def path_as_before() -> Iterator[None]:
    """An example's folder goes first on sys.path, as for a user who works in it; other tests must not see it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def audit(monkeypatch: pytest.MonkeyPatch, out: Path, example: str, target: str, **options: Any) -> AuditDocument:
    monkeypatch.chdir(EXAMPLES / example)
    asked = TrainerOptions(target, audits=("white-box",), seed=1, **options)
    return audit_trainer(asked, out, reporter=lambda _: Silent())[0]


def smallest_p(document: AuditDocument) -> float:
    return min(test.p_value for test in document.tests if test.decides and test.p_value is not None)


def test_opacus_loop_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = audit(monkeypatch, tmp_path / "a", "opacus_digits", "digits:factory", alpha=1e-6, confidence=0.999999)
    assert document.verdict in ("not refuted", "inconclusive") and smallest_p(document) > 1e-6
    powers = [test.power for test in document.tests if test.decides and test.power is not None]
    assert document.ledger[0].status == "accounted" and max(powers) > 0.2  # 0.96 at the usual level of 0.001


def test_opacus_loop_with_batch_clipping_is_refuted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = audit(monkeypatch, tmp_path / "a", "opacus_digits", "digits:factory", arguments={"bug": "batch-clip"})
    assert document.verdict == "refuted" and smallest_p(document) < 1e-12


def test_opacus_loop_with_half_the_noise_is_refuted_on_the_command_line(tmp_path: Path) -> None:
    words = ["audit", "--trainer", "digits:factory", "--set", "bug=half-noise", "--white-box", "--seed", "1"]
    done = subprocess.run(
        [str(DPAUDIT), *words, "--out", str(tmp_path / "a")],
        cwd=EXAMPLES / "opacus_digits",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "verdict   refuted" in done.stdout and "Traceback" not in done.stderr
    written = AuditDocument.read(tmp_path / "a" / "release" / "audit.json")
    assert written.run is not None and written.run.name == "digits:factory"
    assert written.run.command is not None and "bug=half-noise" in written.run.command


@pytest.mark.parametrize(("bug", "refuted"), [("none", False), ("half-noise", True)])
def test_llava_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: str, refuted: bool) -> None:
    document = audit(
        monkeypatch, tmp_path / "a", "llava_trainer", "llava:factory", arguments={"bug": bug}, alpha=1e-6, count=400
    )
    assert (document.verdict == "refuted") == refuted, document.reasons
    assert (smallest_p(document) < 1e-6) == refuted


def run_script(monkeypatch: pytest.MonkeyPatch, example: str, name: str, *words: str) -> None:
    """`python NAME WORDS` in the example's folder."""
    monkeypatch.chdir(EXAMPLES / example)
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / example / name), run_name="__main__")


@pytest.mark.parametrize("bug", ["none", "no-noise", "half-noise", "batch-clip"])
def test_score_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example's own last line is the command that is run."""
    run_script(monkeypatch, "score_file", "regression.py", str(tmp_path / "scores.csv"), "--bug", bug, "--seed", "1")
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[0] == "dpaudit"
    code = app.run([*command[1:], "--alpha", "1e-6"])
    assert code == (0 if bug == "none" else 1), capsys.readouterr().out


@pytest.mark.parametrize(("example", "name"), [("opacus_digits", "digits.py"), ("llava_trainer", "llava.py")])
def test_scripts_train_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: str, name: str
) -> None:
    run_script(monkeypatch, example, name)
    assert "eps = " in capsys.readouterr().out
