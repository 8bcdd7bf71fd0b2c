"""One check of the step contract, made as the whole contract makes it and without the modules that it does not need."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from attacks import contract
from attacks.contract.bench import NOTHING_STATED, Bench, Stated
from attacks.contract.probe import Probe
from dpaudit.documents import Check, CheckDocument


def module_of(check: str) -> ModuleType:
    """The module of the contract that makes a check."""
    made_by = {contract.independence: contract.noise}  # which has the draws that both look at
    named = [
        made_by.get(module, module)
        for module in (*contract.MODULES, contract.independence)
        if check in [value for key, value in vars(module).items() if f"{key}_WHY" in vars(module)]
    ]
    assert len(named) == 1
    return named[0]


def one(factory: Callable[..., Any], check: str, *, seed: int = 0, target: str | None = None) -> Check:
    """`check` of a factory; target: its name, by which other processes can build it."""
    made = module_of(check).checks(Bench(Probe(factory, seed=seed, target=target)))
    return next(found for found in made if found.name == check)


def made(
    factory: Callable[..., Any], module: Any, stated: Stated = NOTHING_STATED, target: str | None = None
) -> dict[str, Check]:
    """The checks of one module, by name."""
    return {check.name: check for check in module.checks(Bench(Probe(factory, target=target), stated))}


def all_but(factory: Callable[..., Any], *modules: ModuleType) -> dict[str, Check]:
    """Every check of a factory but those of `modules`, by name."""
    bench = Bench(Probe(factory))
    return {found.name: found for module in contract.MODULES if module not in modules for found in module.checks(bench)}


def by_name(document: CheckDocument) -> dict[str, Check]:
    """The checks of a document."""
    return {item.name: item for item in document.checks}
