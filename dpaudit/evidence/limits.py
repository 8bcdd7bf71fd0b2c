"""The coins' evidence inverted over sigma: an upper limit of the noise, hence a lower bound of eps.

For each sigma0 three statistics ask whether the coins are more determined than sigma0 allows: the likelihood ratio of
a mixture of smaller sigma, which is sharp near sigma0; and, for noise that is far smaller than sigma0, so that L
itself is too low by a constant, the covariance of coins with L and the number of heads. The law of all given what was
seen is that of independent coins with probabilities expit(L) at sigma0; it is drawn by Monte Carlo (Barnard's test,
so a p-value is valid whatever the number of draws), and the three share the error in parts fixed here. The limit is
the largest sigma0 that is not refuted. It lies below the true sigma only if the true sigma itself is refuted, which
happens with probability at most `level`: the bound is exact within "DP-SGD with this q and T, unknown sigma".
"""

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from dpaudit.evidence.channel import Channel

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DRAWS = 4000
SHARES = (0.8, 0.1, 0.1)  # of the error: likelihood ratio, covariance, number of heads
SCALES = (0.97, 0.9, 0.7, 0.4)  # smaller sigmas that each sigma0 is held against
HIGHEST, LOWEST = 2.5, 0.02  # times the claimed sigma: where the limit is looked for
_COARSE, _PRECISION = 1.6, 4e-3


def sigma_upper(seen: Floats, coins: Bools, channel: Channel, *, level: float, rng: np.random.Generator) -> float:
    """Upper confidence limit of sigma with error probability `level`. seen: (m, T) in units of C; coins: (m,).

    inf where even HIGHEST times the claim is not refuted, 0 where LOWEST times the claim is. The same uniform numbers
    serve every sigma0, so that the p-value hardly jumps.
    """
    p_value = partial(_p_value, seen, coins, channel, rng.random((DRAWS, coins.size), dtype=np.float32))
    refuted = HIGHEST * channel.sigma
    if p_value(refuted) > level:
        return np.inf
    while refuted > LOWEST * channel.sigma:
        kept = refuted / _COARSE
        if p_value(kept) > level:
            while refuted / kept > 1 + _PRECISION:
                middle = float(np.sqrt(refuted * kept))
                kept, refuted = (middle, refuted) if p_value(middle) > level else (kept, middle)
            return refuted
        refuted = kept
    return 0.0


def _p_value(seen: Floats, coins: Bools, claimed: Channel, uniform: npt.NDArray[np.float32], sigma: float) -> float:
    channel = replace(claimed, sigma=sigma)
    ratios = channel.log_ratio(seen)
    wrong = np.stack([channel.log_ratio(seen, scale=scale) for scale in SCALES], axis=1)
    drawn = np.concatenate([coins[None], uniform < expit(ratios)]).astype(np.float64)
    # log probabilities of the coins under each sigma: coins @ L - sum softplus(L); the constant of the claim cancels.
    gains = drawn @ (wrong - ratios[:, None]) - np.logaddexp(0.0, wrong).sum(axis=0)
    # Under sigma0 coins vary with weight p (1 - p); the weighted mean of L takes out the part that is no association.
    inside = expit(ratios)
    spread = inside * (1 - inside)
    centred = np.clip(ratios, -30, 30)
    centred = centred - (spread @ centred) / max(float(spread.sum()), 1e-300)
    statistics = (np.logaddexp.reduce(gains, axis=1), drawn @ centred, drawn.sum(axis=1))
    shares = (
        np.count_nonzero(statistic >= statistic[0] - 1e-9) / (statistic.size * share)
        for statistic, share in zip(statistics, SHARES, strict=True)
    )
    return float(min(1.0, *shares))
