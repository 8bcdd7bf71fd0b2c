"""A small frame for curves: axes with ticks, lines, stairs and bands as inline SVG in the page's own colours.

Each mark has a kind, whose colour and dashes are the style sheet's (`.k-claim`, `.k-attack`, …); nothing is styled in
place, so that the page's CSP can forbid it. Texts are the caller's own words, never foreign text.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from reports.text import number

Values = Sequence[float] | npt.NDArray[np.float64]

WIDTH, HEIGHT = 320, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 312, 24, 206  # of the frame
LETTER = 5.6  # pixels of a letter in the legend, on the wide side
NEAR, BAND_NEAR = 2.0, 5.0  # pixels: a point nearer to the last one can hardly be told from it
END_OF_FRAME = "<!--frame-->"  # taken out again by `shared_frames`
OFF = 0.2  # pixels that a smooth curve may be off where points between two others are left out


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
        self.parts.append(f'<path class="line k-{kind}" d="{_path(_thinned(self._points(xs, ys)))}"/>')

    def stairs(self, xs: Values, ys: Values, kind: str) -> None:
        """A curve that keeps each value until the next point."""
        self.parts.append(f'<path class="line k-{kind}" d="{_path(_corners(self._points(xs, ys)))}"/>')

    def band(self, xs: Values, lows: Values, highs: Values, kind: str) -> None:
        """The area between two curves."""
        above, below = self._points(xs, highs, BAND_NEAR), self._points(xs, lows, BAND_NEAR)
        self.parts.append(f'<path class="area k-{kind}" d="{_path([*above, *below[::-1]], 0)}Z"/>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], kind: str) -> None:
        """A histogram's outline and area: heights (k,) between edges (k + 1,)."""
        foot = self._y(self.y.low)
        corners = [(self._x(edges[0]), foot)]
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            corners += [(self._x(left), self._y(height)), (self._x(right), self._y(height))]
        drawn = _path([*corners, (self._x(edges[-1]), foot)])
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
        grid, below, beside = "", "", ""
        for tick, name in self.x.named():
            x = _short(self._x(tick))
            grid += f"M{x} {TOP}V{BOTTOM}"
            below += f'<text x="{x}" y="{BOTTOM + 14}">{escape(name)}</text>'
        for tick, name in self.y.named():
            grid += f"M{LEFT} {_short(self._y(tick))}H{RIGHT}"
            beside += f'<text x="{LEFT - 5}" y="{_short(self._y(tick) + 3.5)}">{escape(name)}</text>'
        texts = f'<g text-anchor="middle">{below}</g><g text-anchor="end">{beside}</g>'
        across, up = (LEFT + RIGHT) // 2, (TOP + BOTTOM) // 2
        return (
            f'<g class="plot"><path class="grid" d="{grid}"/>'
            f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>{texts}'
            f'<text class="name" x="{across}" y="{BOTTOM + 32}" text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text class="name" transform="translate(11 {up}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text></g>{END_OF_FRAME}"
        )

    def _legend(self) -> str:
        drawn, x = "", float(LEFT)
        for kind, label in self.legend:
            drawn += f'<path class="line k-{kind}" d="M{x:.0f} 10h16"/>'
            drawn += f'<text x="{x + 20:.0f}" y="13.5">{escape(label)}</text>'
            x += 32 + LETTER * len(label)
        return drawn


def shared_frames(page: str) -> str:
    """A page on which frames that are alike are drawn once, and referred to from the other figures."""
    seen: dict[str, str] = {}

    def first_or_same(match: re.Match[str]) -> str:
        frame = match[1]
        if frame in seen:
            return f'<use href="#{seen[frame]}"/>'
        seen[frame] = f"frame-{len(seen)}"
        return f'<g id="{seen[frame]}"{frame.removeprefix("<g")}'

    return re.sub(rf'(<g class="plot"><path class="grid".*?</g>){END_OF_FRAME}', first_or_same, page)


def _short(value: float, digits: int = 1) -> str:
    """A number of pixels in as few characters as SVG allows."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return {"-0": "0"}.get(text, text.replace("-0.", "-.") if text.startswith("-0.") else text.removeprefix("0") or "0")


def _path(points: Sequence[tuple[float, float]], digits: int = 1) -> str:
    """Lines through points, as steps from each to the next; rounding does not add up. Straight steps become one."""
    unit = 10**digits
    grid = [(round(x * unit), round(y * unit)) for x, y in points]
    steps: list[tuple[int, int]] = []
    for (x, y), (next_x, next_y) in pairwise(grid):
        across, up = next_x - x, next_y - y
        if not across and not up:
            continue
        if steps and _straight_on(steps[-1], (across, up)):
            across, up = across + steps[-1][0], up + steps[-1][1]
            steps.pop()
        steps.append((across, up))
    drawn, last = f"M{_short(grid[0][0] / unit, digits)} {_short(grid[0][1] / unit, digits)}", "M"
    for across, up in steps:
        kind = "h" if not up else "v" if not across else "l"
        numbers = [_short(value / unit, digits) for value in ((across, up) if kind == "l" else (across or up,))]
        text = numbers[0] + "".join(value if value.startswith("-") else f" {value}" for value in numbers[1:])
        same = kind == last == "l"
        drawn += (text if text.startswith("-") else f" {text}") if same else f"{kind}{text}"
        last = kind
    return drawn


def _straight_on(one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Whether two steps go the same way along one axis."""
    return (one[0] == two[0] == 0 and one[1] * two[1] > 0) or (one[1] == two[1] == 0 and one[0] * two[0] > 0)


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a staircase that goes across first, then up or down."""
    found = [points[0]]
    for x, y in points[1:]:
        found += [(x, found[-1][1]), (x, y)]
    return found


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without points that lie within OFF of the line between those that are kept (Ramer 1972, Douglas-Peucker 1973)."""
    kept, waiting = {0, len(points) - 1}, [(0, len(points) - 1)]
    while waiting:
        first, last = waiting.pop()
        far = max(
            range(first + 1, last), key=lambda at: _distance(points[at], points[first], points[last]), default=None
        )
        if far is not None and _distance(points[far], points[first], points[last]) > OFF:
            kept.add(far)
            waiting += [(first, far), (far, last)]
    return [points[at] for at in sorted(kept)]


def _distance(point: tuple[float, float], one: tuple[float, float], two: tuple[float, float]) -> float:
    """Of a point from the line through two others."""
    along, up = two[0] - one[0], two[1] - one[1]
    length = math.hypot(along, up)
    if length == 0:
        return math.dist(point, one)
    return abs(along * (point[1] - one[1]) - up * (point[0] - one[0])) / length
