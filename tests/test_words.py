"""What people read is plain technical English: help texts, documentation, README, the page, and messages.

`make lint` checks the spelling (codespell, .ci/words.txt). This lists turns of phrase that reviewers of dpaudit
stumbled over: idioms that the field does not use, and words that a reader has to guess, each with the plain words.
"""

import ast
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from dpaudit.cli import app

ROOT = Path(__file__).parents[1]
PACKAGES = ("dpaudit", "trainers", "attacks", "reports")

# Turn of phrase (a regular expression, any case) -> what to write instead.
INSTEAD = {
    r"\bthe way out\b": "what to do instead",
    r"\bby heart\b": "memorised",
    r"\b(leaves?|left|leaving) the house\b": "be published, be released",
    r"\bits business\b": "(say what it does)",
    r"\bstrangers?\b": "somebody else, other people's",
    r"\bof other hands\b": "from other people",
    r"\bdealt (out|into|in)\b": "divided",
    r"\bcanaries may meet\b": "canaries may interfere",
    r"\bthese canaries may\b": "canaries may interfere",
    r"\bthe noise pays for it\b": "covered by the stated eps",
    r"\btaken that this number is known\b": "assuming the size is public",
    r"\bwrong claim it had to find\b": "the alternative",
    r"\btoo weak to expect\b": "could not reliably have caught",
    r"\bwears? out\b": "loses its level",
    r"\bgoes on where\b|\bgoes on with\b|\bgo on with\b": "continues",
    r"\bnothing is lost\b": "finished work is kept",
    r"\bwhole story\b": "(say what is done)",
    r"\bcame about\b": "was made",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bnowhere to go\b": "can't be ...",
    r"\bto be had\b": "available",
    r"\bhere as there\b": "in both",
    r"\bdearest\b": "most expensive",
    r"\blost in silence\b": "silently lost",
    r"\bwake anybody\b": "raise an alarm",
    r"\bsays nothing with\b": "has no effect with",
    r"\bits first home\b": "(delete)",
}
FORBIDDEN = re.compile("|".join(f"(?:{pattern})" for pattern in INSTEAD), re.IGNORECASE)


def found(text: str) -> list[str]:
    """Forbidden turns in a text, over line ends as well."""
    return [match.group(0) for match in FORBIDDEN.finditer(" ".join(text.split()))]


def test_the_list_finds_what_it_names_and_nothing_in_plain_words() -> None:
    assert found("it has the\n  way out") == ["the way out"] and found("Learned BY heart.") == ["BY heart"]
    assert found("the way outside, a strange bound, one house, businesslike") == []


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documentation_is_in_plain_words(page: Path) -> None:
    assert found(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", sorted((ROOT / "reports" / "templates").glob("*.j2")), ids=lambda path: path.name)
def test_the_page_is_in_plain_words(page: Path) -> None:
    assert found(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("command", ["", *app.COMMANDS])
def test_help_is_in_plain_words(command: str) -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert app.run([*([command] if command else []), "--help"]) == 0
    text = out.getvalue()
    assert "Usage:" in text and found(text) == []


@cache
def sources() -> tuple[Path, ...]:
    return tuple(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


def strings(path: Path) -> Iterator[str]:
    """Docstrings and messages: every string constant of a module, parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def test_messages_and_docstrings_are_in_plain_words() -> None:
    said = {f"{path.relative_to(ROOT)}: {turn}" for path in sources() for text in strings(path) for turn in found(text)}
    assert said == set()
