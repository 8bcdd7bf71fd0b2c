"""Text that somebody else wrote, made fit to be printed: one line, nothing that moves a cursor or turns a line round.

Names, units and explanations come from data sets, documents and folders that were handed over. Printed as they are,
escape sequences and newlines can paint a verdict that nobody gave, and direction overrides can turn the order of words
round. Everything that a command prints goes through `line` (dpaudit.cli.console), and what comes from elsewhere
through `field` as well, so that no amount of blanks wraps it into a line of its own.
"""

import unicodedata

MOST = 4000  # characters of a printed line
UNSEEN = "\ufffd"
_JOINERS = "\u200c\u200d"  # scripts need them, and they move nothing


def visible(character: str) -> str:
    """A character as it may be shown: white space as a blank, what is not seen or changes its surroundings as U+FFFD.

    The latter: control, format and direction characters, surrogates, line separators and code points without meaning.
    """
    if " " <= character <= "~":
        return character
    if character.isspace():
        return " "
    point = ord(character)
    noncharacter = 0xFDD0 <= point <= 0xFDEF or point & 0xFFFE == 0xFFFE
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return UNSEEN if noncharacter or hidden else character


def line(text: str, limit: int = MOST) -> str:
    """One line of at most `limit` characters (plus a note of the true length); blanks stay, for columns."""
    shown = "".join(visible(character) for character in text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[:limit]} … ({len(text):,} characters)"


def field(text: str, limit: int = 200) -> str:
    """A part of a line: at most `limit` characters (plus a note of the true length), runs of white space as one."""
    shown = " ".join("".join(visible(character) for character in text[: 4 * limit]).split())
    if len(shown) > limit or len(text) > 4 * limit:
        return f"{shown[:limit].rstrip()} … ({len(text):,} characters)"
    return shown


def json_text(text: str) -> str:
    """JSON whose strings hold visible characters only: the others as escapes, which mean the same."""
    return "".join(c if c == "\n" or visible(c) == c else _escape(c) for c in text)


def _escape(character: str) -> str:
    point = ord(character)
    if point < 0x10000:
        return f"\\u{point:04x}"
    point -= 0x10000
    return f"\\u{0xD800 + (point >> 10):04x}\\u{0xDC00 + (point & 0x3FF):04x}"
