"""Small drawings of evidence: all bounds of a run on one axis, how often a guess is right, and evidence game by game.

Hand-made SVG: a few lines each, colours from the page's style sheet, and every number in words beside its mark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from reports.text import number

WIDTH, LEFT, RIGHT = 320, 6, 312
PITCH, BAR = 31, 20  # of a row, and where its bar lies in it
TICKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Row:
    """One number on the axis. value: of eps; reach: the largest that the test could have shown."""

    kind: Literal["claim", "found", "within"]
    text: str
    value: float
    reach: float | None

    @property
    def short(self) -> str:
        """Beside the mark."""
        if self.kind == "claim":
            return number(self.value)
        could = f" (sees ≤ {number(self.reach)})" if self.reach is not None and math.isfinite(self.reach) else ""
        return f"≥ {number(self.value)}{could}"

    @property
    def said(self) -> str:
        """The same for a screen reader."""
        if self.kind == "claim":
            return number(self.value)
        could = f", could show up to {number(self.reach)}" if self.reach is not None else ""
        return f"at least {number(self.value)}{could}"


def scale_top(values: Sequence[float]) -> float:
    """The end of an axis that holds all finite values."""
    return max([8.0, *(value for value in values if math.isfinite(value))]) * 1.1


def place(epsilon: float, top: float) -> float:
    """Where eps lies on the axis of log2(1 + eps) from 0 to `top`."""
    share = math.log2(1 + max(min(epsilon, top), 0.0)) / math.log2(1 + top)
    return LEFT + (RIGHT - LEFT) * share


def axis(rows: Sequence[Row], top: float, *, key: str) -> Markup:
    """Claim and bounds under each other on one axis; nothing without rows."""
    if not rows:
        return Markup("")
    height = PITCH * len(rows) + 34
    foot = PITCH * len(rows) + 4
    description = "; ".join(f"{row.text} {row.said}" for row in rows)
    parts = [_head("evidence", "Claim and evidence on one axis of eps", f"{description}.", height, key)]
    for row in rows:
        if row.kind == "claim" and math.isfinite(row.value):
            x = place(row.value, top)
            parts.append(f'<path class="claimed" d="M{x:.1f} {BAR - 6}V{foot}"/>')
    for index, row in enumerate(rows):
        parts.append(_row(row, PITCH * index, top))
    ticks = [(f"{place(tick, top):.1f}", tick) for tick in TICKS if tick <= top]
    marks = "".join(f"M{x} {foot}v4" for x, _ in ticks)
    texts = "".join(f'<text x="{x}" y="{foot + 14}">{tick}</text>' for x, tick in ticks)
    parts.append(f'<path class="axis" d="M{LEFT} {foot}H{RIGHT}{marks}"/>')
    parts.append(f'<g class="tick" text-anchor="middle">{texts}</g>')
    parts.append(f'<text class="tick" x="{RIGHT}" y="{foot + 25}" text-anchor="end">eps: more leaks →</text>')
    return Markup("".join(parts) + "</svg>")


def _row(row: Row, y: int, top: float) -> str:
    bar, x = y + BAR, place(row.value, top)
    drawn = (
        f'<text class="label" x="{LEFT}" y="{y + 11}">{escape(row.text)}</text>'
        f'<text class="value" x="{RIGHT}" y="{y + 11}" text-anchor="end">{escape(row.short)}</text>'
    )
    if row.kind == "claim":
        return (
            drawn
            + f'<path class="allowed" d="M{LEFT} {bar}H{x:.1f}"/><path class="claimend" d="M{x:.1f} {bar - 6}v12"/>'
        )
    if row.reach is not None:
        end = place(row.reach, top)
        drawn += f'<path class="reach" d="M{LEFT} {bar}H{end:.1f}"/>'
        drawn += f'<path class="limit" d="M{end:.1f} {bar - 5}v10"/>' if math.isfinite(row.reach) else ""
    if row.value > 0:
        drawn += f'<path class="{row.kind}" d="M{LEFT} {bar}H{x:.1f}"/>'
    shape = f"M{x - 4:.1f} {bar - 6}L{x + 5:.1f} {bar}L{x - 4:.1f} {bar + 6}Z"  # points to more: at least
    if row.kind == "within":
        shape = f"M{x:.1f} {bar - 6}l6 6l-6 6l-6 -6Z"
    return drawn + f'<path class="tip-{row.kind}" d="{shape}"/>'


def guess_bar(share: float) -> Markup:
    """Right guesses in 100, with the coin's 50 marked; hidden from screen readers, the sentence beside it says it."""
    x = 2 + 196 * share
    return Markup(
        '<svg class="guess" aria-hidden="true" viewBox="0 0 200 26"><path class="track" d="M2 8H198"/>'
        f'<path class="right" d="M2 8H{x:.1f}"/><path class="coin" d="M100 2V14"/>'
        '<text x="100" y="24" text-anchor="middle">coin 50</text><text x="2" y="24">0</text>'
        '<text x="198" y="24" text-anchor="end">100</text></svg>'
    )


