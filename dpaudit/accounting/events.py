"""What an accountant composes, and the numbers that come back."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dpaudit.documents import Relation
from dpaudit.errors import rejected

Direction = Literal["remove", "add"]
Noise = Literal["gaussian", "laplace"]
Scheme = Literal["poisson", "fixed", "shuffle"]

SMALLEST_DELTA = 1e-30  # a bound on what is tested; nothing in the method ends there


@dataclass(frozen=True)
class DpSgd:
    """T steps of the subsampled Gaussian (or Laplace) mechanism.

    noise_multiplier: sigma / C (0 = no noise). sample_rate: q, each unit's chance to be in a batch. steps: T.
    sampling: who is in a batch. "poisson": each unit independently with probability q (q = 1: everybody). "fixed": a
    uniform subset of constant size, q = size / units (dpaudit.accounting.schemes). "shuffle": epochs over a shuffled
    list cut into batches, q = 1 / batches an epoch; accounted without any amplification.
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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise rejected("noise-multiplier", self.noise_multiplier, "a finite number >= 0")
        if not 0 <= self.sample_rate <= 1:
            raise rejected("sample-rate", self.sample_rate, "a number from 0 to 1")
        if self.steps != int(self.steps) or self.steps < 0:
            raise rejected("steps", self.steps, "an integer >= 0")
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

    def _whole_epochs(self) -> bool:
        return self.sample_rate > 0 and math.isclose(1 / self.sample_rate, round(1 / self.sample_rate), rel_tol=1e-9)

    @property
    def epochs(self) -> int:
        """Epochs that the steps reach into; what shuffled batches are accounted by."""
        return math.ceil(self.steps / max(1, round(1 / self.sample_rate)))


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
    if not SMALLEST_DELTA <= delta < 1:
        raise rejected("delta", delta, f"a number from {SMALLEST_DELTA:g} to below 1")
