"""The shape of one check: what was measured, what is allowed, what bug this usually is."""

from typing import Literal

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
