"""An attack's scores and errors, beside what the claimed mechanism allows: histogram, trade-off curve, log-log ROC.

The claim's curve is the mechanism's own (reports.allowed), not that of one pair (eps, delta), which lies far outside.
No foreign text enters a figure.
"""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Claim, RocPoint, ScoreSummary
from reports import allowed
from reports.plot import Axis, Plot, decades, linear
from reports.text import number, plural

LEGEND = {"guess": "guessing", "claim": "claim", "shown": "evidence", "attack": "attack"}
ERRORS = (0.0, 0.25, 0.5, 0.75, 1.0)


def histogram(summary: ScoreSummary, *, key: str) -> Markup:
    """Scores of canaries that were in training and of those that were not, as shares of each group."""
    groups = (("out", summary.counts_out, summary.n_out), ("in", summary.counts_in, summary.n_in))
    shares = {kind: [100 * count / max(total, 1) for count in counts] for kind, counts, total in groups}
    tallest = max([1.0, *shares["in"], *shares["out"]])
    plot = Plot(
        linear("score, in its own unit (more: in training)", summary.edges[0], summary.edges[-1]),
        linear("share of the group, %", 0.0, 1.05 * tallest),
        [(kind, f"{kind} (n = {total:,})") for kind, _, total in groups],
    )
    for kind, heights in shares.items():
        plot.bars(summary.edges, heights, kind)
    return plot.svg(
        key=key,
        title="Score histogram",
        description=(
            f"Histogram of scores for {plural(summary.n_in, 'canary record')} in training and {summary.n_out:,} "
            f"not in training. Area under the ROC curve {number(summary.auc)}; 0.5 is no better than guessing."
        ),
    )


def tradeoff(summary: ScoreSummary, claim: Claim | None, shown: DpSgd | None, *, key: str) -> Markup:
    """Type II against type I errors: the attack with its band, the claim's curve, which no attack goes below, and the
    curve of the least leaky mechanism of the claimed family that the evidence leaves (`shown`)."""
    grid = np.linspace(0.0, 1.0, 41) ** 2  # the curves bend where type I errors are rare
    plot = Plot(
        Axis("type I error: others called members", 0.0, 1.0, ERRORS),
        Axis("type II error: members missed", 0.0, 1.0, ERRORS),
        _legend(claim, shown),
    )
    plot.line([0, 1], [1, 0], "guess")
    if claim is not None:
        plot.line(grid, 1 - allowed.largest_tpr(claim, grid), "claim")
    if shown is not None:
        plot.line(grid, 1 - accounting.largest_tpr(shown, grid), "shown")
    points = _ordered(summary)
    _band(plot, points, flipped=True)
    plot.stairs([point.fpr for point in points], [1 - point.tpr for point in points], "attack")
    return plot.svg(
        key=key,
        title="Trade-off between the attack's two errors",
        description=(
            "Type II against type I error, both from 0 to 1. The dotted diagonal is guessing; an attack below the "
            f"dashed curve would contradict the claim. Area under the attack's ROC curve {number(summary.auc)}."
        ),
    )


def roc(summary: ScoreSummary, claim: Claim | None, shown: DpSgd | None, *, key: str) -> Markup:
    """ROC on log-log axes with the same curves: what matters at small false positive rates."""
    floor = _floor(summary)
    grid = np.geomspace(floor, 1.0, 41)
    plot = Plot(decades("false positive rate", floor), decades("true positive rate", floor), _legend(claim, shown))
    plot.line([floor, 1], [floor, 1], "guess")
    if claim is not None:
        plot.line(grid, allowed.largest_tpr(claim, grid), "claim")
    if shown is not None:
        plot.line(grid, accounting.largest_tpr(shown, grid), "shown")
    points = _ordered(summary)
    _band(plot, points, flipped=False)
    plot.stairs([point.fpr for point in points], [point.tpr for point in points], "attack")
    return plot.svg(
        key=key,
        title="ROC curve of the attack, both axes logarithmic",
        description=(
            f"True positive rate against false positive rate, from {number(floor, 2)} to 1. A curve on the dotted "
            f"diagonal tells nothing about membership. Area under the curve {number(summary.auc)}."
        ),
    )


def _legend(claim: Claim | None, shown: DpSgd | None) -> list[tuple[str, str]]:
    absent = {"claim"} if claim is None else set()
    absent |= {"shown"} if shown is None else set()
    return [(kind, label) for kind, label in LEGEND.items() if kind not in absent]


def _ordered(summary: ScoreSummary) -> list[RocPoint]:
    return sorted(summary.roc, key=lambda point: (point.fpr, point.tpr))


def _band(plot: Plot, points: Sequence[RocPoint], *, flipped: bool) -> None:
    banded = [point for point in points if point.tpr_low is not None and point.tpr_high is not None]
    lows, highs = [point.tpr_low or 0.0 for point in banded], [point.tpr_high or 0.0 for point in banded]
    if banded:
        if flipped:
            lows, highs = [1 - high for high in highs], [1 - low for low in lows]
        plot.band([point.fpr for point in banded], lows, highs, "attack")


def _floor(summary: ScoreSummary) -> float:
    """The lowest decade that the records can resolve, so that the axes end at round numbers."""
    smallest = 1 / max(summary.n_in, summary.n_out, 10)
    return float(10 ** math.floor(math.log10(smallest) + 1e-9))
