"""From p-values to e-values, for tests that have no likelihood.

A decreasing function f with integral 1 over [0, 1] turns a p-value into an e-value (Vovk and Wang 2021, Ann. Statist.
49, prop. 2.1). Half of the weight stands on one level, so that a single clear test refutes by itself; half on the
mixture of all f(p) = k p^(k-1), so that many small ones add up.
"""

import math


def e_value(p: float, *, wanted: float) -> float:
    """e-value of a p-value; at least `wanted` (1 / (alpha share)) when p <= 1 / (2 wanted)."""
    clear = wanted if p <= level(wanted=wanted) else 0.0
    return clear + 0.5 * _mixture(p)


def level(*, wanted: float) -> float:
    """The p-value from which on `e_value` surely reaches `wanted`."""
    return 1 / (2 * wanted)


def _mixture(p: float) -> float:
    """Integral of k p^(k-1) over k in [0, 1]: (1 - p + p log p) / (p log(p)^2); 1/2 at p = 1."""
    if p <= 0.0:
        return math.inf
    log = math.log(p)
    if log > -1e-4:  # the series avoids 0 / 0
        return 0.5 - log / 6
    return (1 - p + p * log) / (p * log * log)
