"""A grid as YAML, and the cells that it stands for.

    name: my-sweep                        # optional
    settings: {training.epochs: 10}       # of every cell; nested or dotted
    grid: {privacy.epsilon: [1, 3, 8]}    # every combination
    configurations:                       # times these, where given
      - {name: dp-sgd, settings: {method: dp-sgd}}
      - {name: dual-priv, settings: {method: dual-priv}, against: dp-sgd}
      - {name: non-private, settings: {method: non-private}, grid: {}}      # a grid of its own: here none
      - {name: base, train: false}        # the base model as it is
    seeds: [0, 1, 2]
    audits: [canaries]                    # optional, as in `dpaudit audit --canaries`

A configuration is compared with the one it is `against`: the same point of the grid where there is one, else the plain
name. Every cell is resolved to a whole run configuration before anything runs, so a bad value stops the sweep at once.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpaudit.config import RunConfig, parse_override, read_yaml, resolve
from dpaudit.errors import UsageError, rejected

PRESETS = Path(__file__).parent / "presets"
BASE = "base model"  # what a configuration without training is called in documents
MOST_CELLS = 10_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(_Section):
    """One line of the sweep's table, before the grid multiplies it."""

    name: str = Field(min_length=1, max_length=80)
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] | None = None
    against: str | None = None
    train: bool = True


class Grid(_Section):
    """A sweep as its author wrote it."""

    name: str | None = Field(default=None, max_length=200)
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    configurations: list[Configuration] = []
    seeds: list[int] = Field(default=[0], min_length=1)
    audits: list[str] = []


@dataclass(frozen=True)
class Point:
    """One configuration at one point of the grid: a line of the table, trained once a seed.

    swept: the values that tell it from the others, by field. series: its name without them.
    """

    name: str
    series: str
    settings: Mapping[str, Any]
    swept: Mapping[str, Any]
    against: str | None
    trained: bool


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `folder` is its name under runs/: a readable part, the seed, and the configuration's hash."""

    point: Point
    seed: int
    config: RunConfig
    folder: str


@dataclass(frozen=True)
class Plan:
    """All of a sweep, resolved: points in the order of the table, cells with all points of a seed before the next."""

    name: str
    points: tuple[Point, ...]
    cells: tuple[Cell, ...]
    audits: tuple[str, ...]


def presets() -> tuple[str, ...]:
    """Names of the grids that come with dpaudit."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def preset(name: str) -> Path:
    """The file of a preset; UsageError that lists them for any other name."""
    if name not in presets():
        raise rejected("--preset", name, presets())
    return PRESETS / f"{name}.yaml"


def read_grid(path: Path) -> Grid:
    """Read a grid; UsageError with one line that names file and field."""
    try:
        tree = _plain(read_yaml(path))
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--config ")) from error
    grid = as_grid(tree, path)
    return grid if grid.name else grid.model_copy(update={"name": path.stem})


def as_grid(tree: Any, path: Path) -> Grid:
    """A grid out of what `path` holds; UsageError with one line that names file and field."""
    try:
        return Grid.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "grid"
        shown = repr(first.get("input"))[:80]
        raise UsageError(f"{path}: {where}: got {shown}; {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _plain(value: Any) -> Any:
    """YAML's dates and other scalars that no setting takes are told by `resolve`; here only keys must be text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def make_plan(grid: Grid, *, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Plan:
    """Points and cells of `grid`; `overrides` (key.sub=value) apply to every cell, after the grid's own settings.

    Raises UsageError: an unknown field, an override of a swept field, two points of one name, `against` nobody.
    """
    chosen = list(grid.seeds if seeds is None else seeds)
    if len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0:
        raise rejected("--seeds", chosen, "different whole numbers of at least 0")
    cells_asked = sum(_size(configuration, grid) for configuration in _configurations(grid)) * len(chosen)
    if cells_asked > MOST_CELLS:  # before any of them is made
        raise rejected("grid", f"{cells_asked} cells", f"at most {MOST_CELLS}")
    points = [point for configuration in _configurations(grid) for point in _points(configuration, grid)]
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"configurations: two are called {twice!r}; accepted: different names")
    if any("seed" in point.settings for point in points):
        raise UsageError("settings.seed: a sweep sets the seed of each cell; accepted: seeds: [0, 1, 2]")
    for text in overrides:
        _check_override(text, points)
    points = [_with_opponent(point, names) for point in points]
    cells = [_cell(point, seed, overrides) for seed in chosen for point in points if point.trained]
    return Plan(str(grid.name or "sweep"), tuple(points), tuple(cells), tuple(grid.audits))