@dataclass(frozen=True)
class Step:
    """The evidence after one game. product: log of all so far; twin: what was attacked was no released weights."""

    name: str
    product: float
    twin: bool


FEWEST, MOST = -3.0, 9.0  # powers of ten between which evidence is told apart


def growth(steps: Sequence[Step], threshold: float, *, key: str) -> Markup:
    """Evidence game by game as a staircase of powers of ten, with the line from which the claim is refuted.

    threshold: its log. Beyond the ends a mark lies on the edge; its number is beside it all the same.
    """
    if not steps:
        return Markup("")
    tens = [min(max(step.product / math.log(10), FEWEST), MOST) for step in steps]
    line = threshold / math.log(10)
    low, high = math.floor(min([-1.0, *tens])), math.ceil(max([line + 0.5, *tens]))
    top, foot, left, right = 16, 112, 46, WIDTH - 16

    def y(power: float) -> float:
        return foot - (foot - top) * (power - low) / (high - low)

    def x(index: int) -> float:
        return left + (right - left) * (index + 0.5) / len(steps)

    said = "; ".join(f"{step.name}: {factor(step.product)}" for step in steps)
    limit = f"{math.exp(threshold):,.0f}"
    title = "Evidence against the claim, game by game"
    parts = [_head("growth", title, f"{said}. The claim is refuted from {limit} on.", foot + 32, key)]
    powers = range(low, high + 1, max(1, (high - low) // 4))
    grid = "".join(f"M{left} {y(power):.1f}H{right}" for power in powers)
    texts = "".join(f'<text x="{left - 5}" y="{y(power) + 3:.1f}">{_tens_of(power)}</text>' for power in powers)
    parts.append(f'<path class="grid" d="{grid}"/><g class="tick" text-anchor="end">{texts}</g>')
    parts.append(f'<path class="refuted" d="M{left} {y(line):.1f}H{right}"/>')
    parts.append(f'<text class="value" x="{right}" y="{y(line) - 4:.1f}" text-anchor="end">refuted from {limit}</text>')
    stairs = f"M{left} {y(0):.1f}" + "".join(f"H{x(i):.1f}V{y(ten):.1f}" for i, ten in enumerate(tens)) + f"H{right}"
    parts.append(f'<path class="stairs" d="{stairs}"/>')
    for index, (step, ten) in enumerate(zip(steps, tens, strict=True)):
        at, height = x(index), y(ten)
        shape = f"M{at - 4.5:.1f} {height - 4.5:.1f}h9v9h-9Z" if step.twin else _disc(at, height)
        parts.append(f'<path class="mark" d="{shape}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{foot + 14}" text-anchor="middle">{index + 1}</text>')
    parts.append(f'<text class="tick" x="{(left + right) / 2:.0f}" y="{foot + 28}" text-anchor="middle">game</text>')
    return Markup("".join(parts) + "</svg>")


def _disc(x: float, y: float) -> str:
    return f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"


def _tens_of(power: float) -> str:
    return f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:g}"


def factor(log: float) -> str:
    """Evidence as a number: 0.5, 1,000, 10^12."""
    if log == -math.inf:
        return "0"
    return number(math.exp(log), 2) if abs(log) < 14 else f"10^{log / math.log(10):.0f}"


def _head(kind: str, title: str, description: str, height: float, key: str) -> str:
    return (
        f'<svg role="img" class="figure {kind}" aria-labelledby="{key}-t {key}-d" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}"><title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(description)}</desc>'
    )
