"""Errors that a user can cause. Each is one clear line and carries the exit code of the command-line contract.

Anything else that escapes is a defect of dpaudit and may show a traceback.
"""

from collections.abc import Iterable


class DpauditError(Exception):
    """Base of every expected failure; `str(error)` is the one line that the user reads."""

    exit_code = 2


class UsageError(DpauditError):
    """Wrong flag, configuration value or input file."""


class InvalidGame(DpauditError):
    """The game itself is unsound (edited coins, foreign scores, overlapping members): no number may be printed."""

    exit_code = 3


class EnvironmentFailure(DpauditError):
    """The machine lacks something: a package, a device, disk space, permissions."""

    exit_code = 4


def of_code(code: int, line: str) -> DpauditError:
    """The error that ends a command with that exit code; what has none of its own is a UsageError."""
    kinds: tuple[type[DpauditError], ...] = (InvalidGame, EnvironmentFailure)
    return next((kind for kind in kinds if kind.exit_code == code), UsageError)(line)


def rejected(field: str, value: object, accepted: str | Iterable[str]) -> UsageError:
    """The standard message for a bad value: names the field, the value and what is accepted.

    The value is shortened so that a long or hostile input can't flood a terminal.
    """
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    wanted = accepted if isinstance(accepted, str) else "one of " + ", ".join(accepted)
    return UsageError(f"{field}: got {shown}; accepted: {wanted}")
