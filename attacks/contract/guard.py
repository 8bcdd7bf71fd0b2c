"""Foreign code under guard: every call has a time limit, and every failure is one line that names the method."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpaudit.errors import UsageError

TIME_LIMIT = 30.0  # seconds a call; a step of a small model takes milliseconds


class MethodFailure(UsageError):
    """A method of the trainer under test raised, hung or returned something else than it should."""

    def __init__(self, method: str, problem: str) -> None:
        super().__init__(f"{method}: {problem}")
        self.method, self.problem = method, problem


class _Expired(BaseException):
    """Not an Exception, so that the trainer's own `except Exception` can't swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _Expired inside the block after `seconds`; does nothing outside the main thread or without SIGALRM.

    An alarm that somebody else set (a test runner's own time limit) is put back, shortened by the time spent here.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(*_: object) -> None:
        raise _Expired

    began = time.monotonic()
    previous = signal.signal(signal.SIGALRM, expire)
    theirs, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if theirs > 0:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, theirs - (time.monotonic() - began)), interval)


def call(method: str, function: Callable[..., Any], *arguments: Any, limit: float = TIME_LIMIT, **options: Any) -> Any:
    """`function(*arguments, **options)`; raises MethodFailure with one line for whatever goes wrong in it."""
    try:
        with time_limit(limit):
            return function(*arguments, **options)
    except _Expired:
        raise MethodFailure(method, f"did not return within {limit:g} s (--time-limit)") from None
    # The code is not ours: anything may come out of it, and the reader needs the method's name and not our stack.
    except (Exception, SystemExit) as error:
        raise MethodFailure(method, f"raised {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Type, message and the place in the user's code, on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 160 else text[:157] + "..."
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno})" if place is not None else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
