"""The report's figures: score histograms, log-log ROC, the privacy-utility frontier, training curves.

No foreign text enters a figure: runs are called by their letter, and the page explains the letters beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dpaudit.documents import Claim, Metric, RocPoint, ScoreSummary
from reports.inputs import Curve
from reports.svg import PALETTE, SETTINGS, StyleSheet, inline_svg
from reports.text import number, percent, plural

SIZE = (4.6, 3.1)  # inches of 72 points: small enough that the letters stay readable on a telephone
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class FrontierPoint:
    """One run or configuration in the frontier: what it claims, what was audited, and how well it answers.

    `claimed` is math.inf without a claim; `audited` holds the headline bounds, one for each audited training. Points of
    one `series` share colour and mark, and are joined in the order of their claims.
    """

    key: str
    claimed: float
    audited: tuple[float, ...]
    accuracy: Metric
    series: str


def style(index: int) -> tuple[str, str]:
    """Colour and mark of the series at this place: 36 different pairs before one comes back."""
    return SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def _axes(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def histogram(summary: ScoreSummary, *, key: str, styles: StyleSheet) -> Markup:
    """Scores of canaries that were in training and of those that were not, as shares of each group."""
    with rc_context(SETTINGS):
        figure, axes = _axes()
        for counts, total, role, dash, label in (
            (summary.counts_out, summary.n_out, "out", (0, (4, 2)), "out: not in training"),
            (summary.counts_in, summary.n_in, "in", "solid", "in: in training"),
        ):
            shares = [100 * count / max(total, 1) for count in counts]
            axes.stairs(shares, summary.edges, fill=True, color=PALETTE[role], alpha=0.18, linewidth=0)
            axes.stairs(shares, summary.edges, color=PALETTE[role], linestyle=dash, linewidth=1.6, label=label)
        axes.set_xlabel("score (higher = more like training data)")
        axes.set_ylabel("share of the group, %")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        figure.legend(loc="outside upper center", ncols=2)
        return inline_svg(
            figure,
            key=key,
            title="Score histogram",
            description=(
                f"Histogram of scores for {plural(summary.n_in, 'canary record')} in training and {summary.n_out:,} "
                f"not in training. Area under the ROC curve {number(summary.auc)}; 0.5 is no better than guessing."
            ),
            styles=styles,
        )


def roc(summary: ScoreSummary, claim: Claim | None, *, key: str, styles: StyleSheet) -> Markup:
    """ROC on log-log axes with simultaneous limits and the largest rates that the claim allows.

    An (eps, delta)-DP mechanism allows TPR <= e^eps FPR + delta and 1 - FPR <= e^eps (1 - TPR) + delta
    (Kairouz, Oh, Viswanath 2015, theorem 2.1).
    """
    floor = _roc_floor(summary)
    points = _thinned(sorted(summary.roc, key=lambda point: (point.fpr, point.tpr)), floor)
    with rc_context(SETTINGS):
        figure, axes = _axes()
        grid = [floor ** (1 - i / 60) for i in range(61)]
        axes.plot(grid, grid, color=PALETTE["soft"], linestyle=(0, (1, 2)), linewidth=1.2, label="guessing")
        if claim is not None and math.isfinite(claim.epsilon):
            allowed = [allowed_tpr(rate, claim.epsilon, claim.delta) for rate in grid]
            axes.plot(grid, allowed, color=PALETTE["out"], linestyle=(0, (6, 2)), linewidth=1.2, label="claim allows")
        banded = [p for p in points if p.tpr_low is not None and p.tpr_high is not None]
        if banded:
            axes.fill_between(
                [max(p.fpr, floor) for p in banded],
                [max(p.tpr_low or 0.0, floor) for p in banded],
                [max(p.tpr_high or 0.0, floor) for p in banded],
                step="post",
                color=PALETTE["in"],
                alpha=0.18,
                linewidth=0,
            )
        axes.plot(
            [
                max(p.fpr, floor) for p in points
            ],  # rates of 0 lie on the edge, where a reader expects the curve to begin
            [max(p.tpr, floor) for p in points],
            drawstyle="steps-post",
            color=PALETTE["in"],
            linewidth=1.8,
            label="attack",
        )
        _log_axes(axes, floor)
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        figure.legend(loc="outside upper center", ncols=3)
        return inline_svg(
            figure,
            key=key,
            title="ROC curve of the attack, both axes logarithmic",
            description=(
                f"True positive rate against false positive rate, from {number(floor, 2)} to 1. A curve on the dotted "
                f"diagonal tells nothing about membership. Area under the curve {number(summary.auc)}."
            ),
            styles=styles,
        )


def _thinned(points: Sequence[RocPoint], floor: float) -> list[RocPoint]:
    """The points that a reader can tell apart: at least 1/150 of an axis from the last one kept."""

    def place(point: RocPoint) -> tuple[float, float]:
        scale = -math.log10(floor)
        return math.log10(max(point.fpr, floor)) / scale, math.log10(max(point.tpr, floor)) / scale

    kept: list[RocPoint] = []
    for index, point in enumerate(points):
        last = index == len(points) - 1
        if last or not kept or max(abs(a - b) for a, b in zip(place(point), place(kept[-1]), strict=True)) >= 1 / 150:
            kept.append(point)
    return kept


def allowed_tpr(fpr: float, epsilon: float, delta: float) -> float:
    """The largest true positive rate that an (eps, delta)-DP mechanism allows at this false positive rate."""
    rising = math.exp(min(epsilon, 700.0)) * fpr + delta
    closing = 1 - math.exp(-epsilon) * max(1 - fpr - delta, 0.0)
    return min(rising, closing, 1.0)


def _roc_floor(summary: ScoreSummary) -> float:
    """The lowest decade that the records can resolve, so that the axes end at round numbers."""
    smallest = 1 / max(summary.n_in, summary.n_out, 10)
    return float(10 ** math.floor(math.log10(smallest) + 1e-9))


def _log_axes(axes: Axes, floor: float) -> None:
    ticks = [10.0**power for power in range(round(math.log10(floor)), 1)]
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value), 1)))
    axes.set_xlim(floor, 1.06)
    axes.set_ylim(floor, 1.06)


def frontier(
    points: Sequence[FrontierPoint],
    base: Metric | None,
    *,
    measure: str = "exact match",
    key: str,
    styles: StyleSheet,
) -> Markup:
    """Accuracy (called `measure`) against eps: filled marks at the claims, open triangles at audited lower bounds.

    The eps axis is log2(1 + eps), so that a bound of 0 has its place; no claim stands at the right, beyond a gap.
    """
    finite = [point.claimed for point in points if math.isfinite(point.claimed)]
    finite += [bound for point in points for bound in point.audited if math.isfinite(bound)]
    top = math.log2(1 + max(finite, default=8.0))
    infinity = max(top, 2.0) + 1.1
    with rc_context(SETTINGS):
        figure, axes = _axes(5.4, 3.6)
        series = list(dict.fromkeys(point.series for point in points))
        places = {point.key: _dodged(points, index, infinity) for index, point in enumerate(points)}
        for index, name in enumerate(series):
            mine = sorted((p for p in points if p.series == name), key=lambda p: p.claimed)
            line = [(places[p.key], 100 * p.accuracy.value) for p in mine if math.isfinite(p.claimed)]
            axes.plot([x for x, _ in line], [y for _, y in line], color=PALETTE[style(index)[0]], alpha=0.5)
            for point in mine:
                _frontier_run(axes, point, index, places[point.key], infinity)
        if base is not None:
            axes.axhline(100 * base.value, color=PALETTE["soft"], linestyle=(0, (1, 2)), linewidth=1.2)
        ticks = [0.0, 1.0, 3.0] + [eps for eps in (8.0, 16.0, 32.0, 64.0, 128.0) if math.log2(1 + eps) <= top + 0.2]
        axes.xaxis.set_major_locator(FixedLocator([*(math.log2(1 + eps) for eps in ticks), infinity]))
        labels = {**{round(math.log2(1 + eps), 6): number(eps) for eps in ticks}, round(infinity, 6): "no claim"}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(round(float(value), 6), "")))
        axes.set_xlim(-0.2, infinity + 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.margins(y=0.14)
        axes.set_xlabel("eps (smaller = more private)")
        axes.set_ylabel(f"{measure}, %")
        return inline_svg(
            figure,
            key=key,
            title="Privacy-utility frontier",
            description=(
                f"{measure.capitalize()} with 95 % intervals against eps for {plural(len(points), 'configuration')}. "
                "Filled marks stand at the claimed eps, open triangles at audited lower bounds; no claim at the right."
                + (f" The dotted line is the base model, {percent(base.value)}." if base is not None else "")
            ),
            styles=styles,
        )


def _frontier_run(axes: Axes, point: FrontierPoint, index: int, x: float, infinity: float) -> None:
    role, marker = style(index)
    color = PALETTE[role]
    y = 100 * point.accuracy.value
    low, high = point.accuracy.low, point.accuracy.high
    if low is not None and high is not None:
        axes.vlines(x, 100 * low, 100 * high, color=color, linewidth=1.4)
    for audited in point.audited:
        bound = math.log2(1 + audited) if math.isfinite(audited) else infinity
        axes.plot([bound, x], [y, y], color=color, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.plot(bound, y, marker=">", markersize=6.5, markerfacecolor="none", markeredgecolor=color, color=color)
    axes.plot(x, y, marker=marker, markersize=7, color=color)
    axes.annotate(
        point.key,
        (x, y if high is None else 100 * high),
        xytext=(0, 8 if high is None else 4),
        textcoords="offset points",
        ha="center",
        fontweight="bold",
        color=PALETTE["ink"],
    )


def _dodged(points: Sequence[FrontierPoint], index: int, infinity: float) -> float:
    """Runs that share an eps stand side by side: the intervals would hide each other."""
    claimed = points[index].claimed
    peers = [i for i, point in enumerate(points) if point.claimed == claimed]
    shift = (peers.index(index) - (len(peers) - 1) / 2) * min(0.28, 0.9 / max(len(peers), 1))
    return (math.log2(1 + claimed) if math.isfinite(claimed) else infinity) + shift


def curve(data: Curve, *, key: str, styles: StyleSheet) -> Markup:
    """One training curve by step."""
    finite = [(s, v) for s, v in zip(data.steps, data.values, strict=True) if math.isfinite(v)]
    with rc_context(SETTINGS):
        figure, axes = _axes(3.4, 2.3)
        axes.plot([s for s, _ in finite], [v for _, v in finite], color=PALETTE["in"], linewidth=1.4)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        last = number(finite[-1][1]) if finite else "not known"
        return inline_svg(
            figure,
            key=key,
            title="Training curve",
            description=f"A value by training step; the last one is {last}.",
            styles=styles,
        )


def describe_interval(metric: Metric) -> str:
    """`87.6 % (85.9 to 89.2)`."""
    if metric.low is None or metric.high is None:
        return percent(metric.value)
    return f"{percent(metric.value)} ({100 * metric.low:.1f} to {100 * metric.high:.1f})"


_MARKS = {
    "o": '<circle cx="6" cy="6" r="4.6"/>',
    "s": '<path d="M1.8 1.8H10.2V10.2H1.8Z"/>',
    "^": '<path d="M6 1L11 10.5H1Z"/>',
    "D": '<path d="M6 .8L11.2 6L6 11.2L.8 6Z"/>',
    "v": '<path d="M1 1.5H11L6 11Z"/>',
    "P": '<path d="M4.2 1H7.8V4.2H11V7.8H7.8V11H4.2V7.8H1V4.2H4.2Z"/>',
}


def legend_mark(index: int) -> Markup:
    """The mark of the run at this place of the frontier, as a tiny decorative SVG."""
    role, marker = style(index)
    return Markup(f'<svg class="m-{role}" aria-hidden="true" viewBox="0 0 12 12">{_MARKS[marker]}</svg>')


BASE_MARK = Markup('<svg class="m-base" aria-hidden="true" viewBox="0 0 12 12"><path d="M0 6H12"/></svg>')
