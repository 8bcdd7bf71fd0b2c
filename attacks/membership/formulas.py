"""Published membership scores from losses under the target and under reference models. Pure numpy.

Shapes throughout: `target` (m,) the target's losses of m records; `references` (k, m) those of k reference models;
`inside` (k, m) whether model j was trained on record i. Losses are mean negative log-likelihoods of the answer, so
p = exp(-loss) is the (per-token geometric mean) probability of the right answer. Every function returns (m,), higher =
"was in training", and never sees the target's coins.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import norm
from scipy.stats import t as student

from dpaudit.errors import rejected

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Carlini et al. 2022 find per-record variances useful from about 64 models on; below, one variance for all.
ENOUGH_FOR_OWN_VARIANCE = 64
_TINY = 1e-12


def confidence(losses: Floats) -> Floats:
    """phi = log p - log(1 - p) with p = exp(-loss), nearly normal over models (Carlini et al. 2022)."""
    loss = np.maximum(losses, _TINY)
    return -loss - np.log(-np.expm1(-loss))


@dataclass(frozen=True)
class Moments:
    """Per record: mean, variance (n - 1 in the denominator, NaN for n < 2) and number of the models on one side."""

    mean: Floats
    variance: Floats
    count: npt.NDArray[np.int64]


def moments(values: Floats, chosen: Bools) -> Moments:
    """Moments over the models chosen for each record; values, chosen: (k, m)."""
    count = chosen.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(chosen, values, 0.0).sum(axis=0) / count
        spread = (np.where(chosen, values - mean, 0.0) ** 2).sum(axis=0) / (count - 1)
    spread[count < 2] = np.nan
    mean[count < 1] = np.nan
    return Moments(mean, spread, count)


def _filled(own: Moments, other: Moments) -> Floats:
    """The means, a record that no model on this side saw taken at the other side's mean plus the average gap."""
    gap = own.mean - other.mean
    known = np.isfinite(gap)
    typical = float(gap[known].mean()) if known.any() else 0.0
    return np.where(own.count > 0, own.mean, np.where(other.count > 0, other.mean + typical, 0.0))


def _pooled(own: Moments) -> float:
    """One variance for all records: within records, weighted by degrees of freedom."""
    known = own.count > 1
    if not known.any():
        return 1.0
    freedom = own.count[known] - 1
    return max(float((own.variance[known] * freedom).sum() / freedom.sum()), _TINY)


def _deviation(own: Moments, per_record: bool) -> Floats:
    pooled = _pooled(own)
    if not per_record:
        return np.full(own.mean.shape, np.sqrt(pooled))
    return np.sqrt(np.maximum(np.where(own.count > 1, own.variance, pooled), _TINY))


def _checked(target: Floats, references: Floats, inside: Bools) -> None:
    if references.ndim != 2 or references.shape != inside.shape or references.shape[1:] != target.shape:
        shapes = f"{target.shape}, {references.shape}, {inside.shape}"
        raise rejected("reference losses", f"shapes {shapes}", "(m,), (k, m) and (k, m)")
    if len(references) < 1:
        raise rejected("references", 0, "at least one reference model")


def lira_online(target: Floats, references: Floats, inside: Bools, *, own_variance: bool | None = None) -> Floats:
    """LiRA, online (Carlini et al. 2022, algorithm 1): log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out).

    own_variance: each record's own (default from 64 models on), otherwise one within-record variance for each side.
    """
    _checked(target, references, inside)
    per_record = len(references) >= ENOUGH_FOR_OWN_VARIANCE if own_variance is None else own_variance
    phi, values = confidence(target), confidence(references)
    seen, unseen = moments(values, inside), moments(values, ~inside)
    log_in = norm.logpdf(phi, _filled(seen, unseen), _deviation(seen, per_record))
    return np.asarray(log_in - norm.logpdf(phi, _filled(unseen, seen), _deviation(unseen, per_record)))


def lira_offline(target: Floats, references: Floats, inside: Bools, *, own_variance: bool | None = None) -> Floats:
    """LiRA, offline: Pr[N(mu_out, s_out) <= phi], on the scale of its normal quantile, where it never saturates."""
    _checked(target, references, inside)
    per_record = len(references) >= ENOUGH_FOR_OWN_VARIANCE if own_variance is None else own_variance
    values = confidence(references)
    unseen = moments(values, ~inside)
    mean = _filled(unseen, moments(values, inside))
    return (confidence(target) - mean) / _deviation(unseen, per_record)


