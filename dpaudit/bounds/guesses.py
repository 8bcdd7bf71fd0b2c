"""From scores to guesses: by rank, with the numbers of guesses fixed before looking.

A guess is +1 ("was in training"), -1 ("was not") or 0 (abstain). Rank-based guesses don't change under any strictly
increasing transformation of the scores, and ties (common when DP saturates a score) are broken at random, so that a
tied block can't smuggle in the order of the file, which often knows the coins.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from dpaudit import validate
from dpaudit.errors import rejected

Guesses = npt.NDArray[np.int8]


def as_scores(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Scores as a float vector; raises UsageError for another shape, NaN or an infinite score."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise rejected("scores", f"an array of shape {array.shape}", "a non-empty vector of numbers")
    if not np.isfinite(array).all():
        raise rejected("scores", array[~np.isfinite(array)][0].item(), "finite numbers")
    return array


def as_members(members: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    """Membership as a boolean vector of length n (True = the coin put the record in); raises UsageError otherwise."""
    array: npt.NDArray[Any] = np.asarray(members)
    if array.shape != (n,):
        raise rejected("members", f"an array of shape {array.shape}", f"a vector of {n} booleans, one per score")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise rejected("members", array[~np.isin(array, (0, 1))][0], "booleans, or 0 and 1")
    return array.astype(np.bool_)


def random_order(scores: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Indices from the lowest to the highest score, ties in random order. scores: (n,)."""
    shuffled = rng.permutation(scores.size)
    order: npt.NDArray[np.intp] = shuffled[np.argsort(scores[shuffled], kind="stable")]
    return order


def rank_guesses(scores: npt.ArrayLike, top: int, bottom: int, *, rng: np.random.Generator) -> Guesses:
    """Guess +1 for the `top` highest scores, -1 for the `bottom` lowest, 0 for the rest.

    scores: (n,), higher = more likely in training; `top` + `bottom` <= n, both fixed before the scores were seen
    (that is what makes the one-run bounds valid). Returns an int8 vector of shape (n,).
    """
    values = as_scores(scores)
    k_top = validate.count("top", top, most=values.size)
    k_bottom = validate.count("bottom", bottom, most=values.size - k_top)
    order = random_order(values, rng)
    guesses = np.zeros(values.size, dtype=np.int8)
    guesses[order[values.size - k_top :]] = 1
    guesses[order[:k_bottom]] = -1
    return guesses


def distance_guesses(scores: npt.ArrayLike, center: float, count: int, *, rng: np.random.Generator) -> Guesses:
    """Guess the `count` scores farthest from `center`: +1 above it, -1 below, a score at the centre by a fair coin.

    `center` must come from public or held-out scores (for instance the median of records that take no part in the
    game): a centre fitted to the audited coins would break the bound. scores: (n,). Returns int8 of shape (n,).
    """
    values = as_scores(scores)
    r = validate.count("count", count, most=values.size)
    middle = validate.real("center", center, low=-np.inf, high=np.inf, open_low=True, open_high=True)
    farthest = random_order(np.abs(values - middle), rng)[values.size - r :]
    guesses = np.zeros(values.size, dtype=np.int8)
    coin = rng.integers(0, 2, size=values.size, dtype=np.int8) * 2 - 1
    sign = np.sign(values - middle).astype(np.int8)
    guesses[farthest] = np.where(sign[farthest] == 0, coin[farthest], sign[farthest])
    return guesses


def count_correct(guesses: npt.ArrayLike, members: npt.ArrayLike) -> int:
    """v: guesses that agree with the coins; abstentions count neither way. Both of shape (n,)."""
    given = np.asarray(guesses)
    inside = as_members(members, given.size)
    return int(np.sum(given == np.where(inside, 1, -1)))