def _configurations(grid: Grid) -> list[Configuration]:
    """What the author listed; a grid without configurations is one without a name: its values are name enough."""
    plain = Configuration.model_construct(name="", settings={}, grid=None, against=None, train=True)
    return list(grid.configurations) or [plain]


def _size(configuration: Configuration, grid: Grid) -> int:
    """How many points `_points` makes, as far as the grid is sound."""
    axes = _flat(grid.grid if configuration.grid is None else configuration.grid)
    return math.prod(len(values) for values in axes.values() if isinstance(values, list))


def _points(configuration: Configuration, grid: Grid) -> list[Point]:
    axes = _flat(grid.grid if configuration.grid is None else configuration.grid)
    if not configuration.train:
        if configuration.settings or configuration.grid:
            raise UsageError(f"configurations: {configuration.name!r} is not trained; accepted: no settings, no grid")
        return [Point(configuration.name, configuration.name, {}, {}, None, False)]
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise rejected(f"grid.{key}", values, "a list of values")
    found = []
    for values in itertools.product(*axes.values()):
        swept = dict(zip(axes, values, strict=True))
        parts = [f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in swept.items()]
        name = ", ".join(([configuration.name] if configuration.name else []) + parts) or "run"
        settings = {**_flat(grid.settings), **_flat(configuration.settings), **swept}
        found.append(Point(name, configuration.name or "run", settings, swept, configuration.against, True))
    return found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested or dotted settings as dotted ones, with dashes: {'privacy': {'epsilon': 1}} -> {'privacy.epsilon': 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        found.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return found


def _with_opponent(point: Point, names: Sequence[str]) -> Point:
    """`against` as the full name of a point: at the same place of the grid, else the plain name."""
    if point.against is None:
        return point
    place = ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in point.swept.items())
    for candidate in (f"{point.against}, {place}", point.against):
        if candidate in names and candidate != point.name:
            return replace(point, against=candidate)
    raise rejected(f"configurations: against of {point.name!r}", point.against, [n for n in names if n != point.name])


def _check_override(text: str, points: Sequence[Point]) -> None:
    """An override is for every cell, so it must not touch what tells the cells from each other."""
    for key in _flat(parse_override(text)):
        if key == "seed":
            raise UsageError("seed: a sweep sets the seed of each cell; accepted: --seeds 0,1,2")
        for own in sorted({own for point in points for own in point.settings}):
            related = own == key or own.startswith(f"{key}.") or key.startswith(f"{own}.")
            values = {repr(point.settings.get(own)) for point in points if point.trained}
            if related and len(values) > 1:
                raise UsageError(f"{key}: this grid gives it values of its own; edit the grid instead")


def _cell(point: Point, seed: int, overrides: Sequence[str]) -> Cell:
    tree: dict[str, Any] = {}
    for key, value in {**point.settings, "seed": seed}.items():
        at = tree
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    try:
        config = resolve(tree, overrides)
    except UsageError as error:
        raise UsageError(f"cell {point.name!r}: {error}") from error
    return Cell(
        point, seed, config, f"{slug(point.name.lower().replace('_', '-'), 'run')}-s{seed}-{config.sha256()[:8]}"
    )


def slug(name: str, default: str = "sweep") -> str:
    """A name as the name of one folder: Latin letters, digits, dots and dashes, none of the latter two first or last.

    A grid may come from somebody else: its name must not lead anywhere.
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:60] or default
