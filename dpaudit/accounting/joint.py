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
from functools import lru_cache

from scipy.optimize import brentq

from dpaudit.accounting.events import DpSgd, Noise, Scheme, check_delta, sensitivity
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.pld import COARSE, FINE, composition, epsilon, grid_of, trivial
from dpaudit.accounting.schemes import composed_as
from dpaudit.documents import EpsilonAt, Relation
from dpaudit.errors import rejected

_LARGEST_SIGMA = 1e6


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
    check_delta(delta)
    return _joint(tuple(composed_as(event) for event in events), float(delta), FINE)


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
    stride = max(1, math.ceil(training.steps / 20))
    rounded = min(training.steps, math.ceil(max(steps, 0) / stride) * stride)
    spent = tuple(composed_as(event) for event in (replace(training, steps=rounded), *others))
    return min(_joint(spent, float(delta), COARSE), total)


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
) -> float:
    """The smallest sigma (to 1e-3, relative) of a training that together with `others` stays within `epsilon`.

    Raises UsageError, naming fusion.multiplier, when the others alone leave nothing.
    """
    check_delta(delta)
    alone = joint_epsilon(others, delta)
    if alone >= epsilon:
        raise rejected("fusion.multiplier", others[0].noise_multiplier, _enough(others, epsilon, delta, alone))

    def spent(sigma: float, grid: float) -> float:
        training = DpSgd(sigma, sample_rate, steps, relation, noise, sampling)
        return _joint(tuple(composed_as(event) for event in (training, *others)), float(delta), grid)

    high = 1.0
    while spent(high, COARSE) > epsilon:
        high *= 2
        if high > _LARGEST_SIGMA:
            raise rejected("fusion.multiplier", others[0].noise_multiplier, _enough(others, epsilon, delta, alone))
    low = high / 2
    while spent(low, COARSE) <= epsilon:
        low, high = low / 2, low
    logarithm = brentq(
        lambda x: math.log(spent(math.exp(x), COARSE) / epsilon), math.log(low), math.log(high), xtol=1e-4
    )
    sigma = math.exp(logarithm) * 1.0002
    for _ in range(200):
        if spent(sigma, FINE) <= epsilon:
            break
        sigma *= 1.0005
    else:
        raise rejected("epsilon", epsilon, f"a target that can be resolved at delta={delta}")
    while spent(sigma / 1.001, FINE) <= epsilon:
        sigma /= 1.001
    return sigma


def _enough(others: Sequence[DpSgd], epsilon: float, delta: float, alone: float) -> str:
    """What a single Gaussian release must at least have, for the message."""
    moved = sensitivity(others[0].relation)
    mu = brentq(lambda m: gaussian_epsilon(m, delta) - epsilon, 1e-9, 10 * (math.sqrt(2 * epsilon) + epsilon + 10))
    return (
        f"more than {moved / float(mu):.4g} for eps = {epsilon:g} at delta = {delta:g} "
        f"(the release alone costs {alone:.4g})"
    )


@lru_cache(maxsize=4096)
def _joint(events: tuple[DpSgd, ...], delta: float, wished: float) -> float:
    costly = [event for event in events if trivial(event) is None]
    if any(trivial(event) == math.inf for event in events):
        return math.inf
    if not costly:
        return 0.0
    if len(costly) == 1:
        return epsilon(costly[0], delta)
    grid = max(grid_of(event, wished) for event in costly)
    joined = composition(costly[0], grid)
    for event in costly[1:]:
        joined = joined.compose(composition(event, grid))
    return float(joined.get_epsilon_for_delta(delta))
