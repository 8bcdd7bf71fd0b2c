"""Whether members score higher than others, by ranks."""

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import rankdata


def rank_p(scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(one-sided p-value for members that score higher, AUC).

    Mann-Whitney with the permutation variance, ties included, as a normal approximation with half a rank of continuity,
    which keeps small games from an extreme p by one unlucky order. scores, members: (n,), with members and others among
    them. Scores that are all equal: (1, 1/2).
    """
    ranks = rankdata(scores)
    n, n_in = scores.size, int(members.sum())
    n_out = n - n_in
    spread = float(np.sqrt(n_in * n_out / n * np.var(ranks, ddof=1))) if n > 1 else 0.0
    above = float(ranks[members].sum()) - n_in * (n_in + 1) / 2
    p = 1.0 if spread == 0.0 else float(ndtr((n_in * n_out / 2 + 0.5 - above) / spread))
    return p, above / (n_in * n_out)
