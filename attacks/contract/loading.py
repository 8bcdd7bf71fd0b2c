"""`module:factory` to a callable, without letting the user's folder shadow dpaudit's own packages.

Our four packages have common names. They are imported first; only then does the working directory go on `sys.path`, so
a folder with its own `trainers/` or `reports/` neither breaks dpaudit nor is imported by mistake.
"""

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.contract.guard import TIME_LIMIT, MethodFailure, call
from dpaudit import packages, untrusted
from dpaudit.documents import FactorySource
from dpaudit.errors import UsageError, rejected

MOST_SOURCE = 1 << 22  # bytes of a module


def load_factory(target: str, *, limit: float = TIME_LIMIT) -> Callable[..., Any]:
    """The callable that `module:factory` names; raises UsageError with one line that says what is wrong with it."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise rejected("factory", target, "module:factory, for example my_training:make_trainer")
    for name in packages.OWN:
        importlib.import_module(name)
    here = str(Path.cwd())
    sys.path[:] = [here, *(entry for entry in sys.path if entry not in ("", here))]
    importlib.invalidate_caches()
    module = _import(module_name, target, limit)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            offered = [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]
            raise rejected("factory", target, f"a callable of {module_name}: {', '.join(offered[:8]) or 'it has none'}")
        value = getattr(value, part)
    if not callable(value):
        raise rejected("factory", target, f"a callable; {attribute} is {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def _import(module_name: str, target: str, limit: float) -> Any:
    def load() -> Any:
        return call(f"import {module_name}", importlib.import_module, module_name, limit=limit)

    try:
        try:
            return load()
        except MethodFailure as failure:
            # Code that looks for `trainers.models` or the like in its own package, and found ours: both sets are kept.
            wanted = failure.__cause__.name if isinstance(failure.__cause__, ImportError) else None
            if wanted is None or wanted.partition(".")[0] not in packages.OWN:
                raise
            packages.keep_apart(Path.cwd())
            sys.modules.pop(module_name, None)
            return load()
    except MethodFailure as failure:
        cause = failure.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name is not None and module_name.startswith(cause.name):
            raise UsageError(
                f"factory: got {target!r}: no module of this name in {Path.cwd()} or the Python path"
            ) from None
        raise


def _named(target: str) -> tuple[Path, int] | None:
    """File and line in which a module binds the name behind the colon."""
    module, _, name = target.partition(":")
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or not path.endswith(".py"):
        return None
    try:
        body = ast.parse(untrusted.read_bytes(Path(path), MOST_SOURCE)).body
    except (OSError, SyntaxError, ValueError, UsageError):
        return None
    for node in reversed(body):
        bound = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        words = {part.id for item in bound if item is not None for part in ast.walk(item) if isinstance(part, ast.Name)}
        if name.partition(".")[0] in words:
            return Path(path).resolve(), node.lineno
    return Path(path).resolve(), 1


def source(target: str, factory: Callable[..., Any] | None) -> FactorySource:
    """Where the factory is defined; before it is loaded, the module's file in the working directory."""
    value: Any = factory
    while isinstance(value, functools.partial):
        value = value.func
    if value is None:
        module = target.partition(":")[0]
        guess = Path(*module.split(".")).with_suffix(".py") if module.replace(".", "").isidentifier() else Path()
        return FactorySource(name=target, file=guess.as_posix() if guess.is_file() else None)
    try:
        value = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
        file = Path(inspect.getsourcefile(value) or "").resolve()
        line = max(1, inspect.getsourcelines(value)[1])
    except (OSError, TypeError):
        return FactorySource(name=target)
    if file.is_relative_to(packages.ROOT / "trainers" / "adapters" / "under_test"):  # what counts is where it is named
        file, line = _named(target) or (file, line)
    here = Path.cwd().resolve()
    return FactorySource(
        name=target, file=(file.relative_to(here) if file.is_relative_to(here) else file).as_posix(), line=line
    )
