"""Several mechanisms on the same people: their privacy-loss distributions composed.

Used for a release of visual tokens beside the training (`fusion.release=clip-noise`): the tokens of a unit are clipped
to R and published once with N(0, (zR)^2), which is one Gaussian on everybody, `release_event(z)`; the training that
follows may depend on what was published. Adaptive composition of privacy-loss distributions covers that (Sommer,
Meiser and Mohammadi 2019; Gopi, Lee and Wutschitz 2021). All mechanisms must speak of the same relation.

A release of rows is never covered under add-remove: a published row shows that somebody is in the data.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from scipy.optimize import brentq

from dpaudit.accounting.events import DpSgd, Noise, Scheme, check_delta, sensitivity
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.pld import COARSE, stride_of, together
from dpaudit.accounting.search import noise_multiplier_for
from dpaudit.documents import EpsilonAt, Relation
from dpaudit.errors import rejected


def release_event(multiplier: float, relation: Relation) -> DpSgd:
    """Tokens clipped to R and published once with noise of standard deviation z R: mu = 1/z, or 2/z under replace.

    Raises UsageError for add-remove, and for a multiplier that is not positive.
    """
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise rejected("fusion.multiplier", multiplier, "a finite number > 0")
    if relation == "add-remove":
        raise rejected(
            "privacy.relation", relation, "zero-out or replace with a release of tokens: a published row shows presence"
        )
    return DpSgd(multiplier, 1.0, 1, relation)


def joint_epsilon(events: Sequence[DpSgd], delta: float) -> float:
    """eps of all `events` together at `delta`; an upper bound, as each alone. inf when one has no noise."""
    return together(events, delta)


def joint_curve(events: Sequence[DpSgd], deltas: Sequence[float]) -> tuple[EpsilonAt, ...]:
    """eps at several deltas, as the claim document holds them."""
    return tuple(EpsilonAt(delta=float(delta), epsilon=joint_epsilon(events, float(delta))) for delta in deltas)


def joint_after(training: DpSgd, others: Sequence[DpSgd], steps: int, delta: float) -> float:
    """eps spent after the first `steps` of `training` with all of `others` spent before it; never decreases.

    An upper bound before the last step (steps rounded up to one of twenty), exact at it.
    """
    check_delta(delta)
    total = joint_epsilon([training, *others], delta)
    if steps >= training.steps:
        return total
    stride = stride_of(training, 20)
    spent = 0.0
    for passed in range(0, stride * math.ceil(max(steps, 0) / stride) + 1, stride):
        before = replace(training, steps=min(passed, training.steps))
        spent = max(spent, together([before, *others], delta, COARSE))
    return min(spent, total)


def noise_multiplier_beside(
    others: Sequence[DpSgd],
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    relation: Relation,
    noise: Noise = "gaussian",
    sampling: Scheme = "poisson",
    epoch: int | None = None,
) -> float:
    """The smallest sigma (to 1e-3, relative) of a training that together with `others` stays within `epsilon`.

    Raises UsageError, naming fusion.multiplier, when the others alone leave nothing.
    """
    check_delta(delta)
    alone = joint_epsilon(others, delta)
    if alone >= epsilon:
        raise rejected("fusion.multiplier", others[0].noise_multiplier, _enough(others, epsilon, delta, alone))
    return noise_multiplier_for(
        epsilon=epsilon,
        delta=delta,
        sample_rate=sample_rate,
        steps=steps,
        relation=relation,
        noise=noise,
        sampling=sampling,
        epoch=epoch,
        beside=others,
    )


def _enough(others: Sequence[DpSgd], epsilon: float, delta: float, alone: float) -> str:
    """What a single Gaussian release must at least have, for the message."""
    moved = sensitivity(others[0].relation)
    mu = brentq(lambda m: gaussian_epsilon(m, delta) - epsilon, 1e-9, 10 * (math.sqrt(2 * epsilon) + epsilon + 10))
    return (
        f"more than {moved / float(mu):.4g} for eps = {epsilon:g} at delta = {delta:g} "
        f"(the release alone costs {alone:.4g})"
    )
