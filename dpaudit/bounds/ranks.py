"""Whether members score higher than others, by ranks."""

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr


def mid_ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Ranks from 1 to n along the first axis, (n,) or (n, d); equal values share the mean of their ranks.

    That of scipy.stats.rankdata, whose package takes longer to import than a file of scores to read.
    """
    order = np.argsort(values, axis=0, kind="stable")
    sorted_values = np.take_along_axis(values, order, axis=0)
    place = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    begins = np.ones(values.shape, dtype=bool)
    begins[1:] = sorted_values[1:] != sorted_values[:-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[:-1] = begins[1:]
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, place, len(values))[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape, dtype=np.float64)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def rank_p(scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(one-sided p-value for members that score higher, AUC).

    Mann-Whitney with the permutation variance, ties included, as a normal approximation with half a rank of continuity,
    which keeps small games from an extreme p by one unlucky order. scores, members: (n,), with members and others among
    them. Scores that are all equal: (1, 1/2).
    """
    ranks = mid_ranks(scores)
    n, n_in = scores.size, int(members.sum())
    n_out = n - n_in
    spread = float(np.sqrt(n_in * n_out / n * np.var(ranks, ddof=1))) if n > 1 else 0.0
    above = float(ranks[members].sum()) - n_in * (n_in + 1) / 2
    p = 1.0 if spread == 0.0 else float(ndtr((n_in * n_out / 2 + 0.5 - above) / spread))
    return p, above / (n_in * n_out)
