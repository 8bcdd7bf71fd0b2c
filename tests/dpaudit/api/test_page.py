"""docs/python.md: its programs run, and its table is what the benchmark measured."""

import csv
import inspect
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest

import dpaudit
from tests.dpaudit.api import loop

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bound, a test of a claim and two plots, on a score file."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": range(500), "member": rng.random(500) < 0.5})
    frame.assign(score=rng.normal(size=500) + frame["member"]).to_csv("scores.csv", index=False)
    assert len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 10
    space: dict[str, Any] = {}
    exec(PROGRAMS[0], space)
    out = capsys.readouterr().out
    assert "Bound: eps >= " in out and "verdict   inconclusive" in out
    assert len(matplotlib.pyplot.get_fignums()) == 2
    matplotlib.pyplot.close("all")


def test_the_curve() -> None:
    space: dict[str, Any] = {}
    exec(PROGRAMS[1], space)
    curve = space["curve"]
    assert (round(curve.tpr(0.01), 3), round(curve.advantage(), 3), round(curve.epsilon(1e-5), 2)) == (
        0.083,
        0.333,
        4.77,
    )


def test_the_loop_is_the_one_that_the_docstrings_are_run_on() -> None:
    for function in (loop.start, loop.noisy_mean, loop.step):
        assert inspect.getsource(function) in PROGRAMS[2]
    assert "SIZE, BATCH, WIDTH = 24, 4, 2500" in PROGRAMS[2] and loop.WIDTH == 2500


def test_the_table_is_what_was_measured() -> None:
    with (ROOT / "benchmarks" / "results" / "bounds_peers.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "best" and row["per_side"] == "1000"]
    names = {
        "epsilon_one_run(": "one run, assumes nothing",
        "epsilon_one_run_fdp": "one run, Gaussian family",
        "epsilon_clopper_pearson": "Clopper-Pearson, threshold by the tool's rule",
        "epsilon_from_gdp": "GDP, threshold by the tool's rule",
        "attack_auroc": "AUC",
    }
    shown, what = 0, ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or not re.fullmatch(r"[012]", cells[2]):
            continue
        what = next((names[name] for name in names if name in cells[0]), what)
        row = next(row for row in rows if row["what"] == what and float(row["mu"]) == float(cells[2]))
        for cell, value in ((cells[4], row["jax_privacy"]), (cells[5], row["dpaudit"])):
            digits = len(cell.partition(".")[2])
            assert float(cell) == pytest.approx(round(float(value), digits), abs=10.0**-digits * 0.51), (what, cell)
        shown += 1
    assert shown == 9


def test_every_name_of_the_door_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for name in dpaudit.__all__:
        value = getattr(dpaudit, name)
        assert f"::: {value.__module__}.{value.__qualname__}" in text
