"""Where a loop of functions lets us look: a function of the owner's, wrapped while one step runs.

`(owner, "name")` is a module (or object) and the name by which the loop looks the function up in it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test import trees

Seam = tuple[Any, str]
_ABSENT = object()


def checked(argument: str, seam: Any) -> Seam:
    """Raises UsageError for what is no (owner, "name") of a function."""
    if not (isinstance(seam, tuple) and len(seam) == 2 and isinstance(seam[1], str)):
        raise rejected(argument, type(seam).__name__, '(module, "name of a function in it")')
    if not callable(getattr(seam[0], seam[1], None)):
        raise rejected(argument, seam[1], f"a function of {getattr(seam[0], '__name__', type(seam[0]).__name__)}")
    return seam


class Traced(Exception):
    """jax called the function while it traced another one: there are no values in it to be seen."""


def _traced(tree: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(leaf, jax.core.Tracer) for _, leaf in trees.items(tree))


class Returned:
    """Remembers what the function returned last; `called` says how often."""

    def __init__(self, argument: str, seam: Seam) -> None:
        self.argument, self.seam = argument, seam
        self.value: Any = None
        self.called = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap it for one step."""
        self.value, self.called = None, 0

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                self.called += 1
                with _compiled():
                    self.value = function(*arguments, **options)
                if _traced(self.value):
                    raise Traced
                return self.value

            return run

        with _wrapped(self.seam, wrap):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Of the last call. Raises UsageError when there was not exactly one."""
        _once(self.argument, self.seam, self.called)
        return trees.tensors(self.value)


class Rows:
    """Reads the per-record gradients that the function is given first, and appends canaries to them."""

    def __init__(self, argument: str, seam: Seam) -> None:
        self.argument, self.seam = argument, seam
        self.called = 0
        self.rows = -1  # of the last call, before canaries
        self.first: dict[str, Tensor] | None = None

    @contextlib.contextmanager
    def watching(self, canaries: list[Mapping[str, Tensor]]) -> Iterator[None]:
        """Wrap it for one step."""
        self.called, self.rows, self.first = 0, -1, None

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(each: Any, *arguments: Any, **options: Any) -> Any:
                self.called += 1
                if _traced(each):
                    raise Traced
                seen = trees.tensors(each)
                self.rows = min((len(value) for value in seen.values() if value.ndim), default=0)
                if self.rows and all(value.ndim for value in seen.values()):
                    self.first = {name: value[0] for name, value in seen.items()}
                given = trees.stacked(list(canaries), each) if canaries else each
                with _compiled():
                    return function(given, *arguments, **options)

            return run

        with _wrapped(self.seam, wrap):
            yield

    def check(self) -> None:
        """Raises UsageError when there was not exactly one call."""
        _once(self.argument, self.seam, self.called)


def _once(argument: str, seam: Seam, called: int) -> None:
    if called != 1:
        how = "looked up by another name or module" if called == 0 else "called once a step with all records"
        wanted = f"a function that is called once a step ({how}?)"
        raise UsageError(f"{argument}: {seam[1]} was called {called} times in a step; accepted: {wanted}")


@contextlib.contextmanager
def _wrapped(seam: Seam, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    owner, name = seam
    # As it lies there (a classmethod, say), and not as it is looked up; an inherited one is not put into the heir.
    raw = vars(owner).get(name, _ABSENT)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if raw is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, raw)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """jax traces functions and forgets their values; inside, it runs them (slowly)."""
    jax = sys.modules.get("jax")
    with jax.disable_jit() if jax is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Inside `eager`: the function that is looked at may be compiled, it is seen from outside."""
    jax = sys.modules.get("jax")
    with jax.disable_jit(False) if jax is not None else contextlib.nullcontext():
        yield
