"""Our packages beside a repository's own of the same names.

`trainers`, `attacks` and `reports` are common names, and one process holds one module a name. Where the user's code has
packages of these names too, both sets are kept, and each is in place while its own code runs: ours inside `ours()`,
the user's inside `theirs()` (every call into foreign code: attacks.contract.guard). Where there are none, both do
nothing.

A folder without `__init__.py` is a package too, but Python takes one with `__init__.py` first wherever it stands, so an
installed dpaudit would hide it. `give_way` puts such a folder, where it stands before ours and holds Python files, in
its place.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import ClassVar

OWN = ("trainers", "attacks", "reports")
_LETTERS = {name[0] for name in OWN}
ROOT = Path(__file__).resolve().parents[1]


class _Shelf:
    """The set of modules that is not in place."""

    apart = False  # whether there are two sets
    now = "ours"
    modules: ClassVar[dict[str, ModuleType]] = {}
    root_first = False  # whether our folder was put first on sys.path by us


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Inside, our packages are imported by their names. For doors that users' code comes in by."""
    if not _Shelf.apart and _foreign(sys.path):
        _Shelf.apart, _Shelf.modules = True, {}
        _Shelf.now = "theirs"
        if any(_is_ours(sys.modules.get(name)) for name in OWN):  # ours came first; the user's are not imported yet
            _Shelf.now = "ours"
    with _in_place("ours"):
        yield


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    """Inside, the user's packages are. For calls into foreign code."""
    with _in_place("theirs"):
        yield


class _GiveWay:
    """Finds the user's folders without `__init__.py` of our names, as long as ours are not in place on purpose."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if path is not None or name not in OWN or (_Shelf.apart and _Shelf.now == "ours"):
            return None
        return _hidden(name, sys.path)


def give_way() -> None:
    """From now on, in code that is not ours, a folder of our names that lies before ours is what its import finds."""
    if not any(isinstance(finder, _GiveWay) for finder in sys.meta_path):
        sys.meta_path.insert(0, _GiveWay())


def keep_apart(folder: Path) -> None:
    """Called with ours imported: from now on a `trainers/` or the like in `folder` is the user's own."""
    give_way()
    if not _Shelf.apart and _foreign([str(folder)]):
        _Shelf.apart, _Shelf.now, _Shelf.modules = True, "ours", {}


@contextlib.contextmanager
def _in_place(which: str) -> Iterator[None]:
    if not _Shelf.apart or _Shelf.now == which:
        yield
        return
    _swap()
    try:
        yield
    finally:
        _swap()


def _swap() -> None:
    # At every call, over thousands of names: the first letter settles most of them.
    names = [name for name in sys.modules if name[:1] in _LETTERS and name.partition(".")[0] in OWN]
    taken = {name: sys.modules.pop(name) for name in names}
    sys.modules.update(_Shelf.modules)
    _Shelf.modules = taken
    _Shelf.now = "theirs" if _Shelf.now == "ours" else "ours"
    root = str(ROOT)
    if _Shelf.now == "ours":
        sys.path.insert(0, root)
    elif _Shelf.root_first:
        sys.path.remove(root)  # the first of its name is the one that we put there
    _Shelf.root_first = _Shelf.now == "ours"


def _foreign(path: list[str]) -> bool:
    """Whether somebody else's package of one of these names is imported, or would be."""
    for name in OWN:
        module = sys.modules.get(name)
        if module is not None and not _is_ours(module):
            return True
        if module is None or path is not sys.path:
            spec = PathFinder.find_spec(name, path)
            places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec is not None else []
            if places and not any(Path(place).resolve().is_relative_to(ROOT / name) for place in places):
                return True
            if _hidden(name, path) is not None:
                return True
    return False


def _hidden(name: str, path: list[str]) -> ModuleSpec | None:
    """A folder of Python files without `__init__.py` that stands before ours on the path."""
    before = list(itertools.takewhile(lambda entry: Path(entry or ".").resolve() != ROOT, path))
    spec = PathFinder.find_spec(name, before)
    if spec is None or spec.origin is not None or spec.submodule_search_locations is None:
        return None
    folders = [Path(place) for place in spec.submodule_search_locations]
    return spec if any(next(folder.rglob("*.py"), None) for folder in folders) else None


def _is_ours(module: ModuleType | None) -> bool:
    places = getattr(module, "__path__", None) or [getattr(module, "__file__", None) or ""]
    return module is not None and any(Path(place).resolve().is_relative_to(ROOT) for place in places)
