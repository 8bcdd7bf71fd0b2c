"""Who is in the batch of a step: Poisson, a subset of fixed size, epochs over a shuffled list, or random allocation.

Every batch is a function of (key, step) alone. Fixed-size and shuffled batches are drawn over `places`, a public
number: the units that are there take the first places, the others stay empty. So a unit that is absent leaves its place
empty instead of moving anybody else, which is what the accounting of both schemes (dpaudit.accounting.schemes) rests
on, and the number of canaries whose coin fell heads doesn't show in anybody's batch.

Under allocation every unit draws its `draws` steps of each epoch for itself, so nobody else's presence matters and no
places are kept: sizes of batches vary, nearly as Poisson's do. An epoch is drawn once and kept while it lasts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dpaudit.accounting import Scheme
from dpaudit.randomness import Key

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampler:
    """scheme; places: n + m, declared units and canary candidates; size: the (expected) batch.

    draws: k of allocation, the steps of an epoch that a unit is in.
    """

    scheme: Scheme
    places: int
    size: int
    draws: int = 1

    @property
    def batches(self) -> int:
        """Batches of an epoch of the shuffled scheme, of which the last may be smaller; t of allocation."""
        return math.ceil(self.draws * self.places / self.size)

    @property
    def rate(self) -> float:
        """Each unit's chance to be in a batch; for shuffled epochs 1 / batches (exactly one of them)."""
        return self.draws / self.batches if self.scheme in ("shuffle", "allocation") else self.size / self.places

    def steps(self, epochs: float) -> int:
        """Steps of so many passes over the units, at least one; under allocation of whole epochs, which cost alike."""
        if self.scheme == "allocation":
            return self.batches * max(1, math.ceil(round(epochs / self.draws, 9)))
        return max(1, round(epochs / self.rate))

    def batch(self, key: Key, *, step: int, units: int) -> Indices:
        """(k,) ascending indices below `units` of the batch of `step` (from 1 on); may be empty.

        units: how many are there; at most `places` but for Poisson and allocation, where a declared size may be any.
        """
        if self.scheme == "allocation":
            epoch, turn = divmod(step - 1, self.batches)
            return np.flatnonzero((allocated(key, epoch, units, self.batches, self.draws) == turn).any(axis=1))
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
        if self.scheme == "allocation":
            return f"random allocation: each unit by itself in {self.draws} of the {self.batches} steps of an epoch"
        if self.scheme == "fixed":
            return f"uniform batches of {self.size} of {self.places} places without replacement"
        return f"shuffled epochs of {self.batches} batches over {self.places} places, accounted without amplification"


def poisson_batch(key: Key, *, step: int, units: int, rate: float) -> Indices:
    """Indices of the units in the batch of `step`: each joins independently with probability `rate`."""
    return np.flatnonzero(key.uniform(units, step=step, name="units", purpose="poisson") < rate)


@lru_cache(maxsize=16)
def allocated(key: Key, epoch: int, units: int, steps: int, draws: int) -> Indices:
    """(units, draws) the steps of this epoch, from 0 on, that hold each unit: uniform subsets, independent over units.

    Floyd's method (Bentley and Floyd 1987): the c-th draw is uniform over the first steps - draws + c + 1 steps, and
    taken already means the last of them. A unit's row does not depend on how many units there are.
    """
    drawn = key.uniform(units * draws, step=epoch, name="units", purpose="allocation").reshape(units, draws)
    chosen = np.empty((units, draws), dtype=np.int64)
    for place in range(draws):
        last = steps - draws + place
        wanted = np.floor(drawn[:, place] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :place] == wanted[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, last, wanted)
    chosen.setflags(write=False)
    return chosen


def _order(key: Key, places: int, *, step: int, purpose: str) -> Indices:
    """A uniformly random order of the places: that of independent uniforms (equal ones have chance n^2 / 2^54)."""
    return np.argsort(key.uniform(places, step=step, name="places", purpose=purpose), kind="stable")
