"""`examples/scores.ipynb`, executed as it stands: a bound, tests of a claim, two plots, half of the noise refuted."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import pytest

import dpaudit

NOTEBOOK = Path(__file__).parents[2] / "examples" / "scores.ipynb"
CELLS = [
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def run(cells: list[str]) -> Iterator[Any]:
    """The value of the last expression of each cell, None where there is none."""
    space: dict[str, Any] = {}
    for number, text in enumerate(cells):
        body = ast.parse(text).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), space)
        yield eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space) if last else None


def test_the_stored_outputs_are_those_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are fixed, so what a reader sees on the page is what the code prints."""
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    seen = 0
    for cell, value in zip(cells, run(CELLS), strict=True):
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                assert "".join(output["data"]["text/plain"]) == repr(value)
                assert "".join(output["data"]["text/html"]) == value._repr_html_()
                seen += 1
    assert seen == 7
    matplotlib.pyplot.close("all")


def test_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("agg")
    matplotlib.pyplot.close("all")
    found = list(run(CELLS))
    bound = next(value for value in found if isinstance(value, dpaudit.Bound))
    assert 0 < bound.value < bound.ceiling and bound.decides
    tests = [value.verdict for value in found if isinstance(value, dpaudit.ClaimTest)]
    assert tests == ["inconclusive", "not refuted", "refuted"]
    assert len(matplotlib.pyplot.get_fignums()) == 2
    matplotlib.pyplot.close("all")
