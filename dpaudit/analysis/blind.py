"""The blind baseline: can someone who never sees the model tell members from non-members? If so, the game is invalid.

A logistic regression on the records' features predicts block after block from the blocks before it, so every prediction
is independent of its own coin. Within a block the ranks of members are then a random draw (Mann-Whitney), whatever the
features; the blocks' deviations add up to a martingale with known variance.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

BLOCKS = 5
MOST_RECORDS = 20_000  # a guard, not a benchmark: beyond it a random part is enough
LEVEL = 0.001  # one-sided, outside the error budget


@dataclass(frozen=True)
class Blind:
    """auc: over blocks, weighted by pairs; p_value: one-sided for "better than chance"; n: predicted records."""

    auc: float
    p_value: float
    n: int


def baseline(features: npt.NDArray[np.float64], members: npt.NDArray[np.bool_], *, rng: np.random.Generator) -> Blind:
    """features: (n, columns); members: (n,). Needs both classes; a block without both says nothing."""
    from scipy.stats import rankdata  # half a second to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    order = rng.permutation(members.size)[:MOST_RECORDS]
    blocks = np.array_split(order, BLOCKS)
    above, expected, variance, pairs, predicted = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(1, BLOCKS):
        past, block = np.concatenate(blocks[:i]), blocks[i]
        n_in = int(members[block].sum())
        n_out = block.size - n_in
        if n_in == 0 or n_out == 0 or members[past].all() or not members[past].any():
            continue
        scale = StandardScaler().fit(features[past])
        model = LogisticRegression(max_iter=500).fit(scale.transform(features[past]), members[past])
        ranks = rankdata(model.decision_function(scale.transform(features[block])))
        above += float(ranks[members[block]].sum()) - n_in * (n_in + 1) / 2
        expected += n_in * n_out / 2
        # Permutation variance of the rank sum, ties included.
        variance += n_in * n_out / block.size * float(np.var(ranks, ddof=1))
        pairs += n_in * n_out
        predicted += block.size
    if variance == 0.0:
        return Blind(0.5, 1.0, predicted)
    return Blind(above / pairs, float(ndtr(-(above - expected) / np.sqrt(variance))), predicted)
