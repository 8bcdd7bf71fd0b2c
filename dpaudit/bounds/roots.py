"""Where an increasing function crosses a level: bisection that errs to the safe side.

Own code, because importing scipy.optimize costs more than a whole `dpaudit bound` may take.
"""

import math
from collections.abc import Callable


def largest_below(
    function: Callable[[float], float], level: float, *, start: float = 1.0, most: float = 1e4, tolerance: float = 1e-9
) -> float:
    """sup{x in [0, most]: function(x) <= level} for a non-decreasing function, rounded down.

    The bracket doubles from `start`; inside it bisection and the secant alternate (the secant alone can stall on a flat
    tail). The returned x satisfies function(x) <= level, so a bound is never rounded up. 0 if function(0) > level.
    """
    at_low = function(0.0) - level
    if at_low > 0:
        return 0.0
    low, high = 0.0, start
    while (at_high := function(high) - level) <= 0:
        if high >= most:
            return most
        low, at_low, high = high, at_high, min(2 * high, most)
    turn = 0
    while high - low > tolerance * max(1.0, low):
        middle = 0.5 * (low + high)
        if turn % 3 and math.isfinite(at_low) and math.isfinite(at_high):
            guess = low - at_low * (high - low) / (at_high - at_low)
            # Keep off the ends: a guess at an end would not shrink the bracket.
            edge = 0.25 * tolerance * max(1.0, low)
            middle = min(max(guess + (edge if turn % 3 == 1 else -edge), low + edge), high - edge)
        value = function(middle) - level
        if value <= 0:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
        turn += 1
    return low
