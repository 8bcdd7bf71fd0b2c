"""Evidence from coins: how much better a wrong claim predicts them than the claim itself.

Given everything that was seen, the claim says that the coins are independent Bernoulli(expit L)
(dpaudit.evidence.channel). With w fixed beforehand over wrong claims (smaller sigma, down to almost none; larger
amplitude: a clipping that fails),

    E = sum_j w_j prod_i p_j(coin_i | seen) / max over sigma' >= sigma of prod_i p_sigma'(coin_i | seen).

Validity. Let the true noise be sigma' >= sigma on all directions (the claim, or a mechanism that leaks less). The
denominator is at least prod_i p_sigma'(coin_i | seen), so conditionally on what was seen
E[E | seen] <= sum_j w_j sum over coins of prod_i p_j(coin_i | seen) = 1: universal inference (Wasserman, Ramdas,
Balakrishnan 2020, eq. 3) applied to the conditional law of the coins. At the claim itself there is no loss against the
simple ratio, because the maximum lies at sigma when the truth is smaller. Whole products are mixed, not factors: a
mixture of factors would have to pay for each candidate anew. For q = 1 or T = 1 the simple ratio is valid by itself for
every larger noise, step by step different too: p_alt / p_claim is a bet in the direction of the claim's own posterior,
and the true posterior is nearer to 1/2. Nothing here depends on how steps are drawn: under random allocation
p_sigma' is that of its own likelihood ratio, and the maximum covers every sigma' as under Poisson sampling. Noise that
varies over the steps above sigma is covered by simulation
(benchmarks/white_box_evidence.py).

The maximum runs over NULLS times sigma, a finite grid; between two grid points the log-likelihood is that of a point at
most half a grid step away, and the benchmark measures what this is worth (less than 0.01 nats).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from dpaudit.evidence.channel import Channel

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Wrong claims, equally weighted: (times the claimed sigma, amplitude in units of C).
ALTERNATIVES: tuple[tuple[float, float], ...] = (
    *((scale, 1.0) for scale in (0.97, 0.93, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)),
    *((1.0, amplitude) for amplitude in (1.5, 3.0, 10.0, 100.0)),
)
NULLS = (1.0, 1.01, 1.02, 1.04, 1.08, 1.15, 1.3, 1.6, 2.5, 10.0)  # times the claimed sigma
DRAWS = 2000  # of coins, for the p-value


@dataclass(frozen=True)
class Ratios:
    """values: (m, J) log-likelihood ratios. softplus: log(1 + e^L) of each, kept since every set of coins needs it."""

    values: Floats
    softplus: Floats

    @classmethod
    def of(cls, values: Floats) -> "Ratios":
        """With their softplus."""
        return cls(values, np.logaddexp(0.0, values))

    def rows(self, chosen: Bools | npt.NDArray[np.intp]) -> "Ratios":
        """Those of some candidates."""
        return Ratios(self.values[chosen], self.softplus[chosen])

    def log_probability(self, coins: Bools) -> Floats:
        """log prod_i expit(+-L_i): (..., m) coins -> (..., J)."""
        return np.asarray(coins.astype(np.float64) @ self.values - self.softplus.sum(axis=0))


@dataclass(frozen=True)
class Posteriors:
    """Log-likelihood ratios under each hypothesis. alternatives: (m, J); nulls: (m, K), the claim itself first."""

    alternatives: Ratios
    nulls: Ratios

    @classmethod
    def of(cls, seen: Floats, channel: Channel) -> "Posteriors":
        """seen: (m, T), in units of C."""

        wrong = [channel.log_ratio(seen, scale=scale, amplitude=amplitude) for scale, amplitude in ALTERNATIVES]
        null = [channel.log_ratio(seen, scale=scale) for scale in NULLS]
        return cls(Ratios.of(np.stack(wrong, axis=1)), Ratios.of(np.stack(null, axis=1)))

    def rows(self, chosen: Bools | npt.NDArray[np.intp]) -> "Posteriors":
        """Those of some candidates."""
        return Posteriors(self.alternatives.rows(chosen), self.nulls.rows(chosen))

    def log_e(self, coins: Bools) -> Floats:
        """Log e-values of coins: (..., m) -> (...)."""
        wrong, right = self.alternatives.log_probability(coins), self.nulls.log_probability(coins)
        mixed = np.logaddexp.reduce(wrong, axis=-1) - np.log(wrong.shape[-1])
        return np.asarray(mixed - right.max(axis=-1))


def p_value(posteriors: Posteriors, coins: Bools, rng: np.random.Generator, *, draws: int = DRAWS) -> float:
    """P[the e-value is as large as it is | seen] while the claim holds, by importance sampling.

    Half of the draws come from the claim, half from the mixture of wrong claims, so that tiny p-values are seen as well
    as large ones; the observed coins count as one more draw, which makes the result a valid p-value whatever the number
    of draws (Harrison 2012, Biometrika 99, eq. 2.5).
    """
    claim_ratios = posteriors.nulls.values[:, :1]
    m, wrong = posteriors.alternatives.values.shape
    sources = np.concatenate([np.zeros(draws // 2, dtype=int), 1 + rng.integers(wrong, size=draws - draws // 2)])
    columns = np.concatenate([claim_ratios, posteriors.alternatives.values], axis=1)
    drawn = np.empty((draws, m), dtype=bool)
    for source in np.unique(sources):
        mine = sources == source
        drawn[mine] = rng.random((int(mine.sum()), m)) < expit(columns[:, source])
    everything = np.concatenate([coins[None], drawn])
    claim = Ratios.of(claim_ratios).log_probability(everything)[:, 0]
    mixed = np.logaddexp.reduce(posteriors.alternatives.log_probability(everything), axis=1) - np.log(wrong)
    weight = np.exp(-np.logaddexp(np.log(0.5), np.log(0.5) + np.clip(mixed - claim, -700, 700)))
    statistic = posteriors.log_e(everything)
    return float(min(1.0, weight[statistic >= statistic[0] - 1e-9].sum() / (draws + 1)))
