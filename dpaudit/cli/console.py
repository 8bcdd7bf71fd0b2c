"""What every command shares: one JSON document on stdout, everything else on stderr, exit codes, gates."""

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from dpaudit import printable

if TYPE_CHECKING:  # half of the time that `dpaudit --help` takes
    from dpaudit.documents import AuditDocument, Document, ScoresDocument, Test, Verdict

DONE, REFUTED, USAGE, INCONCLUSIVE, ENVIRONMENT, DEFECT, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130

JSON_OPTION = typer.Option("--json", help="Print exactly one JSON document on stdout; logs go to stderr.")
ONLINE_OPTION = typer.Option(
    "--online", help="Allow downloads from the hub of the models and data that a run's own files name."
)
LIMIT_SENTENCE = "An audit can refute a claim; it can never prove privacy."

# Progress and logs; stdout belongs to results alone.
stderr = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line of a human-readable result on stdout: one line, whatever the text holds (dpaudit.printable)."""
    _write(printable.line(text) + "\n")


def _write(text: str) -> None:
    """Characters that the terminal's encoding lacks become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


def log(text: str) -> None:
    """A line for the person who watches, on stderr: one line, whatever the text holds (dpaudit.printable).

    Lost where stderr can't be written: the exit code says the same, and it must not become Python's own.
    """
    with contextlib.suppress(OSError):
        stderr.print(printable.line(text), markup=False, soft_wrap=True)


def emit(document: "Document") -> None:
    """Print the one JSON document; what could move a cursor is escaped, which JSON reads as the same."""
    sys.stdout.write(printable.json_text(document.to_json()))


def verdict_exit_code(verdict: "Verdict", *, strict: bool = False) -> int:
    """Exit code of a verdict: 1 refuted or unsupported, 3 invalid (always) or inconclusive (with --strict)."""
    if verdict in ("refuted", "unsupported"):
        return REFUTED
    if verdict == "invalid" or (verdict == "inconclusive" and strict):
        return INCONCLUSIVE
    return DONE


def exit_code(document: "AuditDocument | ScoresDocument", *, strict: bool, fail_above: float | None) -> int:
    """Exit code of a document: that of its verdict, and 1 where the best bound exceeds a gate's eps.

    An inconclusive audit says so on stderr: with exit code 0 a gate would be green on a test that saw nothing.
    """
    from dpaudit import verdict

    code = verdict_exit_code(document.verdict, strict=strict)
    if document.verdict == "inconclusive" and not strict:
        log("dpaudit: inconclusive: nothing was refuted, and nothing was shown to be testable (--strict: exit code 3)")
    if fail_above is None or document.verdict == "invalid":
        return code
    best = verdict.headline(document)
    if best is None:
        log("dpaudit: --fail-above: no bound was computed, so the gate tests nothing (--strict: exit code 3)")
        return INCONCLUSIVE if strict and code == DONE else code
    elif verdict.exceeds(document, fail_above):
        log(f"dpaudit: --fail-above: eps >= {float(best.epsilon_lower or 0):.3g}, the gate allows {fail_above:g}")
        return REFUTED
    elif (most := verdict.highest_ceiling(document)) is not None and most <= fail_above:
        log(
            f"dpaudit: --fail-above: no bound here could exceed {most:.3g}, so a gate of {fail_above:g} can't fail "
            "(--strict: exit code 3)"
        )
        return INCONCLUSIVE if strict and code == DONE else code
    elif not best.epsilon_lower and not any(map(verdict.powerful, document.tests)):
        log(
            "dpaudit: --fail-above: eps >= 0, and no control shows that a leak would have been seen: the gate tests "
            "nothing (--strict: exit code 3)"
        )
        return INCONCLUSIVE if strict and code == DONE else code
    return code


def at_ceiling(test: "Test") -> str | None:
    """What to say of a bound that reached the largest value that its game could have shown; None below it.

    An infinite bound has no ceiling to reach: it says that q and T of the claim do not fit.
    """
    lower, top = test.epsilon_lower, test.ceiling
    if lower is None or top is None or math.isinf(top) or not 0 < top <= lower * (1 + 1e-6):
        return None
    why = (
        "every guess was right"
        if test.guesses is not None and test.correct == test.guesses
        else "the ceiling is reached"
    )
    return f"{why}: eps may be larger, use more canaries"


def claim_flag(field: str) -> str:
    """The flag of a part of a claim (dpaudit.analysis.stating)."""
    return "--epsilon" if field == "epsilon" else f"--claim-{field}"


def finish(code: int) -> NoReturn:
    """End the command with an exit code."""
    raise typer.Exit(code)


def existing(path: Path, what: str) -> Path:
    """`path`, or one clear line that it is missing."""
    if not path.exists():
        from dpaudit.errors import UsageError

        raise UsageError(f"{what} {path}: no such file or folder")
    return path
