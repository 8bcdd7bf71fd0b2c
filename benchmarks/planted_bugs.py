"""Every planted bug against every audit, and correct trainers over many seeds. Resumable; one process.

    python benchmarks/planted_bugs.py                       # writes benchmarks/results/planted_bugs.json
    python benchmarks/planted_bugs.py --only controls --no-games      # the step contract alone on the correct trainers
    python benchmarks/planted_bugs.py --table               # prints the Markdown table of docs/planted-bugs.md
    python benchmarks/planted_bugs.py --effects             # prints its tables of effects, which need no run

Each row is written as soon as it is there, so an interrupted run goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from attacks.bugs.benchmark import BugRow, BugsDocument, ControlRow, add_canaries, document, run_bug
from attacks.bugs.controls import CONTROLS, Control, run_control
from attacks.bugs.paths import PATHS, run_path
from attacks.bugs.row import Bug
from attacks.bugs.table import BUGS
from dpaudit import atomic

RESULTS = Path(__file__).parent / "results" / "planted_bugs.json"
PER_WRITE = 5  # seeds of a control between two writes


def merged(old: ControlRow | None, new: ControlRow) -> ControlRow:
    """Two rows of one control over different seeds."""
    if old is None:
        return new
    kinds = old.verdicts.keys() | new.verdicts.keys()
    games = None if old.game_alarms is None or new.game_alarms is None else old.game_alarms + new.game_alarms
    return ControlRow(
        name=old.name,
        seeds=old.seeds + new.seeds,
        alarms=old.alarms + new.alarms,
        verdicts={kind: old.verdicts.get(kind, 0) + new.verdicts.get(kind, 0) for kind in sorted(kinds)},
        game_alarms=games,
        seconds=round(old.seconds + new.seconds, 1),
    )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="seeds per control")
    parser.add_argument("--slow-seeds", type=int, default=50, help="seeds per control on a language model")
    parser.add_argument("--only", default="bugs,paths,canaries,controls", help="parts, separated by commas")
    parser.add_argument("--no-games", action="store_true", help="no statistical game on the correct trainers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the Markdown table of what is there")
    parser.add_argument("--effects", action="store_true", help="only print what each bug does, and the controls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = BugsDocument.read(options.out) if options.out.exists() else document(())
    if options.effects:
        print(effects(BUGS) + "\n" + suspicious(CONTROLS))
        return
    if options.table:
        print(table(old))
        return
    rows = {row.name: row for row in old.bugs}
    controls = {row.name: row for row in old.controls}
    paths = {row.name: row for row in old.token_paths}
    # A game that does not apply leaves no p-value; asking again whether it does takes no time.
    played = {row.name for row in old.bugs if row.canaries_p is not None}

    def write() -> None:
        ordered = [rows[bug.name] for bug in BUGS if bug.name in rows]
        held = [controls[control.name] for control in CONTROLS if control.name in controls]
        atomic.make_folder(options.out.parent)
        watched = [paths[plant.name] for plant in PATHS if plant.name in paths]
        atomic.write_document(options.out, document(ordered, held, watched))

    parts = options.only.split(",")
    for bug in BUGS if "bugs" in parts else ():
        if bug.name not in rows:
            rows[bug.name] = run_bug(bug)
            write()
            print(bug.name, rows[bug.name].contract[:2], rows[bug.name].seconds, flush=True)
    for plant in PATHS if "paths" in parts else ():
        if plant.name not in paths:
            paths[plant.name] = run_path(plant)
            write()
            print(plant.name, paths[plant.name].as_planted, paths[plant.name].seconds, flush=True)
    for bug in BUGS if "canaries" in parts else ():
        if bug.name in rows and bug.name not in played:
            rows[bug.name] = add_canaries(rows[bug.name], bug)
            write()
            print(bug.name, "canaries", rows[bug.name].canaries_p, flush=True)
    for control in CONTROLS if "controls" in parts else ():
        wanted = options.slow_seeds if control.slow else options.seeds
        while (done := _done(controls, control)) < wanted:
            game = not (control.slow or options.no_games)
            new = run_control(control, range(done, min(wanted, done + PER_WRITE)), game=game)
            controls[control.name] = merged(controls.get(control.name), new)
            write()
            print(controls[control.name], flush=True)


def _done(controls: dict[str, ControlRow], control: Control) -> int:
    return controls[control.name].seeds if control.name in controls else 0


def table(result: BugsDocument) -> str:
    """The Markdown of docs/planted-bugs.md; the column of canaries only where they were played."""
    canaries = any(row.canaries_p is not None for row in result.bugs)
    head = ["bug", "id", "what", "source", "step contract: checks that fail", "exact replay", "game"]
    head += ["canaries"] * canaries + ["s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [_markdown(row, canaries=canaries) for row in result.bugs]
    lines += [
        "",
        "## Token paths",
        "",
        "| token path | what | source | fusion audit: first leaking stage, or check that fails | training | s |",
        "|---|---|---|---|---|---|",
    ]
    for path in result.token_paths:
        found = f"{path.stage}: {path.moved}" if path.stage else ", ".join(path.failed) or "passes"
        found += "" if path.as_planted else " (**not as planted**)"
        lines.append(
            f"| `{path.name}` | {path.what} | {path.source} | {found} | {path.training} | {path.seconds:.0f} |"
        )
    lines += [
        "",
        "## Correct trainers",
        "",
        "| correct trainer | seeds | contract alarms | verdicts | game alarms | s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result.controls:
        verdicts = ", ".join(f"{count} {kind}" for kind, count in row.verdicts.items())
        games = "not played" if row.game_alarms is None else str(row.game_alarms)
        lines.append(f"| {row.name} | {row.seeds} | {row.alarms} | {verdicts} | {games} | {row.seconds:.0f} |")
    return "\n".join(lines)


def effects(bugs: Sequence[Bug]) -> str:
    """The Markdown tables of docs/planted-bugs.md that say what a bug does and who could see it, a kind each."""
    kinds = dict.fromkeys(bug.kind for bug in bugs if bug.effect)
    lines: list[str] = []
    for kind in kinds:
        lines += [f"### {kind[0].upper()}{kind[1:]}", ""]
        lines += ["| bug | id | what | effect on the guarantee | could be seen by | source |", "|---" * 6 + "|"]
        for bug in bugs:
            if bug.effect and bug.kind == kind:
                cells = [f"`{bug.name}`", bug.catalogue, bug.what, bug.effect, bug.seen_by or "", bug.source]
                lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def suspicious(controls: Sequence[Control]) -> str:
    """The Markdown table of the correct trainers that have a reason of their own to be there."""
    lines = [
        "### Correct, and suspicious at first sight",
        "",
        "| correct trainer | why it keeps the guarantee |",
        "|---|---|",
    ]
    for control in controls:
        if control.factory.__module__.startswith("attacks.bugs.correct"):
            why = (control.factory.__doc__ or "").split("\n\n")[0]
            lines.append(f"| {control.name} | {' '.join(why.split())} |")
    return "\n".join(lines)


def _markdown(row: BugRow, *, canaries: bool) -> str:
    failed = ", ".join(row.contract[:3]) + (f" and {len(row.contract) - 3} more" if len(row.contract) > 3 else "")
    game = "not played" if row.game_p is None else ("caught" if row.game else "-")
    failed = failed or ("none: inconclusive" if row.stopped else "**none**")
    cells = [f"`{row.name}`", row.catalogue, row.what, row.source.replace("|", "/"), failed]
    cells += ["caught" if row.isolation else "-", game]
    if canaries:
        cells.append("not played" if row.canaries_p is None else ("caught" if row.canaries else "-"))
    return "| " + " | ".join([*cells, f"{row.seconds:.1f}"]) + " |"


if __name__ == "__main__":
    main()
