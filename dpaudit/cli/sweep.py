"""`dpaudit sweep`: many runs from one grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit import extras
from dpaudit.cli import console
from dpaudit.cli.executor import Address, ExecutorName, GpusPerTrial, choose
from dpaudit.errors import UsageError, rejected
from dpaudit.online import allow

if TYPE_CHECKING:
    from reports.sweep.board import Board
    from reports.sweep.document import SweepDocument, SweepRow
    from reports.sweep.grid import Grid, Plan


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[GRID.yaml] [KEY.SUB=VALUE]...", help="The grid, and settings for every cell."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="frontier, dual-priv-ablation, dual-priv-noiseless or iso-parameter.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the sweep (default: sweeps/NAME).")] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Number of trainings that run at a time (default: 2; on Ray, as many as fit)."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each training.")] = 1,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the repeats, e.g. 0,1,2 or 0-4 (default: as in the grid).")
    ] = None,
    audit: Annotated[
        list[str] | None, typer.Option(help="Also run this audit on every cell: canaries, fusion, ... Repeatable.")
    ] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    gpus_per_trial: GpusPerTrial = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --out.")] = False,
    online: Annotated[bool, console.ONLINE_OPTION] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells without training.")] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Train and benchmark a grid of configurations with several seeds each; write one table with intervals.

    Every cell is a run folder under OUT/runs. --resume continues a sweep that was stopped: finished cells are
    skipped, an interrupted training continues. A cell that fails is reported and the others continue (exit code 4).
    docs/reference/settings.md describes GRID.yaml.
    """
    if online or arguments or preset is not None:  # else the grid is the one in --out, whoever wrote it
        allow()
    plan, grid, overrides, chosen, folder = _given(arguments or [], preset, out, seeds, audit or [], resume)
    if dry_run and not as_json:
        return _list(plan, folder)
    from reports.sweep.board import NAME, Board, summarise
    from reports.sweep.live import SweepView
    from reports.sweep.run import run_sweep

    if dry_run:  # the document as it would start: nothing is written
        board = Board.read(plan, folder, grid=grid.model_dump(), overrides=overrides, seeds=chosen)
        return console.emit(summarise(board))
    if (folder / NAME).exists() and not resume:
        raise UsageError(f"--out {folder}: holds a sweep already; continue it with --resume, or choose another folder")
    chosen_executor = choose(executor, processes, threads, address, gpus_per_trial)
    board = Board.read(plan, folder, grid=grid.model_dump(), overrides=overrides, seeds=chosen)
    if address is None and any(entry.state != "finished" for entry in board.entries):  # before the trainings
        extras.require_lmms_eval("sweep")
    with chosen_executor.connection:
        view = SweepView(board)
        try:
            document = run_sweep(board, executor=chosen_executor.make, lanes=chosen_executor.lanes, watch=view)
        finally:
            view.close()
    _finish(document, folder, board, as_json)


def _given(
    arguments: Sequence[str],
    preset: str | None,
    out: Path | None,
    seeds: str | None,
    audits: Sequence[str],
    resume: bool,
) -> "tuple[Plan, Grid, list[str], list[int], Path]":
    """Grid, overrides, seeds and folder, from the command line or from the sweep that is to go on."""
    from attacks.options import Options
    from reports.sweep.grid import make_plan, read_grid, slug
    from reports.sweep.grid import preset as preset_file

    overrides = [text for text in arguments if "=" in text]
    files = [text for text in arguments if "=" not in text]
    if len(files) + (preset is not None) > 1:
        raise rejected("GRID.yaml", files if preset is None else [*files, f"--preset {preset}"], "one grid")
    chosen = None if seeds is None else _seeds(seeds)
    if files or preset is not None:
        grid = read_grid(Path(files[0])) if files else read_grid(preset_file(str(preset)))
    elif resume and out is not None:
        grid, overrides, chosen = _stored(out, overrides, chosen)
    else:
        raise UsageError("GRID.yaml: missing; give a grid, --preset NAME, or --resume --out DIR")
    grid = grid.model_copy(update={"audits": [*grid.audits, *(name for name in audits if name not in grid.audits)]})
    Options(audits=tuple(grid.audits))
    plan = make_plan(grid, overrides=overrides, seeds=chosen)
    return plan, grid, overrides, chosen or list(grid.seeds), out or Path("sweeps") / slug(plan.name)


