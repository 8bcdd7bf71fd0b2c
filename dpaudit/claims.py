"""What a trainer claims about its steps, and what eps a claim states at a delta."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dpaudit.accounting import DpSgd
from dpaudit.documents import Relation
from dpaudit.errors import rejected

Mechanism = Literal["gaussian", "laplace", "zeroth-order", "correlated"]
Sampling = Literal["poisson", "fixed", "shuffle", "full", "allocation"]


@dataclass(frozen=True)
class StepClaim:
    """What a trainer says about one of its DP steps; the `claim` of the trainer protocol.

    max_grad_norm: C. noise_multiplier: sigma / C, whatever the relation. sample_rate: q. expected_batch_size: the
    public number that the noisy sum is divided by. unit: in words, e.g. "image (with all its questions)".
    epoch_steps: t of allocation, where each unit draws k of the t steps of an epoch by itself and q = k / t; by default
    1 / q (k = 1).
    Raises UsageError for a field that can't be true, because it comes from foreign code.
    """

    mechanism: Mechanism
    max_grad_norm: float
    noise_multiplier: float
    sampling: Sampling
    sample_rate: float
    expected_batch_size: float
    relation: Relation
    unit: str
    steps: int | None = None
    delta: float | None = None
    epoch_steps: int | None = None

    def __post_init__(self) -> None:
        for field, accepted in (("mechanism", Mechanism), ("sampling", Sampling), ("relation", Relation)):
            if getattr(self, field) not in get_args(accepted):
                raise rejected(f"claim.{field}", getattr(self, field), get_args(accepted))
        _number("claim.max_grad_norm", self.max_grad_norm, above=0.0)
        _number("claim.noise_multiplier", self.noise_multiplier, at_least=0.0)
        _number("claim.sample_rate", self.sample_rate, above=0.0, at_most=1.0)
        _number("claim.expected_batch_size", self.expected_batch_size, above=0.0)
        if not isinstance(self.unit, str) or not self.unit:
            raise rejected("claim.unit", self.unit, "the privacy unit in words")
        if self.steps is not None and (isinstance(self.steps, bool) or not _whole(self.steps)):
            raise rejected("claim.steps", self.steps, "an integer >= 1, or None")
        if self.delta is not None:
            _number("claim.delta", self.delta, above=0.0, below=1.0)
        if self.epoch_steps is not None and (isinstance(self.epoch_steps, bool) or not _whole(self.epoch_steps)):
            raise rejected("claim.epoch_steps", self.epoch_steps, "an integer >= 1, or None")
        if self.epoch_steps is not None and self.sampling != "allocation":
            raise rejected("claim.epoch_steps", self.epoch_steps, "None, but for sampling allocation")
        if self.sampling == "allocation":
            self.allocated()

    def allocated(self, steps: int = 1) -> DpSgd:
        """A claim of random allocation as the accountant's event, whatever its noise.

        Raises UsageError for a rate that no number of draws an epoch has, or a relation without a proof.
        """
        sigma = max(self.noise_multiplier, 1e-9)
        return DpSgd(sigma, self.sample_rate, steps, self.relation, sampling="allocation", epoch=self.epoch_steps)

    def event(self, steps: int | None = None) -> DpSgd | None:
        """The accountant's event over `steps` (default: all); None where there is no proof for what the claim says.

        An eps that was computed for Poisson batches must not be quoted for fixed-size or shuffled ones (Chua et al.
        2024; Annamalai et al. 2024). Theirs needs more than this claim says: that absent units leave their place empty.
        """
        count = steps if steps is not None else self.steps
        if count is None or self.mechanism != "gaussian" or self.sampling not in ("poisson", "full", "allocation"):
            return None
        if self.sampling == "allocation":
            return replace(self.allocated(count), noise_multiplier=self.noise_multiplier)
        rate = 1.0 if self.sampling == "full" else self.sample_rate
        return DpSgd(self.noise_multiplier, rate, count, self.relation)


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _number(
    field: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and above < value and at_least <= value <= at_most and value < below):  # type: ignore[operator]
        limits = [f"above {above:g}"] * (above > -math.inf) + [f"at least {at_least:g}"] * (at_least > -math.inf)
        limits += [f"at most {at_most:g}"] * (at_most < math.inf) + [f"below {below:g}"] * (below < math.inf)
        raise rejected(field, value, "a finite number " + ", ".join(limits))
