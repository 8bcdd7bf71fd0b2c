"""What a score array shows without any bound: histogram, ROC, AUC, TPR at small FPR. Descriptive, never a verdict.

Everything is tie-safe: a threshold takes a whole block of tied scores or none of it, so "TPR at FPR = x" never exceeds
the FPR asked. AUC is Mann-Whitney (ties count one half), not the AUC of the convex hull, above 1/2 on null data.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri

from dpaudit import validate
from dpaudit.bounds.guesses import as_members, as_scores
from dpaudit.documents import RocPoint, ScoreSummary
from dpaudit.errors import UsageError

Floats = npt.NDArray[np.float64]

FPRS = (0.1, 0.01, 0.001)
# Fewer expected false positives than this and the threshold's own FPR is known to no better than a factor of two, so a
# "TPR at that FPR" says nothing: it is reported as not resolvable.
LEAST_FALSE_POSITIVES = 10
MOST_ROC_POINTS = 201
BINS = 40


def clopper_pearson_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval for a binomial proportion (Clopper and Pearson 1934), half the error on each side."""
    n = validate.count("trials", trials, least=1)
    k = validate.count("successes", successes, most=n)
    tail = 0.5 * (1.0 - validate.confidence(confidence))
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1.0 - tail))
    return low, high


def curve(scores: npt.ArrayLike, members: npt.ArrayLike) -> tuple[Floats, Floats]:
    """FPR and TPR at every distinct threshold, from (0, 0) to (1, 1). scores, members: (n,)."""
    values = as_scores(scores)
    inside = as_members(members, values.size)
    n_in = int(inside.sum())
    if n_in == 0 or n_in == values.size:
        raise UsageError("members: one class only; accepted: at least one record in training and one not")
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    last = np.r_[np.nonzero(np.diff(ordered))[0], values.size - 1]  # last of each block of ties
    positives = np.cumsum(inside[order])[last]
    fpr = np.r_[0.0, (last + 1 - positives) / (values.size - n_in)]
    return fpr, np.r_[0.0, positives / n_in]


def auc(fpr: Floats, tpr: Floats) -> float:
    """Mann-Whitney: P[score in > score out] + P[equal] / 2, which is the trapezoid area of the tie-safe curve."""
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) * 0.5)