def _stored(out: Path, overrides: list[str], seeds: list[int] | None) -> "tuple[Grid, list[str], list[int]]":
    """Grid, overrides and seeds of the sweep in `out`; more overrides would make it another one."""
    from reports.sweep.board import NAME
    from reports.sweep.document import SweepDocument
    from reports.sweep.grid import as_grid

    console.existing(out / NAME, "--resume")
    if overrides:
        raise rejected("override", overrides[0], "none with --resume alone: the sweep has its settings")
    earlier = SweepDocument.read(out / NAME)
    return as_grid(earlier.grid, out / NAME), list(earlier.overrides), seeds or list(earlier.seeds)


def _seeds(text: str) -> list[int]:
    """'0,1,2' or '0-4' as a list."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise rejected("--seeds", text, "whole numbers such as 0,1,2 or 0-4")
        found += range(int(first), (int(last) if dash else int(first)) + 1)
        if len(found) > 1000:
            raise rejected("--seeds", text, "at most 1000 seeds")
    return found


def _list(plan: "Plan", folder: Path) -> None:
    for cell in plan.cells:
        console.say(f"{folder / 'runs' / cell.folder}")
    console.say(f"{len(plan.cells)} cells, {len(plan.points)} lines in the table. Nothing was trained.")


def _finish(document: "SweepDocument", folder: Path, board: "Board", as_json: bool) -> None:
    if as_json:
        console.emit(document)
    else:
        for line in describe(document):
            console.say(line)
        console.say("")
        console.say(f"written to {folder / 'sweep.json'}; next: dpaudit report {folder} -o report.html")
    failed = [entry for entry in board.entries if entry.state == "failed"]
    if failed:
        console.log(f"dpaudit: {len(failed)} of {len(board.entries)} cells failed; --resume tries them again")
        console.finish(console.ENVIRONMENT)


def describe(document: "SweepDocument") -> list[str]:
    """The table as lines for people."""
    from reports.text import clean

    width = max(len(row.configuration) for row in document.rows)
    lines = [f"{'configuration'.ljust(width)}  exact match (95 % interval)      seeds  difference (95 % interval)"]
    lines += [_line(row, width) for row in document.rows]
    pictures = next((row.exact_match.pictures for row in document.rows if row.exact_match), 0)
    covers = {row.exact_match.covers for row in document.rows if row.exact_match and row.seeds}
    lines += ["", f"{pictures:,} test pictures, the same for all. Intervals cover {' or '.join(sorted(covers))}."]
    return [*lines, *(f"ledger    {row.status}: {clean(row.path)}" for row in document.ledger)]


def _line(row: "SweepRow", width: int) -> str:
    from reports.text import clean, percent

    shown = "not measured"
    if row.exact_match is not None:
        shown = f"{percent(row.exact_match.value):>7}"
        if row.exact_match.low is not None and row.exact_match.high is not None:
            shown += f" ({percent(row.exact_match.low)} to {percent(row.exact_match.high)})"
    beside = ""
    if row.difference is not None:
        beside = f"{100 * row.difference.value:+.1f} points"
        if row.difference.low is not None and row.difference.high is not None:
            beside += f" ({100 * row.difference.low:+.1f} to {100 * row.difference.high:+.1f})"
        beside += f" against {clean(row.against or '', 80)}"
    failed = f", {row.failed} failed" if row.failed else ""
    seeds = f"{len(row.seeds)}{failed}" if row.method is not None else "-"
    return f"{clean(row.configuration, 80).ljust(width)}  {shown:<32} {seeds:<6} {beside}".rstrip()
