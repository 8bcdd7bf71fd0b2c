"""What all modules of the contract share: the units that are probed, extreme records in place, whole trainings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import hypergeom

from attacks.contract.draws import Draws, draw
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Observation, Probe, Records, Vector
from attacks.contract.training import Training

if TYPE_CHECKING:
    from attacks.contract.series import Everything

FROZEN = "equal seeds on equal records gave different steps, so nothing can be compared under frozen noise"
SHARE, MISSED = 0.05, 1e-3  # a fault of this share of the records is missed with at most this probability


@dataclass(frozen=True)
class Picks:
    """Which units are probed closely: `anchor` keeps batches from being empty, `group`, and `place` for stand-ins."""

    anchor: int
    group: tuple[int, ...]
    place: int

    @classmethod
    def of(cls, probe: Probe, norms: dict[int, float]) -> "Picks":
        """A few units, chosen by the seed; by gradient norm where gradients are offered: small, large and any.

        A unit far above C is clipped to the same length whatever rescales it, so a leak that rescales gradients (a
        token-mean loss) shows on small ones only; what clips too little shows on large ones.
        """
        order = [int(index) for index in np.random.default_rng([probe.seed, 7]).permutation(len(probe.own.items))]
        ranked = sorted(norms, key=lambda index: norms[index]) if len(order) > 6 else []
        chosen = [*ranked[:3], *ranked[-1:]] if len(ranked) > 6 else []
        others = [index for index in order if index not in chosen]
        anchor, place = others[:2]
        return cls(anchor, (*chosen, *others[2 : 7 - len(chosen)]), place)


@dataclass(frozen=True)
class StandIn:
    """An extreme record in the data set at `place`."""

    number: int
    records: Records
    problem: str | None  # why a batch with it can't be used (raised, or not finite)


@dataclass(frozen=True)
class Stated:
    """What the training as a whole is claimed to spend, stated by whoever checks it and not by the trainer."""

    epsilon: float | None = None
    delta: float | None = None


NOTHING_STATED = Stated()


class Bench:
    """The probe with its picks and stand-ins; shared by the modules of the contract."""

    def __init__(self, probe: Probe, stated: Stated = NOTHING_STATED) -> None:
        self.probe, self.stated = probe, stated
        self.norms = self._gradient_norms()
        self.picks = Picks.of(probe, self.norms)
        self.empty_problem = self._empty_problem()
        self.stand_ins = tuple(self._stand_in(number, record) for number, record in enumerate(probe.extremes))

    @cached_property
    def training(self) -> Training:
        """Whole trainings on fixed batches."""
        return Training(self.probe, self.picks.place, len(self.sample), empties=self.empty_problem is None)

    @cached_property
    def live(self) -> list[list[Observation]]:
        """Both histories by trainers without a noise seed, as in production; none where these can't be asked, which
        'batches without a seed' reports."""
        training = self.training
        try:
            return [
                self.probe.course(batches, records=training.records, noise=None)
                for batches in (training.batches, training.others)
            ]
        except MethodFailure:
            return []

    @cached_property
    def series(self) -> "Everything":
        """Pure noise under several seeds."""
        from attacks.contract.series import Everything

        return Everything(self)

    @cached_property
    def draws(self) -> Draws | None:
        """Of a fresh trainer; None if it offers no sample()."""
        return draw(self.probe) if "sample" in self.probe.offered else None

    @property
    def repeats(self) -> bool | None:
        """Whether the trainer's own sampler names an index twice in a batch; None = it offers no sample()."""
        return self.draws.twice > 0 if self.draws is not None else None

    @cached_property
    def sample(self) -> list[int]:
        """Units whose contribution is measured one by one: all of a small data set, otherwise enough (`missed`)."""
        count = len(self.probe.own.items)
        order = np.random.default_rng([self.probe.seed, 19]).permutation(count)
        wanted = next(size for size in range(1, count + 1) if miss_probability(count, size) <= MISSED)
        return sorted(int(index) for index in order[:wanted])

    @property
    def missed(self) -> float:
        """Probability that none of the probed units belongs to a faulty share of SHARE of the records."""
        return miss_probability(len(self.probe.own.items), len(self.sample))

    @property
    def usable(self) -> list[StandIn]:
        """Stand-ins that a step survives."""
        return [item for item in self.stand_ins if item.problem is None]

    def contribution(self, unit: int, beside: Sequence[int], records: Records | None = None) -> Vector:
        """What `unit` adds to the sum of the batch `beside`."""
        return self.difference([*beside, unit], beside, records)

    def difference(self, batch: Sequence[int], other: Sequence[int], records: Records | None = None) -> Vector:
        """Sum of one batch minus sum of the other, in one data set."""
        one = self.probe.observe(batch, records=records)
        two = self.probe.observe(other, records=records)
        return one.vector - two.vector

    def slack(self) -> float:
        """Rounding of the noisy sums."""
        picks = self.picks
        return self.probe.slack(self.probe.observe([picks.anchor]), self.probe.observe([*picks.group, picks.anchor]))

    def _gradient_norms(self) -> dict[int, float]:
        """Of the first units, before clipping; empty where gradients are not offered."""
        if "gradient" not in self.probe.offered:
            return {}
        subject, items = self.probe.build(self.probe.own), self.probe.own.items[:60]
        return {index: self.probe.size(self.probe.gradient(item, subject)) for index, item in enumerate(items)}

    def _empty_problem(self) -> str | None:
        try:
            seen = self.probe.observe([])
        except MethodFailure as failure:
            return str(failure)
        if not seen.noised:
            return "nothing was released for it"
        return None if np.isfinite(seen.vector).all() else "what was released for it is not finite"

    def _stand_in(self, number: int, record: object) -> StandIn:
        records = self.probe.replaced(self.picks.place, record, f"extreme record {number}")
        try:
            seen = self.probe.observe([self.picks.anchor, self.picks.place], records=records)
        except MethodFailure as failure:
            return StandIn(number, records, str(failure))
        return StandIn(
            number, records, None if finite(seen) else "made the released gradient or the parameters not finite"
        )


def finite(seen: Observation) -> bool:
    """Release and displacement."""
    return bool(np.isfinite(seen.vector).all() and all(np.isfinite(part).all() for part in seen.moved.values()))


def miss_probability(count: int, probed: int) -> float:
    """That `probed` of `count` units, drawn without replacement, avoid all of ceil(SHARE * count) faulty ones."""
    return float(hypergeom.pmf(0, count, math.ceil(SHARE * count), probed))
