"""`dpaudit bound`: values, documents, errors, and that it never imports torch."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpaudit.bounds.calculator import METHODS, compute
from dpaudit.cli import app
from dpaudit.errors import UsageError

DPAUDIT = Path(sys.executable).parent / "dpaudit"
RUNS = ["--tp", "450", "--fn", "50", "--fp", "50", "--tn", "450"]
GAME = ["--canaries", "1000", "--guesses", "200", "--correct", "190"]
CALLS = {
    "clopper-pearson": (RUNS, 1.9035, "none"),
    "gdp": (RUNS, 11.6049, "gaussian"),
    "bayes": (RUNS, 2.0726, "prior"),
    "steinke": (GAME, 2.3936, "none"),
    "mahloujifar": (GAME, 3.9161, "gaussian"),
    "order-statistic": (["--canaries", "1000", "--guesses", "500", "--errors", "103"], 3.7557, "gaussian"),
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process (starting Python and pandas anew for each call would take minutes)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = app.run(["bound", *map(str, arguments)])
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def from_the_shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DPAUDIT), "bound", *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("method", CALLS)
def test_json(method: str) -> None:
    arguments, value, assumes = CALLS[method]
    done = run(method, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["epsilon_lower"] == pytest.approx(value, abs=6e-4)
    assert document["ceiling"] > document["epsilon_lower"]
    assert (document["method"], document["assumes"], document["delta"]) == (method, assumes, 1e-5)
    assert document["estimate"] is (method == "bayes")


def test_people_read_bound_ceiling_and_limit() -> None:
    done = run("order-statistic", "--canaries", "1000", "--guesses", "500", "--errors", "176", "--sample-rate", "0.5")
    assert done.returncode == 0
    assert "2.2774" in done.stdout and "ceiling" in done.stdout and "never prove privacy" in done.stdout
    assert "more canaries" in from_the_shell("steinke", "--canaries", "9", "--guesses", "9", "--correct", "9").stdout


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], "METHOD"),
        (["steinke", "--canaries", "10"], "--guesses"),
        (["steinke", *GAME, "--tp", "3"], "--tp"),
        (["steinke", "--canaries", "10", "--guesses", "11", "--correct", "3"], "guesses"),
        (["steinke", *GAME, "--confidence", "1.5"], "confidence"),
        (["gdp", *RUNS, "--delta", "-1"], "delta"),
        (["gdp", "--tp", "many"], "tp"),
    ],
)
def test_errors_are_one_line(arguments: list[str], names: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert names in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_needs_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, dpaudit.bounds as b\n"
        "for m in pkgutil.iter_modules(b.__path__): importlib.import_module('dpaudit.bounds.' + m.name)\n"
        "import dpaudit.analysis.claim\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_method_names_its_assumption() -> None:
    assert set(METHODS) == set(CALLS)
    with pytest.raises(UsageError, match="sample-rate"):
        compute(
            "order-statistic",
            {"canaries": 10, "guesses": 5, "errors": 1, "sample-rate": 0.0},
            delta=1e-5,
            confidence=0.95,
        )
