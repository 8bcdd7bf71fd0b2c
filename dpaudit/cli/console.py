"""What every command shares: one JSON document on stdout, everything else on stderr, exit codes, gates."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:  # half of the time that `dpaudit --help` takes
    from dpaudit.documents import Document, Verdict

DONE, REFUTED, USAGE, INCONCLUSIVE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 4, 130

JSON_OPTION = typer.Option("--json", help="Print exactly one JSON document on stdout; logs go to stderr.")
LIMIT_SENTENCE = "An audit can refute a claim; it can never prove privacy."

# Progress and logs; stdout belongs to results alone.
stderr = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line of a human-readable result on stdout."""
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """A line for the person who watches, on stderr, printed literally."""
    stderr.print(text, markup=False, soft_wrap=True)


def emit(document: "Document") -> None:
    """Print the one JSON document."""
    sys.stdout.write(document.to_json())


def verdict_exit_code(verdict: "Verdict", *, strict: bool = False) -> int:
    """Exit code of a verdict: 1 refuted or unsupported, 3 invalid (always) or inconclusive (with --strict)."""
    if verdict in ("refuted", "unsupported"):
        return REFUTED
    if verdict == "invalid" or (verdict == "inconclusive" and strict):
        return INCONCLUSIVE
    return DONE


def finish(code: int) -> NoReturn:
    """End the command with an exit code."""
    raise typer.Exit(code)


def existing(path: Path, what: str) -> Path:
    """`path`, or one clear line that it is missing."""
    if not path.exists():
        from dpaudit.errors import UsageError

        raise UsageError(f"{what} {path}: no such file or folder")
    return path
