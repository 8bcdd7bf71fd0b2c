"""Checks of numbers that bounds and accountants share: one clear error for anything outside their domain."""

import contextlib
import math
import numbers

from dpaudit.errors import rejected

# Above this the tails of the binomial lose digits that the bounds rely on; no game comes near it.
MAX_COUNT = 10**9


def count(field: str, value: object, *, least: int = 0, most: int = MAX_COUNT) -> int:
    """`value` as an int in [least, most]; raises UsageError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        raise rejected(field, value, f"a whole number from {least} to {most}")
    return int(value)


def real(
    field: str, value: object, *, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> float:
    """`value` as a float in the interval; raises UsageError that names `field`. NaN is never accepted."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float holds
            number = float(value)
    inside = (low < number if open_low else low <= number) and (number < high if open_high else number <= high)
    if not inside:
        ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise rejected(field, value, f"a number in {ends}")
    return number


def confidence(value: object) -> float:
    """A confidence in (0, 1)."""
    return real("confidence", value, low=0.0, high=1.0, open_low=True, open_high=True)


def delta(value: object) -> float:
    """A delta in [0, 1)."""
    return real("delta", value, low=0.0, high=1.0, open_high=True)


def epsilon(value: object) -> float:
    """An eps in [0, inf]."""
    return real("epsilon", value, low=0.0, high=math.inf)


def one_run(canaries: object, guesses: object, correct: object) -> tuple[int, int, int]:
    """Counts of a one-run game: canaries >= 1, guesses <= canaries, correct <= guesses."""
    m = count("canaries", canaries, least=1)
    r = count("guesses", guesses, most=m)
    return m, r, count("correct", correct, most=r)
