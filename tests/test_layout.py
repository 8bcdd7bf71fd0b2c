"""The house itself: one direction of imports, no circles, small modules, and one place that knows levels."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dpaudit", "trainers", "attacks", "reports")  # each may import those before it
DOORS = ("dpaudit.cli", "dpaudit.api", "dpaudit.pytest_plugin", "dpaudit.under_test", "dpaudit.__main__")
MOST_LINES = 400
TO_SPLIT = {  # larger for now
    "dpaudit.analysis.scores", "trainers.vlm", "trainers.prompts",
    "trainers.data.formats",
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that an import statement needs: what is taken from a package is a module of its own, or the package's."""
    if isinstance(node, ast.Import):
        yield from (item.name for item in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        for item in node.names:
            whole = f"{node.module}.{item.name}"
            yield whole if whole in modules() else node.module


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """All statements; without `lazy` those in functions are left out, with it those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        checker = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if checker or (function and not lazy):
            continue
        yield node
        yield from statements(node, lazy)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def graph(lazy: bool) -> dict[str, frozenset[str]]:
    """Which modules each module imports."""
    known = modules()
    return {
        name: frozenset(
            other
            for node in statements(tree_of(path), lazy)
            for other in imported(node)
            if other in known and other != name
        )
        for name, path in known.items()
    }


def circles(edges: dict[str, frozenset[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            part = stack[at:]
            del stack[at:]
            if len(part) > 1:
                found.append(sorted(part))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found() -> None:
    edges = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(edges) == [["a", "b", "c"]]


@pytest.mark.parametrize("lazy", [False, True])
def test_no_circle_of_imports(lazy: bool) -> None:
    """Neither at import time nor by an import inside a function."""
    assert circles(graph(lazy)) == []


def test_packages_import_in_one_direction() -> None:
    for name, others in graph(True).items():
        if name.startswith(DOORS) or name == "dpaudit":
            continue
        allowed = PACKAGES[: PACKAGES.index(name.split(".")[0]) + 1]
        assert [other for other in others if other.split(".")[0] not in allowed] == [], name


def test_modules_are_small() -> None:
    large = {name: lines for name, path in modules().items() if (lines := path.read_text().count("\n")) > MOST_LINES}
    assert large.keys() <= TO_SPLIT, large


def code(path: Path) -> str:
    """A module without its comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value = ast.Constant(value=None)
    return ast.unparse(tree)


# A comparison with a level: `p <= alpha`, `e >= 1 / alpha`, `log >= -math.log(alpha)`.
LEVEL = re.compile(r"(<=?|>=?)\s*(1(\.0)?\s*/\s*\(?|-?(math|np)\.log\()?\s*(\w+\.)*alpha\b|\balpha\)?\s*(<=?|>=?)")


def test_one_module_compares_with_the_level() -> None:
    """`alpha` of an audit; the step contract's own false-alarm level (attacks.contract.statistics) is another thing."""
    found = {
        name
        for name, path in modules().items()
        if not name.startswith("attacks.contract.")
        if LEVEL.search(path.read_text(encoding="utf-8")) and LEVEL.search(code(path))
    }
    assert found == {"dpaudit.verdict"}
