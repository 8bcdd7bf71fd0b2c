"""Selection rules: how a threshold or a number of guesses may be chosen without breaking the confidence.

Taking the best of many looks at one data set breaks it (rules as shipped elsewhere raise false alarms on 14 to 47 % of
leak-free score sets at a nominal 5 %). A rule here is a frozen object with a proof:

- `Fixed`, `Threshold`: decided beforehand, e.g. by `dpaudit plan`. Costs nothing; the default.
- `Split`: choose on one part, bound on the rest. The rest is untouched by the choice; in a one-run game its coins stay
  fair and independent given the coins of the first part.
- `Bonferroni`: the best of K bounds, each at error / K.
- `Dkw`, `OrderStatisticBand`: limits on the error rates that hold at all thresholds at once (independent runs only).
- `MonteCarlo`: the best p-value over a list of guess numbers, recalibrated by simulation (one-run, delta = 0 only).
  Under eps-DP each coin given the output and all other coins favours one side with probability at most
  q = e^eps / (1 + e^eps), so along the order of confidence, which is a function of the output, the vector of right
  guesses is dominated by independent Bernoulli(q). A statistic that is monotone in that vector is therefore dominated
  by its simulation. With delta > 0 this argument fails, and the rule refuses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, ndtri

from dpaudit import validate
from dpaudit.bounds import bands
from dpaudit.bounds.clopper_pearson import upper_rate
from dpaudit.bounds.gdp import epsilon_from_mu
from dpaudit.bounds.guesses import as_members, as_scores, count_correct, random_order, rank_guesses
from dpaudit.errors import UsageError, rejected

Floats = npt.NDArray[np.float64]
# (canaries, guesses, correct, delta, confidence) -> lower bound on eps
OneRunBound = Callable[[int, int, int, float, float], float]
# (fpr, fnr, delta) -> eps that these rates need
RateBound = Callable[[Floats, Floats, float], float]

EPSILON_STEP, MOST_EPSILON = 0.02, 20.0  # grid of the Monte-Carlo rule
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Fixed:
    """Guess the `top` highest and the `bottom` lowest scores."""

    top: int
    bottom: int


@dataclass(frozen=True)
class Threshold:
    """Call a record a member when its score is at least `value`."""

    value: float


@dataclass(frozen=True)
class Split:
    """Choose on a random `fraction`, bound on the rest. `seed` fixes the split."""

    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        validate.real("fraction", self.fraction, low=0.0, high=1.0, open_low=True, open_high=True)


@dataclass(frozen=True)
class Bonferroni:
    """The best of all choices, each at an equal share of the error.

    One-run: over `shares` of the canaries guessed (half top, half bottom); independent runs: over all thresholds.
    """

    shares: tuple[float, ...] = SHARES


@dataclass(frozen=True)
class Dkw:
    """All thresholds at once by the Dvoretzky-Kiefer-Wolfowitz band."""


@dataclass(frozen=True)
class OrderStatisticBand:
    """All thresholds at once by the exact equal-level band."""


@dataclass(frozen=True)
class MonteCarlo:
    """The best p-value over `shares`, calibrated by `simulations` of the dominating coin flips."""

    shares: tuple[float, ...] = SHARES
    simulations: int = 9999
    seed: int = 0


OneRunRule = Fixed | Split | Bonferroni | MonteCarlo
RunsRule = Threshold | Split | Bonferroni | Dkw | OrderStatisticBand


@dataclass(frozen=True)
class Selected:
    """A bound under a rule. For one-run games with the counts behind it; `selection` in words."""

    epsilon_lower: float
    selection: str
    n: int
    guesses: int | None = None
    correct: int | None = None


def shares_to_guesses(n: int, shares: tuple[float, ...]) -> list[tuple[int, int]]:
    """(top, bottom) for each share of n canaries, halves rounded, duplicates and empties removed."""
    pairs = []
    for share in shares:
        half = validate.real("shares", share, low=0.0, high=1.0) * n / 2
        pair = (math.ceil(half - 1e-9), math.floor(half + 1e-9))
        if sum(pair) > 0 and pair not in pairs:
            pairs.append(pair)
    if not pairs:
        raise rejected("shares", shares, "at least one share that gives a guess")
    return pairs


def one_run_lower(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    bound: OneRunBound,
    *,
    rule: OneRunRule,
    delta: float,
    confidence: float,
    rng: np.random.Generator,
) -> Selected:
    """Lower bound on eps from one run's scores (n,) and coins (n,), with the guesses chosen by `rule`.

    `MonteCarlo` has a tail of its own (pure eps-DP) and ignores `bound`; it refuses delta > 0.
    """
    values = as_scores(scores)
    inside = as_members(members, values.size)
    validate.delta(delta)
    level = validate.confidence(confidence)

    def at(top: int, bottom: int, where: npt.NDArray[np.intp], sure: float) -> tuple[float, int]:
        right = count_correct(rank_guesses(values[where], top, bottom, rng=rng), inside[where])
        return bound(where.size, top + bottom, right, delta, sure), right

    everything = np.arange(values.size)
    match rule:
        case Fixed(top, bottom):
            eps, right = at(top, bottom, everything, level)
            return Selected(eps, f"fixed: {top} top, {bottom} bottom", values.size, top + bottom, right)
        case Split(fraction, seed):
            order = np.random.default_rng(seed).permutation(values.size)
            cut = min(max(1, round(fraction * values.size)), values.size - 1)
            first, rest = order[:cut], order[cut:]
            tried = shares_to_guesses(first.size, SHARES)
            best = max(tried, key=lambda pair: at(pair[0], pair[1], first, level)[0])
            share = sum(best) / first.size
            top, bottom = shares_to_guesses(rest.size, (share,))[0]
            eps, right = at(top, bottom, rest, level)
            text = f"split: {cut} choose, {rest.size} report {top} top, {bottom} bottom"
            return Selected(eps, text, rest.size, top + bottom, right)
        case Bonferroni(shares):
            pairs = shares_to_guesses(values.size, shares)
            sure = 1.0 - (1.0 - level) / len(pairs)
            results = [(*at(pair[0], pair[1], everything, sure), pair) for pair in pairs]
            eps, right, pair = max(results, key=lambda result: result[0])
            text = f"bonferroni over {len(pairs)} numbers of guesses: {pair[0]} top, {pair[1]} bottom"
            return Selected(eps, text, values.size, sum(pair), right)
        case MonteCarlo():
            return _monte_carlo(values, inside, rule, delta=delta, confidence=level, rng=rng)


def _monte_carlo(
    values: Floats,
    inside: npt.NDArray[np.bool_],
    rule: MonteCarlo,
    *,
    delta: float,
    confidence: float,
    rng: np.random.Generator,
) -> Selected:
    if delta > 0.0:
        raise rejected("delta", delta, "0 for the Monte-Carlo rule (its domination argument needs pure eps-DP)")
    order = random_order(values, rng)
    # Confidence order: the highest, the lowest, the second highest, ... It depends on the output alone.
    ranks = np.empty(values.size, dtype=np.intp)
    ranks[0::2] = order[::-1][: ranks[0::2].size]
    ranks[1::2] = order[: ranks[1::2].size]
    high = np.arange(values.size) % 2 == 0
    right = np.cumsum(inside[ranks] == high)
    looks = np.unique([sum(pair) for pair in shares_to_guesses(values.size, rule.shares)])
    seen = tuple(int(right[k - 1]) for k in looks)
    eps = _monte_carlo_lower(tuple(int(k) for k in looks), seen, rule.simulations, rule.seed, confidence)
    return Selected(eps, f"Monte-Carlo over {looks.size} numbers of guesses", values.size)


def _smallest_tail(right: npt.NDArray[np.intp], counts: npt.NDArray[np.intp], eps: float) -> Floats:
    """The smallest binomial tail over the looks; right: (..., looks)."""
    q = 1.0 / (1.0 + math.exp(-eps))
    tails = np.where(right > 0, betainc(np.maximum(right, 1), counts - right + 1.0, q), 1.0)
    return np.asarray(tails.min(axis=-1), dtype=np.float64)


@lru_cache(maxsize=1 << 14)
def _critical(looks: tuple[int, ...], simulations: int, seed: int, confidence: float, eps: float) -> float:
    """Reject "eps-DP" when the smallest tail is below this: at most a share 1 - confidence of simulations is."""
    rank = math.floor((1.0 - confidence) * (simulations + 1) + 1e-9)
    validate.count("simulations", simulations if rank else 0, least=math.ceil(1.0 / (1.0 - confidence)) - 1)
    counts = np.array(looks)
    # Right guesses between consecutive looks are independent binomials; a fresh stream for each eps.
    rng = np.random.default_rng([seed, round(eps * 1e6)])
    steps = rng.binomial(np.diff(counts, prepend=0), 1.0 / (1.0 + math.exp(-eps)), size=(simulations, counts.size))
    return float(np.sort(_smallest_tail(np.cumsum(steps, axis=1).astype(np.intp), counts, eps))[rank - 1])


def _monte_carlo_lower(
    looks: tuple[int, ...], seen: tuple[int, ...], simulations: int, seed: int, confidence: float
) -> float:
    """Test eps = 0, 0.02, 0.04, ... in this order, stop at the first that stands: to exceed the truth, the first grid
    point at or above it must be rejected, which has probability at most 1 - confidence (fixed-sequence testing)."""
    counts, observed = np.array(looks), np.array(seen)
    eps = 0.0
    while eps < MOST_EPSILON and (
        float(_smallest_tail(observed, counts, eps)) < _critical(looks, simulations, seed, confidence, round(eps, 6))
    ):
        eps += EPSILON_STEP
    return max(0.0, eps - EPSILON_STEP)


def epsilon_of(fpr: Floats, fnr: Floats, delta: float) -> float:
    """The distribution-free eps that the worst of these rate pairs needs."""
    # Of either inequality of `clopper_pearson.epsilon_of_rates` only the largest ratio matters.
    with np.errstate(divide="ignore"):
        ratio = np.maximum((1.0 - delta - fnr) / fpr, (1.0 - delta - fpr) / fnr).max()
    return float(np.log(ratio)) if ratio > 1.0 else 0.0


def gaussian_epsilon_of(fpr: Floats, fnr: Floats, delta: float) -> float:
    """The eps that the worst of these rate pairs needs within the Gaussian family."""
    mu = float(np.max(-ndtri(fpr) - ndtri(fnr)))
    return epsilon_from_mu(max(mu, 0.0), delta)


def runs_lower(
    inside: npt.ArrayLike,
    outside: npt.ArrayLike,
    bound: RateBound,
    *,
    rule: RunsRule,
    delta: float,
    confidence: float,
) -> Selected:
    """Lower bound on eps from independent runs, with the threshold chosen by `rule`.

    inside, outside: scores of the runs with the record (n,) and without it (k,).
    """
    a, b = as_scores(inside), as_scores(outside)
    validate.delta(delta)
    tail = 0.5 * (1.0 - validate.confidence(confidence))
    n = a.size + b.size
    match rule:
        case Threshold(value):
            eps = bound(*_rates_at(a, b, value, tail), delta)
            return Selected(eps, f"fixed threshold {value:g}", n)
        case Split(fraction, seed):
            (choose_a, rest_a), (choose_b, rest_b) = _halves(a, b, fraction, seed)
            values, misses, alarms = _counts(choose_a, choose_b)
            fnr = _pointwise(misses, choose_a.size, tail)
            fpr = _pointwise(alarms, choose_b.size, tail)
            each = [bound(fpr[i : i + 1], fnr[i : i + 1], delta) for i in range(values.size)]
            threshold = float(values[int(np.argmax(each))])
            text = f"split: threshold from {choose_a.size + choose_b.size} runs"
            return Selected(bound(*_rates_at(rest_a, rest_b, threshold, tail), delta), text, rest_a.size + rest_b.size)
        case Bonferroni():
            return _by_band(
                a, b, bounds=(bands.bonferroni, "bonferroni over all thresholds"), tail=tail, bound=bound, delta=delta
            )
        case Dkw():
            return _by_band(a, b, bounds=(bands.dkw, "DKW band"), tail=tail, bound=bound, delta=delta)
        case OrderStatisticBand():
            named = (bands.order_statistic, "exact order-statistic band")
            return _by_band(a, b, bounds=named, tail=tail, bound=bound, delta=delta)


def _rates_at(a: Floats, b: Floats, threshold: float, tail: float) -> tuple[Floats, Floats]:
    fpr = upper_rate(int((b >= threshold).sum()), b.size, tail)
    return np.array([fpr]), np.array([upper_rate(int((a < threshold).sum()), a.size, tail)])


def _pointwise(errors: npt.NDArray[np.intp], trials: int, tail: float) -> Floats:
    table = {int(k): upper_rate(int(k), trials, tail) for k in np.unique(errors)}
    return np.array([table[int(k)] for k in errors])


def _counts(a: Floats, b: Floats) -> tuple[Floats, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Distinct thresholds with the misses and alarms of "score >= threshold"."""
    values = np.unique(np.r_[a, b])
    misses = np.searchsorted(np.sort(a), values, side="left")
    alarms = b.size - np.searchsorted(np.sort(b), values, side="left")
    return values, misses, alarms


def _by_band(
    a: Floats,
    b: Floats,
    *,
    bounds: tuple[Callable[[int, float], Floats], str],
    tail: float,
    bound: RateBound,
    delta: float,
) -> Selected:
    band, text = bounds
    _, misses, alarms = _counts(a, b)
    eps = bound(band(b.size, tail)[alarms], band(a.size, tail)[misses], delta)
    return Selected(eps, text, a.size + b.size)


def _halves(a: Floats, b: Floats, fraction: float, seed: int) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    rng = np.random.default_rng(seed)
    parts = []
    for scores in (a, b):
        if scores.size < 2:
            raise UsageError("split: needs at least two runs of each kind")
        shuffled = rng.permutation(scores)
        cut = min(max(1, round(fraction * scores.size)), scores.size - 1)
        parts.append((shuffled[:cut], shuffled[cut:]))
    return parts[0], parts[1]
