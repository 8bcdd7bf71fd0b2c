"""A small frame for curves: axes with ticks, lines, stairs and bands as inline SVG in the page's own colours.

Each mark has a kind, whose colour and dashes are the style sheet's (`.k-claim`, `.k-attack`, …); nothing is styled in
place, so that the page's CSP can forbid it. Texts are the caller's own words, never foreign text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from reports.text import number

Values = Sequence[float] | npt.NDArray[np.float64]

WIDTH, HEIGHT = 320, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 312, 24, 206  # of the frame
LETTER = 5.6  # pixels of a letter in the legend, on the wide side
NEAR, BAND_NEAR = 2.0, 5.0  # pixels: a point nearer to the last one can hardly be told from it


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, linear or logarithmic, with ticks at these values; `names` are theirs, else the numbers."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    names: Sequence[str] = ()

    def named(self) -> list[tuple[float, str]]:
        """Ticks with what stands beside them."""
        return list(zip(self.ticks, self.names or [number(tick, 2) for tick in self.ticks], strict=True))

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1; values beyond the ends lie on them."""
        kept = min(max(value, self.low), self.high)
        if self.log:
            return math.log(kept / self.low) / math.log(self.high / self.low)
        return (kept - self.low) / (self.high - self.low)


def decades(label: str, low: float) -> Axis:
    """A logarithmic axis from a power of ten to 1."""
    return Axis(label, low, 1.0, [10.0**power for power in range(round(math.log10(low)), 1)], log=True)


def linear(label: str, low: float, high: float) -> Axis:
    """A linear axis with about five ticks at round numbers."""
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (factor * step) <= 5)
    first = math.ceil(low / step - 1e-9)
    return Axis(label, low, high, [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)])


@dataclass
class Plot:
    """One frame. Marks are drawn in the order in which they are added; `legend` holds (kind, label)."""

    x: Axis
    y: Axis
    legend: Sequence[tuple[str, str]] = ()
    parts: list[str] = field(default_factory=list)

    def line(self, xs: Values, ys: Values, kind: str) -> None:
        """A polyline through the points."""
        self.parts.append(f'<path class="line k-{kind}" d="{_path(self._points(xs, ys))}"/>')

    def stairs(self, xs: Values, ys: Values, kind: str) -> None:
        """A curve that keeps each value until the next point."""
        self.parts.append(f'<path class="line k-{kind}" d="{_stairs(self._points(xs, ys))}"/>')

    def band(self, xs: Values, lows: Values, highs: Values, kind: str) -> None:
        """The area between two curves."""
        above, below = self._points(xs, highs, BAND_NEAR), self._points(xs, lows, BAND_NEAR)
        drawn = f"{_path(above, 0)}L{_path(below[::-1], 0)[1:]}Z"
        self.parts.append(f'<path class="area k-{kind}" d="{drawn}"/>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], kind: str) -> None:
        """A histogram's outline and area: heights (k,) between edges (k + 1,)."""
        foot = self._y(self.y.low)
        drawn = f"M{self._x(edges[0]):.1f} {foot:.1f}"
        for right, height in zip(edges[1:], heights, strict=True):
            drawn += f"V{self._y(height):.1f}H{self._x(right):.1f}"
        drawn += f"V{foot:.1f}"
        self.parts.append(f'<path class="area k-{kind}" d="{drawn}Z"/><path class="line k-{kind}" d="{drawn}"/>')

    def mark(self, x: float, y: float, shape: str, kind: str) -> None:
        """A mark of 12 by 12 pixels: the content of an SVG of that size, its middle at the point."""
        place = f"translate({self._x(x) - 6:.1f} {self._y(y) - 6:.1f})"
        self.parts.append(f'<g class="{kind}" transform="{place}">{shape}</g>')

    def letters(self, x: float, y: float, text: str) -> None:
        """Bold letters over a point."""
        place = f'x="{self._x(x):.1f}" y="{self._y(y) - 5:.1f}"'
        self.parts.append(f'<text class="letters" {place} text-anchor="middle">{escape(text)}</text>')

    def svg(self, *, key: str, title: str, description: str) -> Markup:
        """The drawing; `key` must be unique on the page."""
        head = (
            f'<svg role="img" class="figure plot" aria-labelledby="{key}-t {key}-d" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}"><title id="{key}-t">{escape(title)}</title>'
            f'<desc id="{key}-d">{escape(description)}</desc>'
        )
        return Markup(head + self._frame() + "".join(self.parts) + self._legend() + "</svg>")

    def _x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * self.x.share(value)

    def _y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * self.y.share(value)

    def _points(self, xs: Values, ys: Values, near: float = NEAR) -> list[tuple[float, float]]:
        """In pixels, without those that a reader can't tell from the one before; the last one stays."""
        kept: list[tuple[float, float]] = []
        points = [(self._x(float(x)), self._y(float(y))) for x, y in zip(xs, ys, strict=True)]
        for index, (x, y) in enumerate(points):
            if not kept or index == len(points) - 1 or max(abs(x - kept[-1][0]), abs(y - kept[-1][1])) >= near:
                kept.append((x, y))
        return kept

    def _frame(self) -> str:
        grid, texts = "", ""
        for tick, name in self.x.named():
            grid += f"M{self._x(tick):.1f} {TOP}V{BOTTOM}"
            texts += f'<text x="{self._x(tick):.1f}" y="{BOTTOM + 14}" text-anchor="middle">{escape(name)}</text>'
        for tick, name in self.y.named():
            grid += f"M{LEFT} {self._y(tick):.1f}H{RIGHT}"
            texts += f'<text x="{LEFT - 5}" y="{self._y(tick) + 3.5:.1f}" text-anchor="end">{escape(name)}</text>'
        across, up = (LEFT + RIGHT) // 2, (TOP + BOTTOM) // 2
        return (
            f'<path class="grid" d="{grid}"/><path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>{texts}'
            f'<text class="name" x="{across}" y="{BOTTOM + 32}" text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text class="name" transform="translate(11 {up}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text>"
        )

    def _legend(self) -> str:
        drawn, x = "", float(LEFT)
        for kind, label in self.legend:
            drawn += f'<path class="line k-{kind}" d="M{x:.0f} 10h16"/>'
            drawn += f'<text x="{x + 20:.0f}" y="13.5">{escape(label)}</text>'
            x += 32 + LETTER * len(label)
        return drawn


def _path(points: Sequence[tuple[float, float]], digits: int = 1) -> str:
    return "M" + " ".join(f"{x:.{digits}f} {y:.{digits}f}" for x, y in points)


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = points
    drawn = f"M{x:.1f} {y:.1f}"
    for right, next_y in rest:
        drawn += f"H{right:.1f}V{next_y:.1f}"
    return drawn
