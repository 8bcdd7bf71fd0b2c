"""Testers for a mechanism that can be sampled: lower bounds on delta at a given eps, from samples on neighbouring data.

(eps, delta)-DP means E_P f - e^eps E_Q f <= delta for every function f into [0, 1], P and Q the output distributions on
neighbouring data (hockey-stick divergence; DP-Auditorium, Kong et al. 2023, tests the same inequality with Hoeffding's
bound on a weighted mixture, which needs of the order of (e^eps)^2 samples). Two exact forms, both distribution-free:

- counts: f is the indicator of an event fixed on other samples; Clopper-Pearson on both sides, half the error each.
- bounded: f is any score in [0, 1] from other samples; empirical Bernstein (Maurer and Pontil 2009, theorem 4) on both.

A positive bound refutes (eps, delta)-DP for every smaller delta. Never a proof of privacy: only one pair of data sets
and one f are looked at.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from dpaudit import validate
from dpaudit.bounds.clopper_pearson import upper_rate
from dpaudit.bounds.roots import largest_below
from dpaudit.errors import rejected


def delta_lower(*, hits_p: int, n_p: int, hits_q: int, n_q: int, epsilon: float, confidence: float) -> float:
    """Lower bound on delta at `epsilon` from how often an event occurred under P and under Q; 0 if none."""
    low, high = _rates(hits_p, n_p, hits_q, n_q, confidence)
    eps = validate.epsilon(epsilon)
    return max(0.0, low - math.exp(eps) * high) if eps < 700 else 0.0


def epsilon_lower(*, hits_p: int, n_p: int, hits_q: int, n_q: int, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` from the same counts; 0 if none."""
    low, high = _rates(hits_p, n_p, hits_q, n_q, confidence)
    gain = low - validate.delta(delta)
    return max(0.0, math.log(gain / high)) if gain > 0 else 0.0


def _rates(hits_p: int, n_p: int, hits_q: int, n_q: int, confidence: float) -> tuple[float, float]:
    total_p, total_q = validate.count("n_p", n_p, least=1), validate.count("n_q", n_q, least=1)
    p, q = validate.count("hits_p", hits_p, most=total_p), validate.count("hits_q", hits_q, most=total_q)
    tail = 0.5 * (1.0 - validate.confidence(confidence))
    low = float(betaincinv(p, total_p - p + 1, tail)) if p else 0.0
    return low, upper_rate(q, total_q, tail)


def bernstein_radius(values: npt.NDArray[np.float64], error: float) -> float:
    """r with P[mean > E + r] <= error for independent values in [0, 1] (Maurer and Pontil 2009, theorem 4)."""
    n = values.size
    log = math.log(2.0 / error)
    return math.sqrt(2.0 * float(np.var(values, ddof=1)) * log / n) + 7.0 * log / (3.0 * (n - 1))


def delta_lower_bounded(under_p: npt.ArrayLike, under_q: npt.ArrayLike, *, epsilon: float, confidence: float) -> float:
    """Lower bound on delta at `epsilon` from values of a function into [0, 1] under P (n,) and Q (m,); 0 if none."""
    p, q = _bounded("under_p", under_p), _bounded("under_q", under_q)
    eps = validate.epsilon(epsilon)
    if eps >= 700:
        return 0.0
    tail = 0.5 * (1.0 - validate.confidence(confidence))
    low = float(p.mean()) - bernstein_radius(p, tail)
    high = min(1.0, float(q.mean()) + bernstein_radius(q, tail))
    return max(0.0, low - math.exp(eps) * high)


def _bounded(field: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < 2 or not (np.all(array >= 0) and np.all(array <= 1)):
        raise rejected(field, f"an array of shape {array.shape}", "at least two numbers in [0, 1]")
    return array


def histogram_delta_lower(
    samples_p: npt.ArrayLike,
    samples_q: npt.ArrayLike,
    *,
    epsilon: float,
    edges: npt.ArrayLike,
    confidence: float,
) -> float:
    """Lower bound on delta at `epsilon` by a histogram: samples (n,), (m,), bin `edges` (k + 1,) fixed beforehand.

    The first half of the samples picks the bins where P exceeds e^eps Q (with add-one smoothing), the second half
    bounds the union of these bins as one event. Gilbert and McMillan (2018) instead pay a tolerance per bin.
    """
    hits = histogram_event(samples_p, samples_q, epsilon=epsilon, edges=edges)
    return delta_lower(hits_p=hits[0], n_p=hits[1], hits_q=hits[2], n_q=hits[3], epsilon=epsilon, confidence=confidence)


def histogram_event(
    samples_p: npt.ArrayLike, samples_q: npt.ArrayLike, *, epsilon: float, edges: npt.ArrayLike
) -> tuple[int, int, int, int]:
    """(hits under P, trials, hits under Q, trials) on the second halves, for bins chosen on the first halves."""
    bounds = np.asarray(edges, dtype=np.float64)
    if bounds.ndim != 1 or bounds.size < 2 or not np.all(np.diff(bounds) > 0):
        raise rejected("edges", f"an array of shape {bounds.shape}", "at least two ascending numbers")
    halves = []
    for field, samples in (("samples_p", samples_p), ("samples_q", samples_q)):
        array = np.asarray(samples, dtype=np.float64)
        if array.ndim != 1 or array.size < 4 or np.isnan(array).any():
            raise rejected(field, f"an array of shape {array.shape}", "a vector of at least four numbers, none NaN")
        bins = np.searchsorted(bounds, array, side="right")  # 0 and k + 1 are beyond the edges
        halves.append((bins[: array.size // 2], bins[array.size // 2 :]))
    (choose_p, test_p), (choose_q, test_q) = halves
    count_p = np.bincount(choose_p, minlength=bounds.size + 1) / choose_p.size
    count_q = (np.bincount(choose_q, minlength=bounds.size + 1) + 1.0) / (choose_q.size + 1.0)
    event = np.log(np.maximum(count_p, 1e-300)) > validate.epsilon(epsilon) + np.log(count_q)
    return int(event[test_p].sum()), test_p.size, int(event[test_q].sum()), test_q.size


def epsilon_ceiling(*, n_p: int, n_q: int, delta: float, confidence: float) -> float:
    """The largest eps that `epsilon_lower` can show with so many samples."""
    return epsilon_lower(hits_p=n_p, n_p=n_p, hits_q=0, n_q=n_q, delta=delta, confidence=confidence)


def histogram_epsilon_lower(
    samples_p: npt.ArrayLike,
    samples_q: npt.ArrayLike,
    *,
    guess: float,
    edges: npt.ArrayLike,
    delta: float,
    confidence: float,
) -> float:
    """Lower bound on eps at `delta`; the event is the one that would be best at eps = `guess`, fixed beforehand."""
    hits = histogram_event(samples_p, samples_q, epsilon=guess, edges=edges)
    return epsilon_lower(hits_p=hits[0], n_p=hits[1], hits_q=hits[2], n_q=hits[3], delta=delta, confidence=confidence)


def bounded_epsilon_lower(under_p: npt.ArrayLike, under_q: npt.ArrayLike, *, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` from values of a function into [0, 1]: the largest eps with a larger delta."""
    d = validate.delta(delta)
    return largest_below(
        lambda eps: -delta_lower_bounded(under_p, under_q, epsilon=eps, confidence=confidence), -d, most=700.0
    )
