"""What a hand-written loop carries from step to step: where its parameters are, and which generators it draws from."""

import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test import trees
from trainers.adapters.under_test.base import trained
from trainers.adapters.under_test.frozen import seed_of

NAMES = ("params", "parameters", "weights", "model", "theta")
_CLOSED = (nn.Module, Tensor, torch.optim.Optimizer, type)
Selector = str | Callable[[Any], Any] | None


def objects(state: Any) -> Iterator[tuple[trees.Path, Any]]:
    """Leaves of the state; of an object of a class of one's own its attributes too."""
    for path, leaf in trees.items(state):
        yield path, leaf
        if hasattr(leaf, "__dict__") and not isinstance(leaf, _CLOSED) and not callable(leaf):
            for name, value in vars(leaf).items():
                yield from ((((*path, name, *below)), item) for below, item in trees.items(value))


def modules(state: Any) -> dict[str, Tensor]:
    """Trained tensors of the torch modules in the state; with several modules their names go first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, leaf in objects(state):
        if isinstance(leaf, nn.Module):
            found.setdefault(id(leaf), (trees.name_of(path), leaf))
    if len(found) == 1:
        return trained(next(iter(found.values()))[1])
    return {f"{place}.{name}": value for place, module in found.values() for name, value in trained(module).items()}


class Where:
    """The parameters of a state: the tensors of its modules, or a part of it as a tree of arrays."""

    def __init__(self, state: Any, selector: Selector) -> None:
        self.selector = selector
        self.of_modules = selector is None and bool(modules(state))
        self.prefix: trees.Path | None = None
        if not self.of_modules and not callable(selector):
            self.prefix = _prefix(state, selector)

    def get(self, state: Any) -> dict[str, Tensor]:
        """Live tensors of modules, copies of arrays."""
        if self.of_modules:
            return modules(state)
        if callable(self.selector):
            return trees.tensors(self.selector(state))
        assert self.prefix is not None
        depth = len(self.prefix)
        return {
            trees.name_of(path[depth:]): trees.to_torch(leaf)
            for path, leaf in trees.items(state)
            if path[:depth] == self.prefix and trees.is_floating(leaf)
        }

    def put(self, state: Any, values: Mapping[str, Tensor]) -> Any:
        """The state with these parameters and everything else as it was."""
        if self.of_modules:
            live = modules(state)
            with torch.no_grad():
                for name, value in values.items():
                    live[name].copy_(value)
            return state
        if self.prefix is None:
            raise rejected("parameters", "a function", "a dotted path into the state, where parameters are to be set")
        depth = len(self.prefix)

        def put(path: trees.Path, leaf: Any) -> Any:
            name = trees.name_of(path[depth:])
            inside = path[:depth] == self.prefix and trees.is_floating(leaf) and name in values
            return trees.like(leaf, values[name]) if inside else leaf

        return trees.replace(state, put)


def _prefix(state: Any, selector: str | None) -> trees.Path:
    paths = [path for path, leaf in trees.items(state) if trees.is_floating(leaf)]
    if not paths:
        raise UsageError(
            "init: the state holds no floating array and no torch module; accepted: parameters=(a path into it)"
        )
    if selector is not None:
        prefix = tuple(selector.split("."))
        if not any(path[: len(prefix)] == prefix for path in paths):
            offered = ", ".join(sorted({path[0] for path in paths if path})[:8])
            raise rejected("parameters", selector, f"a dotted path to arrays of the state, which has {offered}")
        return prefix
    tops = {path[0] for path in paths if path}
    named = next((name for name in NAMES if name in tops), None)
    if named is not None:
        return (named,)
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return (min(tops, key=int),)
    return ()


def renew(state: Any, noise_seed: int | None, other: Any = None) -> Any:
    """Every generator and key of jax in the state seeded anew: from the noise seed, or secretly.

    other: the state that `init` makes of another seed. What is the same in both was seeded by a constant: its numbers
    are no secret, and a check of the production mode must be able to see that, so it is left as it is.
    """
    salt = secrets.token_hex(16) if noise_seed is None else str(noise_seed)
    same = {path: _drawn(leaf) for path, leaf in objects(other)} if other is not None else {}
    keys = dict(trees.items(other)) if other is not None else {}
    for path, leaf in objects(state):
        if path in same and same[path] == _drawn(leaf):
            continue
        seed = seed_of("generator", salt, trees.name_of(path))
        if isinstance(leaf, np.random.Generator):
            leaf.bit_generator.state = type(leaf.bit_generator)(seed).state
        elif isinstance(leaf, np.random.RandomState):
            leaf.seed(seed % 2**32)
        elif isinstance(leaf, torch.Generator):
            leaf.manual_seed(seed)

    def fresh(path: trees.Path, leaf: Any) -> Any:
        if path in keys and (trees.is_key(leaf) or _raw_key(path, leaf)) and _equal_keys(leaf, keys[path]):
            return leaf
        seed = seed_of("key", salt, trees.name_of(path)) % 2**31
        if trees.is_key(leaf):
            random = sys.modules["jax"].random
            key = random.key(seed, impl=random.key_impl(leaf))
            return key if leaf.ndim == 0 else random.split(key, leaf.shape)
        if _raw_key(path, leaf):
            key = sys.modules["jax"].random.PRNGKey(seed)
            return key if key.shape == leaf.shape else leaf
        return leaf

    return trees.replace(state, fresh) if "jax" in sys.modules else state


def _drawn(leaf: Any) -> bytes | None:
    """What a generator would draw next, as bytes; None for anything else. The generator is not moved."""
    if isinstance(leaf, np.random.Generator):
        return repr(leaf.bit_generator.state).encode()
    if isinstance(leaf, np.random.RandomState):
        state: Any = leaf.get_state(legacy=False)
        return repr(state).encode() + bytes(state["state"]["key"].tobytes())
    return bytes(leaf.get_state().numpy().tobytes()) if isinstance(leaf, torch.Generator) else None


def _equal_keys(one: Any, two: Any) -> bool:
    if trees.is_key(one) != trees.is_key(two):
        return False
    if trees.is_key(one):
        data = sys.modules["jax"].random.key_data
        one, two = data(one), data(two)
    return bool(np.array_equal(np.asarray(one), np.asarray(two)))


def _raw_key(path: trees.Path, leaf: Any) -> bool:
    named = bool(path) and any(part in path[-1].lower() for part in ("key", "rng", "prng"))
    return named and not isinstance(leaf, Tensor) and str(getattr(leaf, "dtype", "")) == "uint32"
