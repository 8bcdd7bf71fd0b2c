"""Who is in the batch of a step: Poisson, a subset of fixed size, or epochs over a shuffled list.

Every batch is a function of (key, step) alone. Fixed-size and shuffled batches are drawn over `places`, a public
number: the units that are there take the first places, the others stay empty. So a unit that is absent leaves its place
empty instead of moving anybody else, which is what the accounting of both schemes (dpaudit.accounting.schemes) rests
on, and the number of canaries whose coin fell heads doesn't show in anybody's batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit.accounting import Scheme
from dpaudit.randomness import Key

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampler:
    """scheme; places: n + m, declared units and canary candidates; size: the (expected) batch."""

    scheme: Scheme
    places: int
    size: int

    @property
    def batches(self) -> int:
        """Batches of an epoch of the shuffled scheme; the last one may be smaller."""
        return math.ceil(self.places / self.size)

    @property
    def rate(self) -> float:
        """Each unit's chance to be in a batch; for shuffled epochs 1 / batches (exactly one of them)."""
        return 1.0 / self.batches if self.scheme == "shuffle" else self.size / self.places

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, at least one."""
        return max(1, round(epochs / self.rate))

    def batch(self, key: Key, *, step: int, units: int) -> Indices:
        """(k,) ascending indices below `units` of the batch of `step` (from 1 on); may be empty.

        units: how many are there; at most `places` unless Poisson, where a declared size may be any.
        """
        if self.scheme == "poisson":
            return poisson_batch(key, step=step, units=units, rate=self.rate)
        if units > self.places:
            raise ValueError(f"{units} units don't fit into {self.places} places")
        if self.scheme == "fixed":
            chosen = _order(key, self.places, step=step, purpose="fixed")[: self.size]
        else:
            epoch, turn = divmod(step - 1, self.batches)
            order = _order(key, self.places, step=epoch, purpose="shuffle")
            chosen = order[turn * self.size : (turn + 1) * self.size]
        return np.sort(chosen[chosen < units])

    def describe(self) -> str:
        """The scheme in words, for ledger and claim."""
        if self.scheme == "poisson":
            return f"Poisson batches, q = {self.rate:.4g}"
        if self.scheme == "fixed":
            return f"uniform batches of {self.size} of {self.places} places without replacement"
        return f"shuffled epochs of {self.batches} batches over {self.places} places, accounted without amplification"


def poisson_batch(key: Key, *, step: int, units: int, rate: float) -> Indices:
    """Indices of the units in the batch of `step`: each joins independently with probability `rate`."""
    return np.flatnonzero(key.uniform(units, step=step, name="units", purpose="poisson") < rate)


def _order(key: Key, places: int, *, step: int, purpose: str) -> Indices:
    """A uniformly random order of the places: that of independent uniforms (equal ones have chance n^2 / 2^54)."""
    return np.argsort(key.uniform(places, step=step, name="places", purpose=purpose), kind="stable")
