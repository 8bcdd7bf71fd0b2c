"""What a person sees while a run trains: always on stderr, never in the way of a document on stdout."""

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpaudit import printable


@dataclass(frozen=True)
class StepReport:
    """One step, for the owner's eyes: loss and clip fraction are exact statistics of private data."""

    step: int
    steps: int
    loss: float | None
    clipped: float | None
    epsilon: float | None


class Reporter(Protocol):
    """Receives the progress of a run."""

    def phase(self, text: str) -> None:
        """A new phase begins."""
        ...

    def step(self, report: StepReport) -> None:
        """A step is done."""
        ...

    def close(self) -> None:
        """No more reports."""
        ...


class Silent:
    """Reports nothing."""

    def phase(self, text: str) -> None:
        return None

    def step(self, report: StepReport) -> None:
        return None

    def close(self) -> None:
        return None


def _words(report: StepReport) -> str:
    parts = []
    if report.loss is not None:
        parts.append(f"loss {report.loss:.3f}")
    if report.clipped is not None:
        parts.append(f"clipped {report.clipped:.0%}")
    if report.epsilon is not None:
        parts.append(f"eps {report.epsilon:.3f}")
    return "  ".join(parts)


class Live:
    """A progress bar on a terminal; a line about every tenth of the way where stderr is no terminal."""

    def __init__(self, name: str = "", what: str = "step") -> None:
        """name: of the run, in front of each line. what: the things that are counted."""
        self.what = what
        self.name = f"{printable.field(name, 80)}: " if name else ""
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first report: what came before is no guide
        self._shown = -1

    def phase(self, text: str) -> None:
        self._console.print(printable.line(f"{self.name}{text}"), markup=False, soft_wrap=True)

    def step(self, report: StepReport) -> None:
        if not sys.stderr.isatty():
            self._line(report)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn(f"{self.what} {{task.completed}}/{{task.total}}"),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name + "training", total=report.steps, words="")
        assert self._task is not None
        self._bar.update(self._task, completed=report.step, words=_words(report))

    def _line(self, report: StepReport) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (report.step, now)
        tenth = 10 * report.step // report.steps
        if tenth == self._shown and report.step != report.steps:
            return
        self._shown = tenth
        done = report.step - self._first[0]
        left = f"  {(now - self._first[1]) / done * (report.steps - report.step):.0f} s left" if done else ""
        self.phase(f"{self.what} {report.step}/{report.steps}  {_words(report)}{left}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
