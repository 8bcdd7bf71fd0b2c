"""Other people's training loops, stopped whenever they ask for the next batch.

A loop runs unchanged in a thread of its own and never at the same time as the caller: `advance` hands it a batch and
waits until it asks for the next one. So set-up, counters, schedulers and callbacks are those of a training, and a fault
that starts late starts late here too.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpaudit.errors import UsageError

Batch = list[int]
NEVER = 1_000_000  # batches that a feed says it has, where it is asked


class _Stop(BaseException):
    """Ends a loop from inside; not an Exception, so that the loop's own `except Exception` can't swallow it."""


class Feed:
    """A batch sampler whose batches come from `Loop.advance`; the loop's data loader iterates over it."""

    def __init__(self) -> None:
        self.asks: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.batches: queue.SimpleQueue[Sequence[Batch] | None] = queue.SimpleQueue()
        self._pending: list[Batch] = []
        self.length = NEVER
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if not self._pending:
                if self.closed:
                    raise _Stop
                self.asks.put("next")
                given = self.batches.get()
                if given is None:
                    raise _Stop
                self._pending = list(given)
            yield self._pending.pop(0)

    def __len__(self) -> int:
        return self.length


class Loop:
    """One run of `body(feed)`. name: what the user calls it, for messages."""

    def __init__(
        self, name: str, body: Callable[[Feed], Any], wrap: Callable[[Callable[[], None]], Callable[[], None]]
    ):
        self.name, self.feed = name, Feed()
        self._state = "new"  # new | waiting | running | over
        self._thread = threading.Thread(target=wrap(_runner(body, self.feed)), daemon=True, name=f"dpaudit-{name}")

    def start(self) -> None:
        """Run up to the first request for a batch; does nothing later."""
        if self._state != "new":
            return
        self._state = "running"
        self._thread.start()
        self._wait()
        if self._state == "over":
            raise UsageError(f"{self.name}: returned without asking the loader for a batch")

    def advance(self, batches: Sequence[Batch]) -> None:
        """One logical batch, as the physical batches that the loop takes it in. Raises what the loop raises."""
        self.start()
        if self._state != "waiting":
            raise UsageError(
                f"{self.name}: the loop is over; accepted: a loop that continues while the loader has batches"
            )
        self._state = "running"
        self.feed.batches.put(batches)
        self._wait()

    def _wait(self) -> None:
        answer = self.feed.asks.get()
        self._state = "waiting" if answer == "next" else "over"
        if isinstance(answer, BaseException):
            raise answer

    def close(self) -> None:
        """End the thread. Safe to call at any time."""
        if self._state == "waiting":
            self._state, self.feed.closed = "over", True
            self.feed.batches.put(None)
            self._thread.join(timeout=2.0)


def _runner(body: Callable[[Feed], Any], feed: Feed) -> Callable[[], None]:
    """Holds no reference to the loop object, which may be collected while the thread waits."""

    def run() -> None:
        try:
            body(feed)
        except _Stop:
            return
        except BaseException as error:  # whatever foreign code raises is raised again where the caller waits
            if not feed.closed:
                feed.asks.put(error)
            return
        feed.asks.put("over")

    return run
