"""`dpaudit doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for runs, to be checked for space and permissions.")
    ] = Path("."),
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Check the installation and print a command that fixes each problem.

    Exit code 0: everything works; 4: something is broken.
    """
    from dpaudit.environment import examine

    document = examine(out)
    if as_json:
        console.emit(document)
    else:
        marks = {"pass": "ok", "fail": "BROKEN", "not applicable": "-"}
        for check in document.checks:
            console.say(f"{marks[check.status]:>6}  {check.name:<12} {check.measured}")
            if check.status != "pass":
                console.say(f"{'':>6}  {'':<12} {check.explanation}")
        console.say("healthy" if document.healthy else "broken: see the lines marked BROKEN")
    console.finish(console.DONE if document.healthy else console.ENVIRONMENT)
