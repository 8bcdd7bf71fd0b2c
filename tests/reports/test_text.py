"""Numbers and foreign text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (8.0, "8"),
        (0.71342, "0.713"),
        (2980.958, "2,981"),
        (99999.0, "99,999"),
        (1234567.0, "1.23e6"),
        (1e-5, "1e-5"),
        (3.2e-7, "3.2e-7"),
        (0.001, "0.001"),
        (-0.25, "−0.25"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
        (9.999, "10"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


@given(st.floats(min_value=-1e12, max_value=1e12, allow_nan=False))
def test_numbers_keep_three_digits(value: float) -> None:
    read = float(text.number(value).replace(",", "").replace("−", "-"))
    assert read == pytest.approx(value, rel=5e-3, abs=1e-300)


def test_small_things() -> None:
    assert text.confidence(0.95) == "95 %" and text.confidence(0.983333) == "98.33 %"
    assert text.p_value(0.0) == "< 1e-9" and text.p_value(0.0213) == "0.021"
    assert text.percent(0.8765) == "87.6 %" or text.percent(0.8765) == "87.7 %"
    assert text.plural(1, "run") == "1 run" and text.plural(3, "run") == "3 runs"
    assert text.file_size(999) == "999 B" and text.file_size(12_345) == "12.3 kB"


@given(st.text(max_size=300))
def test_cleaned_text_holds_nothing_invisible(value: str) -> None:
    shown = text.clean(value)
    assert "\n" not in shown and not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert not any(c in shown for c in "\u202e\u2066\u2067\u2068\u2069\u202d\u200f")
    shown.encode("utf-8")
    assert text.clean(shown, 1000) == shown


def test_long_text_is_cut_and_says_so() -> None:
    shown = text.clean("x" * 10_000, 50)
    assert shown == "x" * 50 + " … (10,000 characters)"
    assert text.clean("a\x00b\ud800c\u202ed") == "a\ufffdb\ufffdc\ufffdd"
    assert text.clean("日本語 🙂 עברית") == "日本語 🙂 עברית"
