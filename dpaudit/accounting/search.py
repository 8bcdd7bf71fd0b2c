"""sigma from eps: the smallest noise whose eps, alone or beside other mechanisms, stays within a target."""

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq

from dpaudit.accounting.events import DpSgd, Noise, Scheme, as_steps, check_delta
from dpaudit.accounting.gaussian import gaussian_epsilon
from dpaudit.accounting.pld import COARSE, FINE, together
from dpaudit.accounting.schemes import composed_as, moved
from dpaudit.documents import Relation
from dpaudit.errors import rejected
from dpaudit.validate import real

_LARGEST = 1e9
_CLOSE = 1e-3  # relative, of the sigma that is returned


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    relation: Relation = "add-remove",
    noise: Noise = "gaussian",
    sampling: Scheme = "poisson",
    epoch: int | None = None,
    beside: Sequence[DpSgd] = (),
) -> float:
    """The smallest sigma (to 1e-3, relative) whose eps at `delta`, with all of `beside`, is at most `epsilon`.

    Searched on a coarse grid, decided on the final one: the eps of the returned sigma never exceeds the target.
    Raises UsageError for arguments outside their domain, and when `beside` leaves nothing.
    """
    epsilon = real("epsilon", epsilon, low=0, high=math.inf, open_low=True, open_high=True)
    check_delta(delta)
    sample_rate = real("sample-rate", sample_rate, low=0, high=1, open_low=True)
    if (steps := as_steps(steps)) < 1:
        raise rejected("steps", steps, "at least 1")

    def spent(sigma: float, tolerance: float) -> float:
        return together([DpSgd(sigma, sample_rate, steps, relation, noise, sampling, epoch), *beside], delta, tolerance)

    start = enough(epsilon, delta, composed_as(DpSgd(1.0, sample_rate, steps, relation, noise, sampling, epoch)))
    low, high = _bracket(start, lambda sigma: spent(sigma, COARSE) > epsilon, epsilon)

    def log_excess(log_sigma: float) -> float:
        return math.log(max(spent(math.exp(log_sigma), COARSE), 1e-300) / epsilon)

    sigma = math.exp(brentq(log_excess, math.log(low) - 1e-6, math.log(high) + 1e-6, xtol=3e-4))
    return _settle(sigma, lambda value: spent(value, FINE) / epsilon)


def _settle(sigma: float, ratio: Callable[[float], float]) -> float:
    """From about right to just enough on the final grid: ratio(sigma) <= 1 < ratio(sigma / 1.001)."""
    known = {sigma: ratio(sigma)}
    for _ in range(60):
        above = [value for value, share in known.items() if share > 1]
        within = [value for value, share in known.items() if share <= 1]
        if above and within and min(within) <= max(above) * (1 + _CLOSE):
            return min(within)
        if above and within:
            trial = math.sqrt(max(above) * min(within))
        elif within:
            # eps falls about like a power of sigma: a step that should just cross the target, and a little more.
            trial = min(within) * max(0.9, min(known[min(within)], 1 - 0.4 * _CLOSE) - 0.5 * _CLOSE)
        else:
            trial = max(above) * min(1.1, max(known[max(above)], 1 + 0.4 * _CLOSE) + 0.1 * _CLOSE)
        known[trial] = ratio(trial)
    raise rejected("epsilon", sigma, "a target that the accountant can resolve at this delta")


def enough(epsilon: float, delta: float, event: DpSgd) -> float:
    """A sigma that is always enough, by the closed form without amplification (Laplace: T pure guarantees add up)."""
    if event.noise == "laplace":
        return moved(event) * event.steps / epsilon
    mu = brentq(lambda m: gaussian_epsilon(m, delta) - epsilon, 1e-9, 10 * (math.sqrt(2 * epsilon) + epsilon + 10))
    return float(moved(event) * math.sqrt(event.steps) / mu)


def _bracket(start: float, exceeds: Callable[[float], bool], epsilon: float) -> tuple[float, float]:
    """(low, high) with eps(low) > target >= eps(high) on the search grid."""
    high = start
    while exceeds(high):
        high *= 1.5
        if high > _LARGEST:
            raise rejected("epsilon", epsilon, "a target that some noise meets")
    low, factor = high / 1.5, 1.5
    while not exceeds(low):
        # Amplification can take orders of magnitude off: larger and larger strides.
        low, high, factor = low / factor, low, min(4.0, factor * 1.5)
    return low, high