def attack_r(target: Floats, references: Floats, inside: Bools) -> Floats:
    """Attack-R (Ye et al. 2022): the share of OUT models with a larger loss; equal losses count one half."""
    _checked(target, references, inside)
    unseen = ~inside
    above = (references > target) + 0.5 * (references == target)
    return np.asarray((above * unseen).sum(axis=0) / np.maximum(unseen.sum(axis=0), 1), dtype=np.float64)


def log_reference_probability(references: Floats, inside: Bools, *, offline_a: float | None = None) -> Floats:
    """(m,) log of RMIA's pbar(x): the mean of p over IN and OUT models, each side weighing one half.

    offline_a: with OUT models alone, pbar = ((1 + a) pbar_out + 1 - a) / 2 (Zarifzadeh et al. 2024, offline). A record
    with models on one side only is taken at that side's mean.
    """

    def side(chosen: Bools) -> tuple[Floats, npt.NDArray[np.int64]]:
        count = chosen.sum(axis=0)
        with np.errstate(divide="ignore"):
            total = logsumexp(np.where(chosen, -references, -np.inf), axis=0)
        return np.asarray(total) - np.log(np.maximum(count, 1)), count

    out, n_out = side(~inside)
    if offline_a is not None:
        return np.asarray(np.log(((1.0 + offline_a) * np.exp(out) + 1.0 - offline_a) / 2.0))
    within, n_in = side(inside)
    both = np.logaddexp(within, out) - np.log(2.0)
    return np.where(n_in == 0, out, np.where(n_out == 0, within, both))


def rmia(
    target: Floats,
    references: Floats,
    inside: Bools,
    population: tuple[Floats, Floats],
    *,
    gamma: float = 1.0,
    offline_a: float | None = None,
) -> Floats:
    """RMIA (Zarifzadeh et al. 2024): the share of population records z with
    (p(x) / pbar(x)) / (p(z) / pbar(z)) >= gamma.

    population: losses of z under the target (n,) and under the references (k, n), none of which was trained on z.

    The share is a step function of p(x) / pbar(x) and takes n + 1 values, so the records that beat all of a small
    population would tie, just where low false positive rates are read. Records with equal shares are ordered by the
    ratio itself: the score is (share n + f) / (n + 1), with f in [0, 1) growing with the ratio between two steps.
    """
    _checked(target, references, inside)
    ratio = -target - log_reference_probability(references, inside, offline_a=offline_a)
    limit = np.sort(population_ratio(population, offline_a=offline_a)) + np.log(gamma)
    if not limit.size:
        return np.zeros_like(ratio)
    beaten = np.searchsorted(limit, ratio, side="right")
    below, above = limit[np.maximum(beaten - 1, 0)], limit[np.minimum(beaten, limit.size - 1)]
    over, under = np.maximum(ratio - below, 0.0), np.maximum(above - ratio, 0.0)
    sizes = np.where(beaten == 0, 1.0, over) + np.where(beaten == limit.size, 1.0, under)
    within = np.where(beaten == 0, 1.0, over) / sizes  # last step: over / (over + 1); first: 1 / (1 + under)
    return np.asarray((beaten + np.minimum(within, np.nextafter(1.0, 0.0))) / (limit.size + 1), dtype=np.float64)


def population_ratio(population: tuple[Floats, Floats], *, offline_a: float | None = None) -> Floats:
    """(n,) log p(z) - log pbar(z) of population records, which every model is OUT of."""
    losses, references = population
    return -losses - log_reference_probability(references, np.zeros(references.shape, bool), offline_a=offline_a)


def informia(target: Floats, references: Floats, inside: Bools, population: tuple[Floats, Floats]) -> Floats:
    """InfoRMIA (arXiv 2510.05582): log2 p(x|theta) / p(x) + KL(p(z) || p(z|theta)), in bits.

    p(x) is the mean over reference models, and the divergence is the mean over population records of
    log2 p(z) / p(z|theta): how far the target has moved away from what it is compared with.
    """
    _checked(target, references, inside)
    ratio = -target - log_reference_probability(references, inside)
    moved = population_ratio(population)
    centre = float(moved.mean()) if moved.size else 0.0
    return np.asarray((ratio - centre) / np.log(2.0), dtype=np.float64)


