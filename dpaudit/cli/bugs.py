"""`dpaudit bugs`: which audits catch which planted bug."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from attacks.bugs.benchmark import BugRow, BugsDocument
    from attacks.bugs.paths import PathRow


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[BUG]...", help="Names of bugs to run (default: all).")
    ] = None,
    game: Annotated[bool, typer.Option("--game", help="Also play the white-box game (slower).")] = False,
    canaries: Annotated[
        bool, typer.Option("--canaries", help="Also play the canary game: 200 whole trainings per bug (slower).")
    ] = False,
    slow: Annotated[
        bool, typer.Option("--slow", help="Also run the bugs of the vision-language trainer (slower).")
    ] = False,
    fusion: Annotated[bool, typer.Option("--fusion", help="Also run the fusion audit on planted token paths.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every audit.")] = 0,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Run the audits on trainers that each contain one deliberate, documented bug.

    The exit code is 1 when the audits miss a bug that they should catch, or put a token path into the wrong row of the
    truth table. docs/planted-bugs.md has the tables, and those of correct trainers.
    """
    from attacks.bugs.benchmark import document, run_bugs
    from attacks.bugs.paths import PATHS, run_path
    from attacks.bugs.table import BUGS
    from dpaudit.errors import rejected

    known = {row.name: row for row in BUGS}
    paths = {row.name: row for row in PATHS}
    for name in names or []:
        if name not in known and name not in paths:
            raise rejected("BUG", name, sorted({*known, *paths}))
    chosen = [row for row in BUGS if row.name in names] if names else [row for row in BUGS if slow or not row.slow]
    tokens = [row for row in PATHS if row.name in names] if names else [row for row in PATHS if fusion]
    rows = []
    for place, row in enumerate(run_bugs(chosen, seed=seed, game=game, canaries=canaries), 1):
        rows.append(row)
        console.log(f"{place}/{len(chosen)} {row.name} ({row.seconds:.1f} s)")
    watched = []
    for place, plant in enumerate(tokens, 1):
        watched.append(run_path(plant, seed=seed))
        console.log(f"{place}/{len(tokens)} {plant.name} ({watched[-1].seconds:.1f} s)")
    result = document(rows, token_paths=watched)
    if as_json:
        console.emit(result)
    else:
        for line in describe(result):
            console.say(line)
    missed = any(not row.caught and row.why_not is None for row in rows) or not all(row.as_planted for row in watched)
    console.finish(console.REFUTED if missed else console.DONE)


def describe(result: "BugsDocument") -> list[str]:
    """The tables as lines for people."""
    lines = _bug_lines(result) if result.bugs else []
    if result.token_paths:
        lines += [""] * bool(lines) + _path_lines(result.token_paths)
    return lines


def _bug_lines(result: "BugsDocument") -> list[str]:
    width = max(len(row.name) for row in result.bugs)
    lines = [f"{'bug'.ljust(width)}  id        game    canaries  contract: checks that failed"]
    lines += [_line(row, width) for row in result.bugs]
    missed = [row for row in result.bugs if not row.caught]
    lines += ["", f"{result.caught} of {len(result.bugs)} caught, {result.caught_by_contract} by the step contract."]
    lines += [f"not caught: {row.name}: {row.why_not or 'it should have been'}" for row in missed]
    return lines


def _path_lines(rows: Sequence["PathRow"]) -> list[str]:
    width = max(len(row.name) for row in rows)
    lines = [f"{'token path'.ljust(width)}  training                   fusion audit"]
    for row in rows:
        found = f"{row.stage}: {row.moved}" if row.stage else ", ".join(row.failed) or "passes"
        lines.append(f"{row.name.ljust(width)}  {row.training:<25}  {found}")
    wrong = [row.name for row in rows if not row.as_planted]
    told = f"{len(rows) - len(wrong)} of {len(rows)} put into their row of the truth table"
    return [*lines, "", told + (f"; wrong: {', '.join(wrong)}." if wrong else ".")]


def _line(row: "BugRow", width: int) -> str:
    game = "-" if row.game_p is None else ("caught" if row.game else "no")
    canaries = "-" if row.canaries_p is None else ("caught" if row.canaries else "no")
    failed = ", ".join(row.contract[:3]) + (f" and {len(row.contract) - 3} more" if len(row.contract) > 3 else "")
    failed = failed or ("none: inconclusive" if row.stopped else "none")
    return f"{row.name.ljust(width)}  {row.catalogue:<8}  {game:<6}  {canaries:<8}  {failed}"
