"""`dpaudit.claim`: what is claimed, with the eps that it costs."""

from dpaudit.analysis.stating import stated_claim
from dpaudit.documents import Claim
from dpaudit.errors import UsageError


def claim(
    *,
    epsilon: float | None = None,
    delta: float = 1e-5,
    sigma: float | None = None,
    rate: float | None = None,
    steps: int | None = None,
    epoch: int | None = None,
) -> Claim:
    """A claim for `Scores.test` and `tradeoff`: a mechanism (its eps is computed) or a bare (eps, delta).

    sigma: standard deviation of the noise on the sum over the clip norm; rate: Poisson sampling rate q (1: everybody
    in every step); steps: T. epoch: steps of an epoch of random allocation, of which every record draws rate * epoch by
    itself; without it batches are Poisson. Neighbours differ in one record that is there or not.

    >>> import dpaudit
    >>> round(dpaudit.claim(sigma=1.0, rate=0.05, steps=200).epsilon, 2)
    4.77
    >>> round(dpaudit.claim(sigma=1.0, rate=0.05, steps=200, epoch=20).epsilon, 2)
    4.22
    >>> dpaudit.claim(epsilon=8).delta
    1e-05
    """
    found = stated_claim(epsilon=epsilon, sigma=sigma, rate=rate, steps=steps, epoch=epoch, delta=delta)
    if found is None:
        raise UsageError("claim: nothing is claimed; accepted: epsilon, or sigma, rate and steps")
    return found


def one_of(given: Claim | None, **stated: float | int | None) -> Claim | None:
    """A claim given as such, or by its numbers; None if neither is. Raises UsageError for both."""
    numbers = {name: value for name, value in stated.items() if name != "delta" and value is not None}
    if given is None:
        return claim(**stated) if numbers else None  # type: ignore[arg-type]
    if not isinstance(given, Claim):
        raise UsageError(f"claim: got {type(given).__name__}; accepted: dpaudit.claim(...), or epsilon=, or sigma=")
    if numbers:
        raise UsageError(f"{next(iter(numbers))}: given beside a claim; give one of the two")
    return given
