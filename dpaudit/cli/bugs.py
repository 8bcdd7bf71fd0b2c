"""`dpaudit bugs`: which audits catch which planted bug."""

from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from attacks.bugs.benchmark import BugRow, BugsDocument


def command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[BUG]...", help="Only these; default: all.")] = None,
    game: Annotated[bool, typer.Option("--game", help="Also play the white-box game (slower).")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="Also those on the vision-language trainer.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every audit.")] = 0,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Run the audits on trainers with one deliberate, documented bug each, and on nothing else.

    Exit code 1 when a bug slips through that is not declared out of reach. docs/planted-bugs.md has the table with the
    correct trainers beside it.
    """
    from attacks.bugs.benchmark import document, run_bugs
    from attacks.bugs.table import BUGS
    from dpaudit.errors import rejected

    known = {row.name: row for row in BUGS}
    for name in names or []:
        if name not in known:
            raise rejected("BUG", name, sorted(known))
    chosen = [known[name] for name in names] if names else [row for row in BUGS if slow or not row.slow]
    rows = []
    for place, row in enumerate(run_bugs(chosen, seed=seed, game=game), 1):
        rows.append(row)
        console.log(f"{place}/{len(chosen)} {row.name} ({row.seconds:.1f} s)")
    result = document(rows)
    if as_json:
        console.emit(result)
    else:
        for line in describe(result):
            console.say(line)
    console.finish(console.REFUTED if any(not row.caught and row.why_not is None for row in rows) else console.DONE)


def describe(result: "BugsDocument") -> list[str]:
    """The table as lines for people."""
    width = max(len(row.name) for row in result.bugs)
    lines = [f"{'bug'.ljust(width)}  id        game    contract: checks that failed"]
    lines += [_line(row, width) for row in result.bugs]
    missed = [row for row in result.bugs if not row.caught]
    lines += ["", f"{result.caught} of {len(result.bugs)} caught, {result.caught_by_contract} by the step contract."]
    lines += [f"not caught: {row.name}: {row.why_not or 'it should have been'}" for row in missed]
    return lines


def _line(row: "BugRow", width: int) -> str:
    game = "-" if row.game_p is None else ("caught" if row.game else "no")
    failed = ", ".join(row.contract[:3]) + (f" and {len(row.contract) - 3} more" if len(row.contract) > 3 else "")
    return f"{row.name.ljust(width)}  {row.catalogue:<8}  {game:<6}  {failed or 'none'}"
