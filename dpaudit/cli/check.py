"""`dpaudit check`: the step contract on training code."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dpaudit
from dpaudit.cli import console

if TYPE_CHECKING:
    from dpaudit.documents import CheckDocument

MARKS = {"pass": "pass", "fail": "FAIL", "not applicable": "  - "}


def command(
    factory: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The trainer under test.")],
    seed: Annotated[int, typer.Option(min=0, help="Parameters, sampling and noise seeds of the test.")] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds that one call of the trainer may take.")] = 30.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a core check could not be made (inconclusive).")
    ] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """The step contract on training code: what one DP-SGD step must satisfy, in seconds and without training.

    MODULE:FACTORY names a callable factory(records=None, *, seed, noise_seed=None) in the working directory or on the
    Python path; docs/step-contract.md says what its trainer must offer. Exit code 0 pass, 1 fail.
    """
    from dpaudit.bounds import validate

    validate.real("--time-limit", time_limit, low=0.0, high=3600.0, open_low=True)
    began = time.monotonic()
    _leave_folder()
    # What foreign code prints must not end up in our result.
    with contextlib.redirect_stdout(sys.stderr):
        from attacks.contract import check
        from attacks.contract.guard import start_watchdog
        from attacks.contract.loading import load_factory

        start_watchdog(lambda line: console.log(f"dpaudit: {line}"))
        document = check(load_factory(factory, limit=time_limit), seed=seed, time_limit=time_limit)
    if as_json:
        console.emit(document)
    else:
        for line in describe(factory, document, time.monotonic() - began):
            console.say(line)
    console.finish(exit_code(document, strict=strict))


def _leave_folder() -> None:
    """`python -m dpaudit` puts the working directory first on sys.path; its `trainers/` must not become ours.

    It comes back once our packages are imported (attacks.contract.loading).
    """
    here = Path.cwd()
    if here != Path(dpaudit.__file__).resolve().parents[1]:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]


def exit_code(document: "CheckDocument", *, strict: bool) -> int:
    """1 for a failed contract, 3 for an inconclusive one under --strict."""
    if document.verdict == "fail":
        return console.REFUTED
    return console.INCONCLUSIVE if document.verdict == "inconclusive" and strict else console.DONE


def describe(name: str, document: "CheckDocument", seconds: float) -> list[str]:
    """The document as lines for people: every check, and the full story of those that failed."""
    from dpaudit.printable import field

    width = max(len(check.name) for check in document.checks)
    lines = [f"{MARKS[check.status]}  {check.name.ljust(width)}  {field(check.measured)}" for check in document.checks]
    for check in document.checks:
        if check.status == "fail":
            lines += [
                "",
                f"FAIL  {check.name}",
                f"      measured  {field(check.measured, 400)}",
                f"      allowed   {field(check.allowed, 400)}",
            ]
            lines.append(f"      usually   {field(check.explanation, 800)}")
    made = [check for check in document.checks if check.status != "not applicable"]
    failed = sum(check.status == "fail" for check in made)
    lines += ["", f"{field(name)}: {document.verdict} ({len(made)} checks made, {failed} failed, {seconds:.0f} s)"]
    if document.verdict == "inconclusive":
        lines.append("A core check could not be made (marked -), so a pass would say too little.")
    if document.verdict != "fail":
        lines.append("The contract can show that a step is wrong; it can never prove privacy.")
    return lines
