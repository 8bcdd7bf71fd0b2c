"""The example in every docstring of the Python door, run as it stands."""

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot
import pytest

import dpaudit
from tests.dpaudit.api import loop

MODULES = ("claims", "curves", "results", "scores", "training")
GIVEN = {name: getattr(loop, name) for name in ("start", "step", "records", "claim", "noisy")}
FINDER = doctest.DocTestFinder(exclude_empty=True)


def module(name: str) -> ModuleType:
    return importlib.import_module(f"dpaudit.api.{name}")


CASES = [found for name in MODULES for found in FINDER.find(module(name), globs={}) if found.examples]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_example(case: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    if case.name.startswith("dpaudit.api.training"):
        case.globs = dict(GIVEN)
    lines: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(case, out=lines.append, clear_globs=False)
    assert not lines, "".join(lines)
    matplotlib.pyplot.close("all")


def test_every_public_name_has_one() -> None:
    """What a user can call: the names of the door, and the public methods of Scores and Tradeoff."""
    shown = {case.name for case in CASES}
    for name in dpaudit.__all__:
        value = getattr(dpaudit, name)
        assert value.__doc__, name
        if name not in ("Audit", "Contract"):  # what check and audit return
            assert f"{value.__module__}.{value.__qualname__}" in shown, name
    for method in ("epsilon", "bounds", "test", "document", "auc", "tpr", "plot_roc", "plot_scores"):
        assert f"dpaudit.api.scores.Scores.{method}" in shown, method
