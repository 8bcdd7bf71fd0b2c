"""`dpaudit check`: the step contract on training code."""

import contextlib
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dpaudit
from dpaudit.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attacks.contract import Examination
    from dpaudit.documents import CheckDocument

MARKS = {"pass": "pass", "fail": "FAIL", "not applicable": "  - "}
DOMINATES = 0.5  # share of the time that is worth a word of advice


def command(
    factory: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The trainer under test.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial parameters, sampling and noise.")] = 0,
    epsilon: Annotated[
        float | None,
        typer.Option(help="The eps claimed for the whole training; the mechanism of the trainer must cover it."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="The delta that belongs to --epsilon (default: 1e-5).")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=REASON", help="Waive a failed check by name; it is shown as waived. Repeatable."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Time limit of one call of the trainer, in seconds.")] = 30.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a core check could not be made (inconclusive).")
    ] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    sarif: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write SARIF 2.1.0, which points to the factory's source line."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON.")] = None,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Test DP-SGD steps of training code: clipping, noise, sampling and accounting, early and late in training.

    MODULE:FACTORY names a callable factory(records=None, *, seed, noise_seed=None) in the working directory or on the
    Python path; docs/step-contract.md says what its trainer must offer. Exit codes: 0 pass; 1 fail; 2 the trainer could
    not be loaded, or one of its methods failed. All files are written completely at every exit code.
    """
    began = time.monotonic()
    out = sys.stdout
    _leave_folder()
    files = _Files(factory, junit, sarif, output)

    def stop(line: str) -> None:
        """A call hangs where no signal reaches it: say what is known before the process ends."""
        console.log(f"dpaudit: {line}")
        document = files.write(examination[0].document(problem=line) if examination else None, line)
        if as_json:
            out.write(document.to_json())
            out.flush()

    examination: list[Examination] = []
    failure: Exception | None = None
    # What foreign code prints must not end up in our result; what it warns of is shown once, apart from what libraries
    # tell their own developers.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("once")
        for notice in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", notice)
        from dpaudit.errors import DpauditError

        document: CheckDocument | None = None
        try:
            document = _examine(
                examination, stop, factory, seed, _stated(epsilon, delta), _waivers(allow or []), time_limit
            )
        except DpauditError as error:
            failure = error
            document = examination[0].document(problem=str(error)) if examination else None
    written = files.write(document, str(failure))
    if as_json:
        console.emit(written)
    elif failure is None:
        for line in describe(factory, written, time.monotonic() - began):
            console.say(line)
    if failure is not None:
        raise failure
    for name in written.unneeded(_waivers(allow or [])):
        console.log(f"dpaudit: --allow {name}: the check did not fail, so nothing was waived")
    console.finish(exit_code(written, strict=strict))


def _examine(
    examination: "list[Examination]",
    stop: "Callable[[str], None]",
    factory: str,
    seed: int,
    stated: dict[str, float | None],
    allow: dict[str, str],
    time_limit: float,
) -> "CheckDocument":
    """Load the factory and run the contract; `examination` holds the run as soon as there is one."""
    from attacks.contract import Examination
    from attacks.contract.guard import start_watchdog
    from attacks.contract.loading import load_factory, source
    from dpaudit import validate

    validate.real("--time-limit", time_limit, low=0.0, high=3600.0, open_low=True)
    made = Examination(seed=seed, time_limit=time_limit, allow=allow, target=factory, **stated)
    examination.append(made)
    start_watchdog(stop)
    made.source = source(factory, None)
    loaded = load_factory(factory, limit=time_limit)
    made.source = source(factory, loaded)
    return made.run(loaded)


def _stated(epsilon: float | None, delta: float | None) -> dict[str, float | None]:
    """--epsilon and --delta, validated; the one without the other means nothing."""
    from dpaudit import validate
    from dpaudit.errors import rejected

    if epsilon is None and delta is not None:
        raise rejected("--delta", delta, "--delta only beside --epsilon")
    if epsilon is not None:
        validate.real("--epsilon", epsilon, low=0.0, high=1e6, open_low=True)
    if delta is not None:
        validate.real("--delta", delta, low=0.0, high=1.0, open_low=True, open_high=True)
    return {"epsilon": epsilon, "delta": delta}


def _waivers(texts: "Sequence[str]") -> dict[str, str]:
    """CHECK=REASON, several times; the names are validated with the contract's."""
    from dpaudit.errors import rejected

    waivers: dict[str, str] = {}
    for text in texts:
        name, sign, reason = text.partition("=")
        if not sign:
            raise rejected("--allow", text, "CHECK=REASON, for example 'claim is public=n is public here'")
        waivers[name.strip()] = reason.strip()
    return waivers


class _Files:
    """What is written beside the screen: JSON, JUnit and SARIF, each complete at every exit code."""

    def __init__(self, name: str, junit: Path | None, sarif: Path | None, output: Path | None) -> None:
        self.name, self.junit, self.sarif, self.output = name, junit, sarif, output

    def write(self, document: "CheckDocument | None", problem: str) -> "CheckDocument":
        """Write all that were asked for; without a document one that says what the problem was. Returns it."""
        from dpaudit.atomic import write_document, write_text
        from dpaudit.documents import CheckDocument, FactorySource

        if document is None:
            source = FactorySource(name=self.name)
            document = CheckDocument(verdict="inconclusive", checks=(), problem=problem, factory=source)
        if self.output is not None:
            write_document(self.output, document)
        if self.junit is not None or self.sarif is not None:
            from reports import formats
            from reports.formats.findings import of_contract

            found = of_contract(document, self.name)
            if self.junit is not None:
                write_text(self.junit, formats.junit(found))
            if self.sarif is not None:
                write_text(self.sarif, formats.sarif(found))
        return document


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
    lines = []
    for check in document.checks:
        mark = "waiv" if check.waived is not None else MARKS[check.status]
        lines.append(f"{mark}  {check.name.ljust(width)}  {field(check.measured)}")
    for check in document.checks:
        if check.status == "fail":
            lines += [
                "",
                f"FAIL  {check.name}" if check.waived is None else f"waived  {check.name}: {field(check.waived or '')}",
                f"      measured  {field(check.measured, 400)}",
                f"      allowed   {field(check.allowed, 400)}",
            ]
            lines.append(f"      usually   {field(check.explanation, 800)}")
    made = [check for check in document.checks if check.status != "not applicable"]
    failed = sum(check.status == "fail" and check.waived is None for check in made)
    waived = sum(check.waived is not None for check in made)
    counted = f"{len(made)} checks made, {failed} failed" + (f", {waived} waived" if waived else "")
    lines += ["", f"{field(name)}: {document.verdict} ({counted}, {seconds:.0f} s)"]
    if document.verdict == "inconclusive":
        lines.append("A core check could not be made (marked -), so a pass would say too little.")
    if document.verdict != "fail":
        lines.append("The contract can show that a training is wrong; it can never prove privacy.")
    spent = f"The factory was called {document.builds} times, {document.factory_seconds:.1f} s in all"
    if document.factory_seconds > max(DOMINATES * seconds, 5.0):
        spent += (
            ", most of the time: cache what does not depend on records or seeds (the sigma of a target eps, a model)"
        )
    lines.append(f"{spent}; {document.steps} steps were taken.")
    return lines
