"""What a person sees while a sweep runs, on stderr: a table on a terminal, a line per event elsewhere."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpaudit.printable import line
from dpaudit.untrusted import open_regular
from reports.sweep.board import Board, Entry
from reports.text import clean, percent

MARKS = {
    "waiting": ("·", "dim"),
    "training": ("t", "yellow"),
    "trained": ("T", "cyan"),
    "measuring": ("m", "yellow"),
    "finished": ("✓", "green"),
    "failed": ("✗", "bold red"),
}
LEGEND = "· waiting   t training   T trained   m being measured   ✓ finished   ✗ failed"


class SweepView:
    """Calls itself a watcher: one instance per sweep, closed at its end."""

    def __init__(self, board: Board) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._board = board
        self._began = time.monotonic()
        self._skipped = sum(entry.state == "finished" for entry in board.entries)
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=1, transient=True)
            self._live.start()
        total = len(board.entries)
        self._say(f"{total} cells in {board.out}, {self._skipped} of them finished before")

    def __call__(self, board: Board, entry: Entry) -> None:
        """One cell has changed its state."""
        name = f"{clean(entry.cell.point.name, 60)}, seed {entry.cell.seed}"
        done = sum(other.state == "finished" for other in board.entries)
        if entry.state == "failed":
            self._say(f"FAILED {name}: {clean(entry.error or 'no reason given', 400)}")
        elif self._live is None and entry.state == "trained":
            self._say(f"trained {name} ({entry.seconds or 0:.0f} s)")
        elif self._live is None and entry.state == "finished":
            self._say(f"{done}/{len(board.entries)} finished {name}: exact match {percent(entry.value)}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(self._render())

    def _say(self, text: str) -> None:
        self._console.print(line(f"sweep: {text}"), markup=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("configuration", "seeds", "exact match", "now"):
            table.add_column(column, no_wrap=True)
        for point in self._board.plan.points:
            if point.trained:
                entries = [entry for entry in self._board.entries if entry.cell.point.name == point.name]
                table.add_row(Text(clean(point.name, 44)), _marks(entries), _mean(entries), _now(entries))
        done = sum(entry.state == "finished" for entry in self._board.entries)
        minutes = (time.monotonic() - self._began) / 60
        left = f", about {self._left():.0f} min left" if self._left() is not None else ""
        head = f"{done} of {len(self._board.entries)} cells finished, {minutes:.1f} min{left}"
        return Group(Text(head), table, Text(LEGEND, style="dim"))

    def _left(self) -> float | None:
        """Minutes, from the pace of the trainings of this start."""
        own = [e for e in self._board.entries if e.state in ("trained", "measuring", "finished")]
        made = len(own) - self._skipped
        todo = sum(entry.state in ("waiting", "training") for entry in self._board.entries)
        return (time.monotonic() - self._began) / 60 / made * todo if made > 0 else None


def _marks(entries: Sequence[Entry]) -> Text:
    text = Text()
    for entry in entries:
        mark, style = MARKS[entry.state]
        text.append(mark, style=style)
    return text


def _mean(entries: Sequence[Entry]) -> str:
    values = [entry.value for entry in entries if entry.state == "finished" and entry.value is not None]
    return percent(sum(values) / len(values)) if values else ""


def _now(entries: Sequence[Entry]) -> str:
    parts = []
    for entry in entries:
        if entry.state in ("training", "measuring"):
            step = _last_step(entry.run.metrics) if entry.state == "training" else None
            at = f" step {step}" if step is not None else ""
            parts.append(f"seed {entry.cell.seed}{at} {time.monotonic() - entry.began:.0f} s")
    return ", ".join(parts)


def _last_step(path: Path) -> int | None:
    """The last step in a private metrics log; only its number is shown."""
    with suppress(OSError, ValueError, KeyError, TypeError), open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return None
