"""What an accountant composes, and the numbers that come back."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dpaudit.documents import Relation
from dpaudit.errors import rejected
from dpaudit.validate import count, real

Direction = Literal["remove", "add"]
Noise = Literal["gaussian", "laplace"]
Scheme = Literal["poisson", "fixed", "shuffle", "allocation"]

SMALLEST_DELTA = 1e-30  # a bound on what is tested; nothing in the method ends there
MOST_STEPS = 10**10  # beyond 1e13 the loss of one step disappears in the rounding of the sum


@dataclass(frozen=True)
class DpSgd:
    """T steps of the subsampled Gaussian (or Laplace) mechanism.

    noise_multiplier: sigma / C (0 = no noise). sample_rate: q, each unit's chance to be in a batch. steps: T.
    sampling: who is in a batch. "poisson": each unit independently with probability q (q = 1: everybody). "fixed": a
    uniform subset of constant size, q = size / units (dpaudit.accounting.schemes). "shuffle": epochs over a shuffled
    list cut into batches, q = 1 / batches an epoch; accounted without any amplification. "allocation": each unit for
    itself draws k of the t steps of an epoch, q = k / t (dpaudit.accounting.allocation).
    epoch: t, for "allocation" alone; by default 1 / q, i.e. k = 1. A last epoch that is cut short counts as whole.
    noise: what sigma is. Gaussian: the standard deviation, and C bounds the L2 norm of what one unit adds. Laplace: the
    scale in every coordinate, and C bounds the L1 norm; in any dimension that is dominated by a single coordinate that
    carries all of C (trainers.zeroth_order says why). Unknown under replace with subsampling.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    relation: Relation = "add-remove"
    noise: Noise = "gaussian"
    sampling: Scheme = "poisson"
    epoch: int | None = None

    def __post_init__(self) -> None:
        noise = real("noise-multiplier", self.noise_multiplier, low=0, high=math.inf, open_high=True)
        self._in_python("noise_multiplier", noise)
        self._in_python("sample_rate", real("sample-rate", self.sample_rate, low=0, high=1))
        self._in_python("steps", as_steps(self.steps))
        if self.relation not in get_args(Relation):
            raise rejected("relation", self.relation, get_args(Relation))
        if self.noise not in get_args(Noise):
            raise rejected("noise", self.noise, get_args(Noise))
        if self.sampling not in get_args(Scheme):
            raise rejected("sampling", self.sampling, get_args(Scheme))
        if self.noise == "laplace" and self.relation == "replace" and self.sample_rate < 1:
            raise rejected("relation", self.relation, "add-remove or zero-out for subsampled Laplace noise")
        if self.noise == "laplace" and self.sampling == "fixed":
            raise rejected("sampling", self.sampling, "poisson or shuffle for Laplace noise")
        if self.sampling == "shuffle" and not self._whole_epochs():
            raise rejected("sample-rate", self.sample_rate, "1 / (batches an epoch) for shuffled batches")
        if self.sampling == "allocation":
            self._check_allocation()
        elif self.epoch is not None:
            raise rejected("epoch", self.epoch, "None, but for sampling=allocation")

    def _in_python(self, field: str, value: float) -> None:
        """Python's own numbers: a float32 of numpy would carry its precision into every later step, and equals the
        float under whose name results are remembered."""
        object.__setattr__(self, field, value)

    def _check_allocation(self) -> None:
        if self.noise == "laplace":
            raise rejected("sampling", self.sampling, "poisson or shuffle for Laplace noise")
        if self.relation == "replace":
            raise rejected("relation", self.relation, "add-remove or zero-out for sampling=allocation")
        if self.epoch is not None:
            count("epoch", self.epoch, least=1)
        if self.sample_rate == 0 or (self.epoch is None and not self._whole_epochs()):
            raise rejected("sample-rate", self.sample_rate, "k / t for sampling=allocation: 1 / t, or with epoch = t")
        share = self.sample_rate * self.epoch_steps
        if self.draws < 1 or not math.isclose(share, self.draws, rel_tol=1e-9):
            accepted = f"a multiple of 1/{self.epoch_steps} for sampling=allocation with epochs of so many steps"
            raise rejected("sample-rate", self.sample_rate, accepted)

    def _whole_epochs(self) -> bool:
        return self.sample_rate > 0 and math.isclose(1 / self.sample_rate, round(1 / self.sample_rate), rel_tol=1e-9)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch (shuffle, allocation)."""
        return self.epoch if self.epoch is not None else max(1, round(1 / self.sample_rate))

    @property
    def draws(self) -> int:
        """k of allocation: how many steps of an epoch a unit is in."""
        return round(self.sample_rate * self.epoch_steps)

    @property
    def epochs(self) -> int:
        """Epochs that the steps reach into; what shuffled and allocated batches are accounted by."""
        return math.ceil(self.steps / self.epoch_steps)


@dataclass(frozen=True)
class PrivacyLosses:
    """A discretised privacy-loss distribution: shapes (k,) and (k,), losses ascending.

    `probabilities` are those of the loss ln(P/Q) under P, where P is the run with the unit for direction "remove" and
    without it for "add"; under Q a loss l has probability p * exp(-l). `infinity_mass` is P(loss = inf), with all that
    was truncated and all that rounding may have taken from the others; together they may exceed 1 by as much. The FFT
    knows each probability to about 1e-17 absolutely, which exp(-l) magnifies at very negative losses: for masses under
    Q take P of the other direction, with the sign of the loss turned.
    """

    losses: npt.NDArray[np.float64]
    probabilities: npt.NDArray[np.float64]
    infinity_mass: float


@dataclass(frozen=True)
class GroupOfUnits(DpSgd):
    """The same for `units` units of one person under Poisson sampling of each: what they add moves together.

    Only Gaussian noise, add-remove or zero-out (dpaudit.accounting.groups).
    """

    units: int = 1


def trivial(event: DpSgd) -> float | None:
    """eps where nothing has to be computed: 0 when nothing is released, inf without noise."""
    if event.sample_rate == 0 or event.steps == 0:
        return 0.0
    return math.inf if event.noise_multiplier == 0 else None


def sensitivity(relation: Relation) -> float:
    """What one unit can move the sum of clipped gradients, in units of C: 2 under replace, 1 otherwise."""
    return 2.0 if relation == "replace" else 1.0


def neighbouring(relation: Relation) -> Any:
    """The relation as dp-accounting names it."""
    from dp_accounting.privacy_accountant import NeighboringRelation

    return {
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "replace": NeighboringRelation.REPLACE_ONE,
    }[relation]


def check_delta(delta: float) -> None:
    """UsageError unless the accountants can resolve `delta`."""
    real("delta", delta, low=SMALLEST_DELTA, high=1, open_high=True)


def as_steps(value: object) -> int:
    """A number of steps as an int, 0 to MOST_STEPS; a float may hold it."""
    return count("steps", int(value) if isinstance(value, float) and value.is_integer() else value, most=MOST_STEPS)