def auc_interval(value: float, n_in: int, n_out: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score-type interval for an AUC (Newcombe 2006, method 5): the A with |A - value| <= z sd(A).

    sd is Hanley and McNeil's under exponential scores, taken at A and not at the estimate, so the interval stays inside
    [0, 1] and has width at 0 and 1. Approximate, for independent records.
    """
    z2 = float(ndtri(0.5 + 0.5 * validate.confidence(confidence))) ** 2
    mean_n = 0.5 * (n_in + n_out) - 1.0

    def outside(a: float) -> bool:
        spread = a * (1 - a) * (1 + mean_n * (1 - a) / (2 - a) + mean_n * a / (1 + a)) / (n_in * n_out)
        return (a - value) ** 2 > z2 * spread

    def end(far: float) -> float:
        near = value
        for _ in range(60):
            middle = 0.5 * (near + far)
            near, far = (near, middle) if outside(middle) else (middle, far)
        return far if outside(far) else near

    # At 0 and 1 the spread vanishes, so the ends themselves are outside unless they are the estimate.
    return end(0.0), end(1.0)


def tpr_at(
    fpr: Floats, tpr: Floats, wanted: float, *, n_in: int, n_out: int, confidence: float = 0.95
) -> RocPoint | None:
    """TPR at the largest FPR not above `wanted`, with its Clopper-Pearson interval; None = not resolvable.

    The threshold depends on the non-members alone, so given it the members that exceed it are binomial and the interval
    for the TPR at this threshold is exact for independent records; the threshold's own FPR carries its sampling error.
    """
    validate.real("fpr", wanted, low=0.0, high=1.0, open_low=True)
    if n_out * wanted < LEAST_FALSE_POSITIVES:
        return None
    # 1e-12: a requested 0.1 with exactly one tenth of false positives must not fall to the block below.
    at = int(np.searchsorted(fpr, wanted + 1e-12, side="right")) - 1
    low, high = clopper_pearson_interval(round(float(tpr[at]) * n_in), n_in, confidence)
    return RocPoint(fpr=float(fpr[at]), tpr=float(tpr[at]), tpr_low=low, tpr_high=high)


def advantage(fpr: Floats, tpr: Floats) -> float:
    """max(TPR - FPR) over thresholds: descriptive and optimistic, since its threshold is chosen on the same records."""
    return float(np.max(tpr - fpr))


def points(fpr: Floats, tpr: Floats, *, n_in: int, n_out: int, confidence: float = 0.95) -> tuple[RocPoint, ...]:
    """At most 201 points of the curve with a simultaneous band.

    Band (Campbell 1994): by DKW both distribution functions are within c = sqrt(ln(4 / (1 - confidence)) / (2n)) of the
    truth everywhere at once, so the true TPR at FPR f lies between R(f - c_out) - c_in and R(f + c_out) + c_in.
    """
    keep = np.arange(fpr.size)
    if fpr.size > MOST_ROC_POINTS:
        # Half of the points evenly, half on a log scale towards small FPR, where audits look.
        even = np.linspace(0.0, 1.0, MOST_ROC_POINTS // 2)
        small = np.geomspace(1.0 / n_out, 1.0, MOST_ROC_POINTS // 2)
        wanted = np.searchsorted(fpr, np.r_[even, small], side="right") - 1
        keep = np.unique(np.r_[0, wanted, fpr.size - 1])
    width = 0.5 * math.log(4.0 / (1.0 - validate.confidence(confidence)))
    c_in, c_out = math.sqrt(width / n_in), math.sqrt(width / n_out)

    def tpr_of(at: Floats) -> Floats:
        inside = np.searchsorted(fpr, np.clip(at, 0.0, 1.0), side="right") - 1
        return np.where(at < 0.0, 0.0, np.where(at > 1.0, 1.0, tpr[inside]))

    low = np.clip(tpr_of(fpr[keep] - c_out) - c_in, 0.0, 1.0)
    high = np.clip(tpr_of(fpr[keep] + c_out) + c_in, 0.0, 1.0)
    rows = zip(fpr[keep], tpr[keep], low, high, strict=True)
    return tuple(RocPoint(fpr=float(f), tpr=float(t), tpr_low=float(lo), tpr_high=float(hi)) for f, t, lo, hi in rows)


def histogram_edges(scores: npt.ArrayLike) -> Floats:
    """About 40 bins between round numbers, so that no edge is anybody's score.

    The range is that of the middle 99.8 %, with whatever lies beyond counted in the outer bins: one absurd score must
    not squeeze all others into one bar.
    """
    values = as_scores(scores)
    low, high = (float(x) for x in np.quantile(values, (0.001, 0.999)))
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-300)
    raw = span / BINS
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 1e-290 else raw
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return np.arange(first, last + 1).astype(np.float64) * step


def histogram_counts(scores: npt.ArrayLike, edges: Floats) -> tuple[int, ...]:
    """Counts per bin; scores beyond the outer edges count in the outer bins. They sum to the number of scores."""
    values = np.asarray(scores, dtype=np.float64)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, edges.size - 2)
    return tuple(int(c) for c in np.bincount(bins, minlength=edges.size - 1))


def summarise(name: str, scores: npt.ArrayLike, members: npt.ArrayLike, *, confidence: float = 0.95) -> ScoreSummary:
    """What a reader may see of one game's scores: histograms, ROC with band, AUC, TPR at 10, 1 and 0.1 % FPR.

    scores: (n,), higher = was in training; members: (n,) booleans. Raises UsageError when one class is empty.
    """
    values = as_scores(scores)
    inside = as_members(members, values.size)
    fpr, tpr = curve(values, inside)
    n_in = int(inside.sum())
    n_out = values.size - n_in
    area = auc(fpr, tpr)
    low, high = auc_interval(area, n_in, n_out, confidence)
    edges = histogram_edges(values)
    return ScoreSummary(
        name=name,
        n_in=n_in,
        n_out=n_out,
        edges=tuple(float(e) for e in edges),
        counts_in=histogram_counts(values[inside], edges),
        counts_out=histogram_counts(values[~inside], edges),
        roc=points(fpr, tpr, n_in=n_in, n_out=n_out, confidence=confidence),
        auc=area,
        auc_low=low,
        auc_high=high,
        tpr_at_fpr={f"{f:g}": tpr_at(fpr, tpr, f, n_in=n_in, n_out=n_out, confidence=confidence) for f in FPRS},
    )
