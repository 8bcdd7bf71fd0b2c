"""What the documentation states and a file can decide: sharp edges against the planted-bug benchmark, settings."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpaudit.config import resolve
from reports.sweep.document import SweepDocument
from reports.sweep.grid import as_grid, make_plan

ROOT = Path(__file__).parents[1]
EDGES = (ROOT / "docs" / "sharp-edges.md").read_text(encoding="utf-8")
BUGS: dict[str, dict[str, Any]] = {
    bug["name"]: bug
    for bug in json.loads((ROOT / "benchmarks" / "results" / "planted_bugs.json").read_text(encoding="utf-8"))["bugs"]
}
ITEMS = re.findall(r"^\*\*(\d+)\. (.*?)(?=^\*\*\d|^## )", EDGES, re.DOTALL | re.MULTILINE)


def test_there_are_twenty() -> None:
    assert [int(number) for number, _ in ITEMS] == list(range(1, 21))


@pytest.mark.parametrize(("number", "text"), ITEMS, ids=[number for number, _ in ITEMS])
def test_each_is_found_by_the_check_that_it_names(number: str, text: str) -> None:
    """Every check named failed on one of the planted bugs named, and every such bug failed one of the checks."""
    flat = " ".join(text.split())
    named = [BUGS[name] for name in re.findall(r"`([a-z0-9-]+)`", flat)]
    assert named
    checks = [check.strip() for found in re.findall(r"[Cc]ontract \(([^)]*)\)", flat) for check in found.split(",")]
    for check in checks:
        assert any(check in bug["contract"] for bug in named), f"{check}: failed on none of them"
    if not checks:  # what no test of a step sees
        caught = {bug["name"] for bug in named if bug["caught"]}
        assert number == "20" and caught == {"data-set-statistics", "private-learning-rate"}
    for bug in named:
        assert not checks or set(checks) & set(bug["contract"]), f"{bug['name']}: failed {bug['contract']}"
    if "white box" in flat:
        assert any(bug["game"] for bug in named), "the white box refuted none of them"


def script(name: str) -> Any:
    """A file of the repository that belongs to no package, as a module."""
    path = ROOT / name
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_pages_that_a_script_writes_are_what_it_writes() -> None:
    """From committed results: statistics by its template, the figures of the attacks, the tables of both ablations."""
    statistics, attacks = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("statistics.md", "attacks.md")
    )
    assert script("benchmarks/bounds_document.py").filled() == statistics
    assert script("benchmarks/attack_document.py").filled(attacks) == attacks
    ablation = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    for name in ("ablation_digits", "ablation_sign_digits"):
        document = SweepDocument.read(ROOT / "benchmarks" / "results" / f"{name}.json")
        assert script("benchmarks/sweep_results.py").table(document) in ablation, name


def test_every_setting_is_on_its_page_with_what_it_is() -> None:
    """The page is made from the configuration: each field has a line there, and says what it is."""
    hooks = script("docs/hooks.py")
    page = hooks.on_page_markdown((ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8"))
    config = yaml.safe_load(resolve({}).to_yaml())
    listed = set(re.findall(r"^\| `([a-z0-9.-]+)` \| [^|]+ \| [^|]+ \| [^| ][^|]+ \|$", page, re.MULTILINE))
    assert listed == set(_leaves(config))
    assert "`reducer.name=visionzip`" in page  # what a method changes


def _leaves(tree: dict[str, Any], name: str = "") -> Iterator[str]:
    for key, value in tree.items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield path


def test_the_files_on_the_page_of_settings_are_accepted() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    run, grid = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert resolve(run).canaries.count == 300
    plan = make_plan(as_grid(grid, Path("grid.yaml")))
    assert len(plan.points) == 8 and len(plan.cells) == 3 * 7  # the base model is not trained
