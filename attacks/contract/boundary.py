"""Units whose gradient is just longer than C.

Few records have a gradient between C and 1.1 C, so a clipping with a tolerance, a hysteresis or a wrong comparison
hardly ever shows on them. Scaling all parameters by s moves the gradient norm of a unit continuously through C: the
smallest s at which the unit is clipped is found by bisection, and units just beyond it are looked at.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from attacks.contract.bench import Bench, finite

UNITS = 2
COARSE = tuple(2.0**power for power in range(-6, 7))
BISECTIONS = 10
BEYOND = (1.002, 1.005, 1.01, 1.02, 1.04, 1.08, 1.15, 1.3)  # times the smallest s that clips
UNCLIPPED, CLIPPED = 0.95, 0.999  # moves in units of C


def moves(bench: Bench) -> Iterator[tuple[float, str]]:
    """(move in units of C, what) around the point where a unit begins to be clipped.

    Nothing where parameters can't be set, where an empty batch does not show the noise, or where building is slow.
    """
    probe = bench.probe
    if bench.empty_problem is not None or (probe.slow and not probe.copyable):
        return
    for unit in bench.picks.group[:UNITS]:
        yield from _around(bench, unit)


def _around(bench: Bench, unit: int) -> Iterator[tuple[float, str]]:
    def at(scale: float) -> float | None:
        """The move of `unit` alone in the first step, all parameters times `scale`; None where it can't be told."""
        subject = bench.probe.build()
        if not subject.put({name: scale * value for name, value in bench.probe.start.items()}):
            return None
        seen = bench.probe.watch(subject, [unit])
        if not (finite(seen) and bench.training.comparable(1, seen)):
            return None
        moved = bench.probe.size(bench.training.signal(1, seen)) - bench.training.slack(1, seen)
        return moved / bench.probe.claim.max_grad_norm

    coarse = [(scale, found) for scale in COARSE if (found := at(scale)) is not None]
    crossing = next(
        ((low, high) for (low, one), (high, two) in pairwise(coarse) if one < UNCLIPPED <= two),
        None,
    )
    tried = list(coarse)
    if crossing is not None:
        low, high = crossing
        for _ in range(BISECTIONS):
            middle = float(np.sqrt(low * high))
            found = at(middle)
            if found is None:
                break
            tried.append((middle, found))
            low, high = (middle, high) if found < CLIPPED else (low, middle)
        tried += [(high * more, found) for more in BEYOND if (found := at(high * more)) is not None]
    for scale, found in tried:
        yield found, f"unit {unit} alone, all parameters times {scale:.4g}"