@dataclass(frozen=True)
class NormalInverseGamma:
    """Prior of a record's (mu, s^2): s^2 ~ InvGamma(a, b), mu | s^2 ~ N(mean, s^2 / weight)."""

    mean: float
    weight: float
    a: float
    b: float

    @classmethod
    def fit(cls, found: Moments) -> "NormalInverseGamma":
        """By moments over records: E s^2 = b / (a - 1); the variances' spread beyond chance gives a; the means' spread
        beyond s^2 / n gives the weight. Ours: the paper's own choice of hyper-parameters was not available to us."""
        seen, several = found.count > 0, found.count > 1
        mean = float(found.mean[seen].mean()) if seen.any() else 0.0
        variance = _pooled(found)
        a = 3.0
        if several.sum() > 2:
            freedom = found.count[several] - 1
            spread = float(np.var(found.variance[several] / variance))
            # Var(sample variance / E s^2) = (1 + 1/(a-2)) (1 + 2/f) - 1 for s^2 ~ InvGamma(a, .).
            noise = 2.0 * float((1.0 / freedom).mean())
            excess = (spread - noise) / (1.0 + noise)
            a = 2.0 + 1.0 / min(max(excess, 1e-2), 1e2)
        weight = 1.0
        if seen.sum() > 2:
            between = float(np.var(found.mean[seen])) - variance * float((1.0 / found.count[seen]).mean())
            weight = variance / max(between, 1e-3 * variance)
        return cls(mean, weight, a, variance * (a - 1.0))

    def predictive(self, found: Moments) -> tuple[Floats, Floats, Floats]:
        """(centre, scale, degrees of freedom), each (m,), of the Student-t law of one more value of each record:
        2 a_n degrees of freedom, scale^2 = b_n (weight_n + 1) / (a_n weight_n) (Murphy 2007, section 6)."""
        n = found.count.astype(np.float64)
        mean = np.where(found.count > 0, found.mean, self.mean)
        squares = np.where(found.count > 1, found.variance, 0.0) * np.maximum(n - 1, 0)
        weight, a = self.weight + n, self.a + n / 2.0
        centre = (self.weight * self.mean + n * mean) / weight
        b = self.b + 0.5 * squares + 0.5 * self.weight * n / weight * (mean - self.mean) ** 2
        return centre, np.sqrt(b * (weight + 1.0) / (a * weight)), 2.0 * a


def bavaria(target: Floats, references: Floats, inside: Bools, *, offline: bool = False) -> Floats:
    """BaVarIA-t (arXiv 2603.11799): LiRA with a normal-inverse-gamma prior on every record's mean and variance.

    The score is the log ratio of two Student-t predictive densities, so a few models suffice and nothing switches
    between one and many variances. offline: OUT models alone, the upper tail of the OUT predictive as a normal
    quantile.
    """
    _checked(target, references, inside)
    phi, values = confidence(target), confidence(references)
    unseen = moments(values, ~inside)
    out = NormalInverseGamma.fit(unseen)
    if offline:
        return _quantile(phi, *out.predictive(unseen))
    seen = moments(values, inside)
    within = NormalInverseGamma.fit(seen)
    return _log_density(phi, *within.predictive(seen)) - _log_density(phi, *out.predictive(unseen))


def _log_density(x: Floats, centre: Floats, scale: Floats, freedom: Floats) -> Floats:
    return np.asarray(student.logpdf((x - centre) / scale, freedom) - np.log(scale))


def _quantile(x: Floats, centre: Floats, scale: Floats, freedom: Floats) -> Floats:
    """z with Pr[normal <= z] = Pr[Student t <= x], cut at 37 standard deviations."""
    standard = (x - centre) / scale
    tail = student.cdf(-np.abs(standard), freedom)
    return np.sign(standard) * -ndtri(np.maximum(tail, ndtr(-37.0)))


def quantile_score(target: Floats, predicted: Floats, spread: Floats) -> Floats:
    """Quantile regression (Bertran et al. 2023; one-run form: Liu et al. 2025): where a record's loss lies in the law
    N(predicted, spread^2) that is expected of it, as minus its normal quantile."""
    return -(target - predicted) / np.maximum(spread, _TINY)


def min_k(values: Floats, owner: npt.NDArray[np.int64], records: int, share: float) -> Floats:
    """(records,) mean of the `share` smallest values of each record; at least one. values, owner: (tokens,)."""
    order = np.lexsort((values, owner))
    counts = np.bincount(owner, minlength=records)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(values.size) - starts[owner[order]]
    take = np.maximum(1, np.floor(share * counts + 1e-9)).astype(np.int64)
    kept = place < take[owner[order]]
    sums = np.bincount(owner[order][kept], weights=values[order][kept], minlength=records)
    return np.asarray(sums / np.maximum(1, np.minimum(take, counts)), dtype=np.float64)
