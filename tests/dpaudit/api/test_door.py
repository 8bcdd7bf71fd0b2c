"""`import dpaudit` costs nothing, and the door's training half: check and audit against what the shell's code finds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpaudit
from dpaudit.errors import UsageError
from dpaudit.under_test import step_function
from tests.attacks.external_toy import Toy
from tests.dpaudit.api import loop

HEAVY = ("torch", "numpy", "pandas", "scipy", "pydantic", "matplotlib", "transformers")


def test_import_is_free() -> None:
    """Nothing heavy at import, which is what makes it fast; the scores' half without torch and matplotlib."""
    code = f"""
import sys
import dpaudit
assert "Scores" in dir(dpaudit) and dpaudit.__version__
assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)
dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).auc(), dpaudit.tradeoff(epsilon=1)
assert not {{"torch", "matplotlib", "trainers", "attacks"}} & set(sys.modules)
try:
    dpaudit.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hidden", "call", "line"),
    [
        ("torch", "dpaudit.check('a:b')", "check: needs torch, which is not installed: pip install 'dpaudit[train]'"),
        ("torch", "dpaudit.under_test.hf_trainer", "dpaudit.under_test: needs torch, which is not installed: pip "
         "install 'dpaudit[train]'"),
        ("matplotlib", "dpaudit.tradeoff(epsilon=1).plot()", "plot: needs matplotlib, which is not installed: pip "
         "install 'dpaudit[plot]'"),
        ("pyarrow", "dpaudit.Scores('s.parquet')", "scores: needs pyarrow, which is not installed: pip install "
         "'dpaudit[parquet]'"),
        ("pyarrow", "dpaudit.Scores(in_scores=range(40), out_scores=range(40), features='s.parquet')", "scores: needs "
         "pyarrow, which is not installed: pip install 'dpaudit[parquet]'"),
        # a run needs more than the one package that it missed first
        ("pyarrow", "dpaudit.audit('run')", "audit: needs pyarrow, which is not installed: pip install "
         "'dpaudit[train]'"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_named(hidden: str, call: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "s.parquet").touch()
    (tmp_path / "run").mkdir()
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import dpaudit, dpaudit.under_test
{call}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert line in done.stderr.splitlines()[-1], done.stderr


def factory(**changed: Any) -> Any:
    given: dict[str, Any] = {"init": loop.start, "step": loop.step, "records": loop.records, "claim": loop.claim}
    return step_function(**given | {"released": loop.noisy, "per_record_gradients": loop.noisy} | changed)


def test_check_refutes_half_of_the_noise() -> None:
    """The claim says twice the sigma that the step adds."""
    import dataclasses

    wrong = factory(claim=dataclasses.replace(loop.claim, noise_multiplier=2.0), records=loop.records[:8])
    found = dpaudit.check(wrong, allow={"noise law": "for the test"})
    assert found.verdict == "fail" and "noise level" in [check.name for check in found.failed]
    assert "noise level" in repr(found) and "fail" in found._repr_html_()
    assert found["noise level"].status == "fail"
    with pytest.raises(UsageError, match="check: got 'nothing'"):
        found["nothing"]


def test_audit_of_a_factory_and_of_its_name_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_object = dpaudit.audit(Toy, white_box=True, seed=1, steps=25)
    by_name = dpaudit.audit("tests.attacks.external_toy:Toy", white_box=True, seed=1, steps=25)
    assert by_object.verdict == by_name.verdict == "not refuted" and by_object.document.tests == by_name.document.tests
    assert by_object.bound is not None and by_object.within_mechanism is not None
    assert (by_object.path / "release" / "audit.json").is_file() and by_object.path != by_name.path
    half = dpaudit.audit(Toy, white_box=True, seed=1, arguments={"noise": 0.5}, out=tmp_path / "half")
    assert half.verdict == "refuted" and half.path == tmp_path / "half"
    assert "refuted" in repr(half) and "refuted" in half._repr_html_() and "p = " in repr(half)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: dpaudit.check(3), "factory: got 3"),
        (lambda: dpaudit.check("nowhere"), "module:factory"),
        (lambda: dpaudit.check("nowhere:at_all"), "no module of this name"),
        (lambda: dpaudit.check(Toy, allow={"no such": "x"}), "allow"),
        (lambda: dpaudit.check(Toy, allow={"noise law": " "}), "reason"),
        (lambda: dpaudit.check(Toy, delta=1e-5), "delta only beside epsilon"),
        (lambda: dpaudit.check(lambda: None), "factory"),
        (lambda: dpaudit.audit("nowhere"), "nowhere"),
        (lambda: dpaudit.audit(Path("nowhere")), "nowhere"),
        (lambda: dpaudit.audit("nowhere", epsilon=3), "epsilon: belongs to training code"),
        (lambda: dpaudit.audit(Toy, again=True), "again: applies to a run folder"),
        (lambda: dpaudit.audit(Toy, mia=True), "mia"),
        (lambda: dpaudit.audit(Toy, count=0, white_box=True), "count"),
        (lambda: dpaudit.audit(Toy, alpha=2), "alpha"),
        (lambda: dpaudit.audit(Toy(seed=0)), "factory: got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(made: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        made()
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
