"""What a claim says beyond one unit at delta: several units of one person, and how often a guess can be right.

**Groups.** Under Poisson sampling j of a person's k units are in a batch with probability Binomial(k, q)(j), and move
the sum by at most j C. The pair "mixture over j of N(j, s^2)" against "N(0, s^2)" dominates every step and composes
(Ganesh 2024, arXiv 2401.10294, theorem 3.1). On everybody (q = 1, and shuffled epochs, which are accounted as such) it
is one Gaussian with k times the distance. k eps is *not* an upper bound at the same delta.

Elsewhere (a replaced unit with sampling, subsets of fixed size, Laplace noise) the group lemma stands: a mechanism that
is (eps, d)-DP for one unit is (k eps, d (e^(k eps) - 1) / (e^eps - 1))-DP for k (Dwork and Roth 2014, theorem 2.2 and
Vadhan 2017, lemma 2.2), with the eps chosen from the mechanism's own curve.

**Guesses.** Whoever guesses a fair coin "was this unit in?" is right with probability at most (1 + delta(0)) / 2, where
delta(0) is the total variation between both worlds.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from dpaudit.accounting.events import SMALLEST_DELTA, DpSgd, GroupOfUnits, check_delta, trivial
from dpaudit.accounting.gaussian import gaussian_delta, gaussian_epsilon
from dpaudit.accounting.pld import COARSE, discrete_losses, together
from dpaudit.accounting.schemes import composed_as, moved
from dpaudit.accounting.steps import directions
from dpaudit.validate import count

WIDEST = 30.0  # standard deviations of one step; beyond, a whole distribution of losses says nothing worth its cost


@dataclass(frozen=True)
class GroupLoss:
    """eps of k units together, and the delta that it holds at. rule: where it comes from."""

    epsilon: float
    delta: float
    rule: Literal["mechanism", "group lemma"]


@lru_cache(maxsize=256)
def group_loss(event: DpSgd, units: int, delta: float) -> GroupLoss:
    """eps of `units` units of one person under `event`, an upper bound at `delta` (or at the delta that it names)."""
    check_delta(delta)
    units = count("units", units, least=1)
    step = composed_as(event)
    known = trivial(step)
    if known is not None:
        return GroupLoss(known, delta, "mechanism")
    mu = units * moved(step) / step.noise_multiplier
    if step.noise == "gaussian" and step.sample_rate == 1:
        return GroupLoss(gaussian_epsilon(mu * math.sqrt(step.steps), delta), delta, "mechanism")
    if units == 1:
        return GroupLoss(together([step], delta), delta, "mechanism")
    if step.noise == "gaussian" and step.sampling == "poisson" and step.relation != "replace":
        group = GroupOfUnits(step.noise_multiplier, step.sample_rate, step.steps, step.relation, units=units)
        return GroupLoss(together([group], delta), delta, "mechanism")
    return _by_lemma(step, units, delta)


def _by_lemma(step: DpSgd, units: int, delta: float) -> GroupLoss:
    """The smallest eps whose group delta, with the mechanism's own delta at that eps, stays within `delta`."""

    def holds(epsilon: float) -> bool | None:
        own = delta / _factor(epsilon, units)
        return together([step], own, COARSE) <= epsilon if own >= SMALLEST_DELTA else None

    low = together([step], delta, COARSE)
    high = max(low, 1e-6)
    while not (answer := holds(high)):
        if answer is None or high > 1e3:  # the mechanism's curve is not known so far out
            return stated_group_loss(low, delta, units)
        low, high = high, 1.25 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return GroupLoss(units * high, delta, "group lemma")


def stated_group_loss(epsilon: float, delta: float, units: int) -> GroupLoss:
    """By the group lemma from (eps, delta) alone: k eps, at a larger delta."""
    return GroupLoss(units * epsilon, min(1.0, delta * _factor(epsilon, units)), "group lemma")


def _factor(epsilon: float, units: int) -> float:
    """(e^(k eps) - 1) / (e^eps - 1)."""
    if epsilon <= 0:
        return float(units)
    exponent = (units - 1) * epsilon + math.log(-math.expm1(-units * epsilon)) - math.log(-math.expm1(-epsilon))
    return math.exp(exponent) if exponent < 700 else math.inf


@lru_cache(maxsize=256)
def best_guess(event: DpSgd) -> float:
    """The largest share of right guesses about one unit's fair coin: (1 + delta(0)) / 2, an upper bound."""
    step = composed_as(event)
    known = trivial(step)
    if known is not None:
        return 1.0 if known else 0.5
    mu = moved(step) / step.noise_multiplier
    if step.noise == "gaussian" and step.sample_rate == 1:
        return (1 + gaussian_delta(mu * math.sqrt(step.steps), 0.0)) / 2
    if mu > WIDEST:
        return 1.0
    both = [discrete_losses(step, direction, COARSE) for direction in directions(step)]
    apart = max(
        float(np.sum(item.probabilities * np.clip(-np.expm1(-item.losses), 0.0, None))) + item.infinity_mass
        for item in both
    )
    return min(1.0, (1 + apart) / 2)
