"""The privacy-utility frontier and training curves.

No foreign text enters a figure: runs are called by their letter, and the page explains the letters beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpaudit.documents import Metric
from reports.inputs import Curve
from reports.plot import Axis, Plot, linear
from reports.text import number, percent, plural

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


def frontier(points: Sequence[FrontierPoint], base: Metric | None, *, measure: str = "exact match", key: str) -> Markup:
    """Accuracy (called `measure`) against eps: filled marks at the claims, open triangles at audited lower bounds.

    The eps axis is log2(1 + eps), so that a bound of 0 has its place; no claim stands at the right, beyond a gap.
    """
    finite = [point.claimed for point in points if math.isfinite(point.claimed)]
    finite += [bound for point in points for bound in point.audited if math.isfinite(bound)]
    top = math.log2(1 + max(finite, default=8.0))
    infinity = max(top, 2.0) + 1.1
    ticks = [0.0, 1.0, 3.0] + [eps for eps in (8.0, 16.0, 32.0, 64.0, 128.0) if math.log2(1 + eps) <= top + 0.2]
    values = [v for p in points for v in (p.accuracy.value, p.accuracy.low, p.accuracy.high) if v is not None]
    values += [base.value] if base is not None else []
    room = 0.14 * max(max(values) - min(values), 0.02)
    plot = Plot(
        Axis(
            "eps (smaller = more private)",
            -0.2,
            infinity + 0.5,
            [*(math.log2(1 + eps) for eps in ticks), infinity],
            names=[*(number(eps) for eps in ticks), "no claim"],
        ),
        linear(f"{measure}, %", 100 * (min(values) - room), 100 * (max(values) + room)),
    )
    series = list(dict.fromkeys(point.series for point in points))
    places = {point.key: _dodged(points, index, infinity) for index, point in enumerate(points)}
    if base is not None:
        plot.line([-0.2, infinity + 0.5], [100 * base.value] * 2, "guess")
    for index, name in enumerate(series):
        mine = sorted((p for p in points if p.series == name), key=lambda p: p.claimed)
        joined = [(places[p.key], 100 * p.accuracy.value) for p in mine if math.isfinite(p.claimed)]
        if len(joined) > 1:
            plot.line([x for x, _ in joined], [y for _, y in joined], f"thin k-{style(index)[0]}")
        for point in mine:
            _frontier_run(plot, point, index, places[point.key], infinity)
    return plot.svg(
        key=key,
        title="Privacy-utility frontier",
        description=(
            f"{measure.capitalize()} with 95 % intervals against eps for {plural(len(points), 'configuration')}. "
            "Filled marks stand at the claimed eps, open triangles at audited lower bounds; no claim at the right."
            + (f" The dotted line is the base model, {percent(base.value)}." if base is not None else "")
        ),
    )


def _frontier_run(plot: Plot, point: FrontierPoint, index: int, x: float, infinity: float) -> None:
    role, marker = style(index)
    y, low, high = 100 * point.accuracy.value, point.accuracy.low, point.accuracy.high
    if low is not None and high is not None:
        plot.line([x, x], [100 * low, 100 * high], role)
    for audited in point.audited:
        bound = math.log2(1 + audited) if math.isfinite(audited) else infinity
        plot.line([bound, x], [y, y], f"thin dashed k-{role}")
        plot.mark(bound, y, _OPEN, f"open k-{role}")
    plot.mark(x, y, _MARKS[marker], f"m-{role}")
    plot.letters(x, y if high is None else 100 * high, point.key)


def _dodged(points: Sequence[FrontierPoint], index: int, infinity: float) -> float:
    """Runs that share an eps stand side by side: the intervals would hide each other."""
    claimed = points[index].claimed
    peers = [i for i, point in enumerate(points) if point.claimed == claimed]
    shift = (peers.index(index) - (len(peers) - 1) / 2) * min(0.28, 0.9 / max(len(peers), 1))
    return (math.log2(1 + claimed) if math.isfinite(claimed) else infinity) + shift


def curve(data: Curve, *, key: str) -> Markup:
    """One training curve by step."""
    finite = [(s, v) for s, v in zip(data.steps, data.values, strict=True) if math.isfinite(v)]
    steps, values = [s for s, _ in finite] or [0.0], [v for _, v in finite] or [0.0]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    plot = Plot(linear("step", min(steps), max(steps, default=1.0) + 1e-9), linear("value", low - room, high + room))
    plot.line(steps, values, "attack")
    last = number(values[-1]) if finite else "not known"
    return plot.svg(key=key, title="Training curve", description=f"A value by training step; the last one is {last}.")


def describe_interval(metric: Metric) -> str:
    """`87.6 % (85.9 to 89.2)`."""
    if metric.low is None or metric.high is None:
        return percent(metric.value)
    return f"{percent(metric.value)} ({100 * metric.low:.1f} to {100 * metric.high:.1f})"


_OPEN = '<path d="M2 1L10.5 6L2 11Z"/>'
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
