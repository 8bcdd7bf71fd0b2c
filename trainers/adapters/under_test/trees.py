"""Nested containers of arrays, whatever library they are from: names, torch tensors and back.

A tree is a dict, list, tuple, named tuple or dataclass of trees; anything else is a leaf. Leaves are arrays of torch,
numpy or jax, which is never imported here: where it is in use, it is there already.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpaudit.errors import UsageError

Path = tuple[str, ...]


def items(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) in a fixed order."""
    children = _children(tree)
    if children is None:
        if tree is not None:
            yield path, tree
        return
    for key, value in children.items():
        yield from items(value, (*path, key))


def replace(tree: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same containers with `function(path, leaf)` in place of every leaf."""
    children = _children(tree)
    if children is None:
        return None if tree is None else function(path, tree)
    made = {key: replace(value, function, (*path, key)) for key, value in children.items()}
    return _rebuilt(tree, made)


def is_array(value: Any) -> bool:
    """A tensor, or what numpy takes for an array of numbers (no key of jax's random generators)."""
    return isinstance(value, Tensor | np.ndarray | np.floating) or (_is_jax(value) and not is_key(value))


def is_floating(value: Any) -> bool:
    """An array of real numbers."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return is_array(value) and np.issubdtype(
        np.dtype(np.float32) if "bfloat16" in str(value.dtype) else value.dtype, np.floating
    )


def is_key(value: Any) -> bool:
    """A typed key of jax."""
    if not _is_jax(value):
        return False
    jax = sys.modules["jax"]
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def to_torch(value: Any) -> Tensor:
    """A copy on the CPU; numbers that torch does not know become float32."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu").clone()
    found = np.asarray(value)
    if "bfloat16" in str(found.dtype):
        found = found.astype(np.float32)
    return torch.from_numpy(np.array(found))


def like(value: Any, tensor: Tensor) -> Any:
    """`tensor` as an array of the kind, type and shape of `value`."""
    if isinstance(value, Tensor):
        return tensor.to(value).reshape(value.shape)
    array = tensor.detach().to("cpu").numpy().reshape(np.shape(value))
    if _is_jax(value):
        return sys.modules["jax"].numpy.asarray(array, dtype=value.dtype)
    return array.astype(value.dtype)


def tensors(tree: Any) -> dict[str, Tensor]:
    """Floating leaves by dotted path."""
    return {name_of(path): to_torch(leaf) for path, leaf in items(tree) if is_floating(leaf)}


def name_of(path: Path) -> str:
    """Dotted; of a bare array "value"."""
    return ".".join(path) or "value"


def _children(tree: Any) -> Mapping[str, Any] | None:
    if isinstance(tree, Mapping):
        # An optimizer's state is keyed by parameters: no names.
        return (
            {str(key): value for key, value in tree.items()} if all(type(key) in (str, int) for key in tree) else None
        )
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return dict(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return {str(place): value for place, value in enumerate(tree)}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def _rebuilt(tree: Any, made: Mapping[str, Any]) -> Any:
    if isinstance(tree, Mapping):
        keys = {str(key): key for key in tree}
        pairs = {keys[name]: value for name, value in made.items()}
        make: Any = type(tree)
        return make(pairs)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(**made)
    if isinstance(tree, list | tuple):
        return type(tree)(made.values())
    return dataclasses.replace(tree, **made)


def _is_jax(value: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def stacked(rows: list[Any], below: Any) -> Any:
    """Leaves of `below` with the leaves of `rows` (trees of torch tensors by name) appended along their first axis."""
    names = {name_of(path) for path, leaf in items(below) if is_floating(leaf)}
    missing = {name for row in rows for name in row} - names
    if missing:
        raise UsageError(
            f"per_record_gradients: no {sorted(missing)[0]!r} in the gradients; accepted: the parameters' tree"
        )

    def extended(path: Path, leaf: Any) -> Any:
        name = name_of(path)
        if not is_floating(leaf):
            return leaf
        added = torch.stack([row[name] for row in rows])
        if isinstance(leaf, Tensor):
            return torch.cat([leaf, added.to(leaf)])
        whole = np.concatenate([np.asarray(leaf), added.to("cpu").numpy().astype(np.asarray(leaf).dtype)])
        return sys.modules["jax"].numpy.asarray(whole) if _is_jax(leaf) else whole

    return replace(below, extended)
