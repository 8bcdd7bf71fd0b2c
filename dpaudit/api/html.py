"""Results as HTML for notebooks: one small table, every text escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from dpaudit.printable import field

MOST = 600  # characters of one cell
COLOURS = {"refuted": "#b3261e", "unsupported": "#b3261e", "invalid": "#b3261e", "fail": "#b3261e"}


def table(title: str, rows: Mapping[str, object], notes: Sequence[str] = ()) -> str:
    """A heading, names beside values, and sentences below."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{_text(name)}</th><td style='text-align:left'>{_text(value)}</td></tr>"
        for name, value in rows.items()
    )
    below = "".join(f"<div>{_text(note)}</div>" for note in notes)
    return f"<div><strong>{_text(title)}</strong><table>{cells}</table>{below}</div>"


def verdict(title: str, word: str, rows: Mapping[str, object], notes: Sequence[str] = ()) -> str:
    """The same with a verdict in the heading."""
    colour = COLOURS.get(word, "inherit")
    head = f"<div><strong>{_text(title)}: <span style='color:{colour}'>{_text(word)}</span></strong></div>"
    return head + table("", rows, notes).replace("<strong></strong>", "", 1)


def _text(value: object) -> str:
    return escape(field(str(value), MOST))
