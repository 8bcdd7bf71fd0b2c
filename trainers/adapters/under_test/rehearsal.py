"""Which generators the steps of one factory seed with public numbers: found out once, on trainers that are thrown away.

What a generator is seeded with inside a step is public if it is the same under another noise seed: a literal, the seed
of the training, the number of the step or of a record. So a few steps are made under two noise seeds, and what draws
at one place of the code with the same seeds in both is left alone by `FrozenNoise`, from the first step on. Where no
generator is seeded inside of steps, the second rehearsal is not made.
"""

import math
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainers.adapters.under_test.frozen import Met, Public

if TYPE_CHECKING:
    from trainers.adapters.under_test.base import UnderTest

BATCHES: tuple[list[int], ...] = ([0, 1], [0, 1], [])  # an empty batch may take a path of its own
LEAST = 2  # steps; one alone does not show which generators are kept
FIRST, SECOND = 1 / 2, 1 / 3  # of the time left under a time limit that the rehearsals may take


class Rehearsal:
    """Of one factory. build(seed, noise_seed) makes a trainer on the owner's records."""

    def __init__(self, build: "Callable[[int, int], UnderTest]") -> None:
        self.public = Public()
        self._build, self._over = build, False

    def make(self, seed: int, seconds: float) -> None:
        """Before a trainer with a noise seed makes its first step; does nothing later, nor where a construction takes
        so long that a time limit would be met. `seconds`: one takes at most this; the first one also imports."""
        if self._over:
            return
        self._over = True
        if seconds > FIRST * _time_left():
            return
        began = time.monotonic()
        one = self._made(seed, 0, FIRST * _time_left())
        if one is None or not one[0].fresh() or time.monotonic() - began > SECOND * _time_left():
            return
        two = self._made(seed, 1, SECOND * _time_left())
        if two is not None and one[1] == two[1]:
            self.public.sites, self.public.numbers = one[0].public(two[0])

    def _made(self, seed: int, noise_seed: int, seconds: float) -> tuple[Met, int] | None:
        """(what was met, in how many steps); None in too few."""
        met, steps, until, trainer = Met(), 0, time.monotonic() + seconds, None
        try:
            trainer = self._build(seed, noise_seed)
            trainer.note(met)
            for batch in BATCHES:
                trainer.step(batch)
                steps += 1
                if time.monotonic() > until:
                    break
        # Whatever foreign code raises here it raises again where somebody asks for a step.
        except Exception:
            pass
        finally:
            if trainer is not None:
                trainer.close()
        return (met, steps) if steps >= LEAST else None


def _time_left() -> float:
    """Seconds until an alarm that somebody has set; it may be the time limit of a call of the factory."""
    return signal.getitimer(signal.ITIMER_REAL)[0] or math.inf if hasattr(signal, "getitimer") else math.inf
