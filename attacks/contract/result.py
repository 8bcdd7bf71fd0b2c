"""The shape of one check: what was measured, what is allowed, what bug this usually is."""

from collections.abc import Callable
from typing import Literal

from attacks.contract.bench import FROZEN, Bench
from dpaudit.documents import Check

Status = Literal["pass", "fail", "not applicable"]


def judged(name: str, passed: bool, measured: str, allowed: str, explanation: str) -> Check:
    """A check that was made."""
    status: Status = "pass" if passed else "fail"
    return Check(name=name, status=status, measured=measured, allowed=allowed, explanation=explanation)


def skipped(name: str, why: str, explanation: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name=name, status="not applicable", measured=why, allowed="", explanation=explanation)


def joined(items: object, limit: int = 4) -> str:
    """A few names for a line."""
    names = sorted(str(item) for item in items)  # type: ignore[attr-defined]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def ratio(part: float, whole: float) -> str:
    """part / whole for a line."""
    return f"{part / whole:.2g}" if whole > 0 else ("0" if part == 0 else "inf")


def frozen(name: str, why: str) -> Callable[[Callable[[Bench], Check]], Callable[[Bench], Check]]:
    """A check under frozen noise: not applicable where equal seeds don't repeat."""

    def wrap(function: Callable[[Bench], Check]) -> Callable[[Bench], Check]:
        def run(bench: Bench) -> Check:
            return function(bench) if bench.probe.deterministic else skipped(name, FROZEN, why)

        return run

    return wrap
