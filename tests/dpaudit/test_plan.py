"""`dpaudit plan`: powers against simulation, needed canaries, words, figure, errors."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpaudit.analysis import claim as claims
from dpaudit.analysis import plan, simulate
from dpaudit.analysis.claim import Game
from dpaudit.cli import app
from dpaudit.documents import Claim
from dpaudit.errors import UsageError

DPAUDIT = Path(sys.executable).parent / "dpaudit"
CLAIM = Claim(
    epsilon=4.377,
    delta=1e-5,
    relation="add-remove",
    unit="image",
    noise_multiplier=1.0,
    sampling="full",
    steps=1,
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process (starting Python and pandas anew for each call would take minutes)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = app.run(["plan", *map(str, arguments)])
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def from_the_shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DPAUDIT), "plan", *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("separate", "scale", "alpha"), [(True, 0.8, 0.05), (False, 0.5, 0.05)])
def test_power_is_the_simulated_one(separate: bool, scale: float, alpha: float) -> None:
    row = plan.plan(CLAIM, canaries=400, alpha=alpha, alternative=scale, separate=separate)
    rng = np.random.default_rng(1)
    scores, inside = simulate.gaussian(2000, 400, 1 / scale, rng)
    right = simulate.right_guesses(scores, inside, row.top, row.bottom, rng)
    null = claims.null_profile(CLAIM)
    refuted = {
        int(v): Game(400, row.guesses, int(v)).read_by(separate=separate).p_value(null) <= alpha for v in set(right)
    }
    share = np.mean([refuted[int(v)] for v in right])
    # Guessing half top, half bottom is a shade less than the best by |likelihood ratio|: 5.3 sd and 0.02 of slack.
    assert abs(share - row.power) < 5.3 * np.sqrt(0.25 / 2000) + 0.02
    assert row.power > 0.5


def test_more_canaries_more_power() -> None:
    rows = plan.table(CLAIM, alpha=0.001, alternative=0.7, separate=True, sizes=(50, 200, 1000))
    powers = [row.power for row in rows]
    assert powers == sorted(powers) and powers[-1] > 0.99
    assert plan.canaries_needed(rows) == 1000
    assert plan.canaries_needed(rows[:1]) is None
    for row in rows:
        assert row.top + row.bottom == row.guesses <= row.canaries


def test_guesses_to_exceed() -> None:
    """design.md: eps = 8 at 95 % takes 8,932 right guesses."""
    assert plan.guesses_to_exceed(8.0, delta=0.0, confidence=0.95) == 8932
    assert plan.guesses_to_exceed(40.0, delta=1e-5, confidence=0.95) is None


def test_bound_guesses_depend_on_the_number_alone() -> None:
    for method in ("steinke", "mahloujifar", "order-statistic"):
        guesses = plan.bound_guesses(method, canaries=1000, delta=1e-5, confidence=0.95)
        assert 1 <= guesses <= 1000


@pytest.mark.parametrize(
    ("text", "value"), [("20%", 0.8), ("30 %", 0.7), ("0.8", 0.8), ("noise-missing", 0.0), ("no-dp", "no-dp")]
)
def test_alternatives(text: str, value: object) -> None:
    assert plan.parse_alternative(text) == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("text", ["", "120%", "0%", "2", "twice", "-0.5"])
def test_bad_alternatives(text: str) -> None:
    with pytest.raises(UsageError, match="--alternative"):
        plan.parse_alternative(text)


def test_command(tmp_path: Path) -> None:
    figure = tmp_path / "power.png"
    flags = ["--claim-sigma", "1", "--claim-rate", "0.05", "--claim-steps", "200", "--canaries", "100,1000"]
    done = run(*flags, "--alternative", "20%", "--figure", figure)
    assert done.returncode == 0, done.stderr
    assert "20% smaller" in done.stdout and "80 % power: 1000 canaries" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    missing = from_the_shell(*flags, "--alternative", "noise-missing", "--json")
    document = json.loads(missing.stdout)
    assert document["alternative"] == "the noise is missing"
    assert document["canaries_needed"] == {"exact-likelihood": 100, "order-statistic": 100, "f-dp": 100}
    assert len(document["rows"]) == 6


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--claim-sigma", "0"], "sigma"),
        (["--canaries", "10,many"], "--canaries"),
        (["--alternative", "worse"], "--alternative"),
        (["--alpha", "1"], "alpha"),
        (["--figure", "power.exe"], "--figure"),
    ],
)
def test_errors(flags: list[str], names: str) -> None:
    base = {"--claim-sigma": "1", "--claim-rate": "1", "--claim-steps": "1", "--canaries": "50"}
    base.update(dict([flags]))
    done = run(*[part for pair in base.items() for part in pair])
    assert done.returncode == 2 and names in done.stderr and len(done.stderr.strip().splitlines()) == 1
