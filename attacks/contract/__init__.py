"""The step contract: what one DP-SGD step must satisfy, tested without trusting its code.

    from attacks.contract import check
    assert check(factory).verdict == "pass"           # or, with the reasons in the message:
    assert_contract(factory)

Deterministic checks compare neighbours under frozen noise; statistical ones have a false-alarm rate of at most 1e-7
each (attacks.contract.statistics), so a correct trainer fails the whole contract with probability below 2e-6.
"""

from collections.abc import Callable
from typing import Any, Literal

from attacks.contract import accounting, history, influence, liveness, noise, production, sampling, units, updates
from attacks.contract.guard import TIME_LIMIT, MethodFailure
from attacks.contract.probe import Probe
from dpaudit.documents import Check, CheckDocument

__all__ = ["MethodFailure", "assert_contract", "check", "check_names", "run_checks"]

# In the order of a step.
MODULES = (units, influence, history, noise, production, updates, liveness, sampling, accounting)

# Without these a pass would say too little: the verdict is then "inconclusive".
CORE = (influence.INFLUENCE, influence.CLIPPING, noise.LEVEL, noise.OF_DATA)


def run_checks(probe: Probe) -> tuple[Check, ...]:
    """Every check, in the order of the step: influence, noise, update, sampling, accounting."""
    bench = influence.Bench(probe)
    found: list[Check] = []
    for module in MODULES:
        found.extend(module.checks(bench))
    return tuple(found)


def check(factory: Callable[..., Any], *, seed: int = 0, time_limit: float = TIME_LIMIT) -> CheckDocument:
    """Run the contract on `factory(records=None, *, seed, noise_seed=None)`.

    Raises MethodFailure (a UsageError: one line that names the method) when the trainer can't be asked at all.
    """
    checks = run_checks(Probe(factory, seed=seed, limit=time_limit))
    return CheckDocument(verdict=verdict(checks), checks=checks)


def verdict(checks: tuple[Check, ...]) -> Literal["pass", "fail", "inconclusive"]:
    """fail > inconclusive (a core check could not be made) > pass."""
    if any(item.status == "fail" for item in checks):
        return "fail"
    missing = [item for item in checks if item.name in CORE and item.status == "not applicable"]
    return "inconclusive" if missing else "pass"


def assert_contract(factory: Callable[..., Any], *, seed: int = 0) -> None:
    """For pytest: AssertionError with one line per failed check."""
    document = check(factory, seed=seed)
    failed = [item for item in document.checks if item.status == "fail"]
    lines = [f"{item.name}: measured {item.measured}; allowed {item.allowed}. {item.explanation}" for item in failed]
    assert not failed, "the step contract fails:\n" + "\n".join(lines)


def check_names() -> tuple[str, ...]:
    """All checks, in order."""
    names = []
    for module in MODULES:
        names += [value for key, value in vars(module).items() if key.isupper() and f"{key}_WHY" in vars(module)]
    return tuple(names)
