"""Numbers and foreign text, made fit for a page.

Names, questions and answers come from data sets and file systems: they may hold markup, control characters, text
direction overrides or ten thousand letters. Markup is the template's matter (autoescape); everything else is here.
"""

import math

from dpaudit.printable import field

# Fit for a page is what is fit for a terminal: `<bdi>` isolates text in HTML, but an SVG title or a document title has
# no such element, so direction characters are shown as what they are.
clean = field


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, without exponent where a reader would not expect one; ∞ for infinity."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−") if value < 0 else f"{mantissa}e{int(exponent)}"
    text = f"{value:,.{max(digits - 1 - size, 0)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent, e.g. 0.8765 -> '87.7 %'."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.{digits}f} %".replace("-", "−")


def confidence(value: float | None) -> str:
    """A confidence level as per cent with as many digits as it needs: 0.95 -> '95 %', 0.98333 -> '98.33 %'."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:.2f}".rstrip("0").rstrip(".")
    return f"{text} %"


def p_value(value: float | None) -> str:
    """A p-value: two significant digits, never a bare 0."""
    if value is None or math.isnan(value):
        return "–"
    return "< 1e-9" if value < 1e-9 else number(value, 2)


def signed(value: float) -> str:
    """A difference of two shares in percentage points without its unit, e.g. -0.0123 -> '−1.2'."""
    return f"{100 * value:+.1f}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, always with its sign."""
    return "–" if value is None or math.isnan(value) else f"{signed(value)} points"


def file_size(count: int) -> str:
    """Bytes as B, kB or MB."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def plural(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
