"""Configurations as text: YAML files and `key.sub=value`, which may come from somebody else."""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dpaudit.config.sections import dashed
from dpaudit.errors import UsageError, rejected
from dpaudit.untrusted import MOST_CONFIGURATION, read_bytes

MOST_NODES = 20_000  # values of a configuration: a sweep over everything has some hundreds
DEEPEST = 50
LONGEST = 20_000  # characters of one value: YAML reads 1:0:0:… as a number to the base 60, in quadratic time


class _Loader(yaml.SafeLoader):
    """Plain YAML of a sensible size: no anchors (a few lines of them can expand to gigabytes, or never end), no key
    given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not accepted")
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise yaml.YAMLError(f"more than {MOST_NODES} values")
        if self._depth >= DEEPEST:
            raise yaml.YAMLError("nested too deeply")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST:
            raise yaml.YAMLError(f"a value of more than {LONGEST} characters")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = Counter(child.value for child, _ in node.value if isinstance(child, yaml.ScalarNode))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"{sorted(twice)[0]} is given twice")
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """The tree of a YAML text; YAMLError for everything that can't be one."""
    try:
        tree = yaml.load(text, _Loader)
        repr(tree)  # refuses integers of more than 4,300 digits, which no message could show
    except (ValueError, OverflowError) as error:  # dates and integers that YAML's own conversion refuses
        raise yaml.YAMLError(str(error)) from error
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """`key.sub=value` as a nested dict; the value is YAML (`null`, `true`, `[a, b]`, `0.5`, text)."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise rejected("override", text, "key.sub=value")
    try:
        tree: Any = _load_yaml(value) if value else None
    except yaml.YAMLError as error:
        raise rejected(short(key), value, f"a YAML value ({' '.join(str(error).split())[:120]})") from error
    if isinstance(tree, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-5 as text
            tree = float(tree)
    for part in reversed(key.split(".")):
        tree = {dashed(part): tree}
    assert isinstance(tree, dict)
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a tree; one clear line when it is missing or not a mapping."""
    try:
        tree = _load_yaml(read_bytes(path, MOST_CONFIGURATION).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split()):.300})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"--config {path}: must be a mapping of fields, got {type(tree).__name__}")
    return normalise(tree)


def normalise(tree: dict[str, Any]) -> dict[str, Any]:
    """Accept underscores for dashes in keys, so that `batch_size` and `batch-size` are one field."""
    return {dashed(str(key)): normalise(value) if isinstance(value, dict) else value for key, value in tree.items()}


def short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
