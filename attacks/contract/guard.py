"""Foreign code under guard: every call has a time limit, and every failure is one line that names the method."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpaudit import packages
from dpaudit.errors import UsageError

TIME_LIMIT = 30.0  # seconds a call; a step of a small model takes milliseconds

# `signal.signal` without its wrapper in Python, which looks every handler up in an enumeration and takes longer to fail
# at that than all the rest of a guarded call.
_handle = getattr(signal, "_signal", signal).signal


class MethodFailure(UsageError):
    """A method of the trainer under test raised, hung or returned something else than it should."""

    def __init__(self, method: str, problem: str) -> None:
        super().__init__(f"{method}: {problem}")
        self.method, self.problem = method, problem


class TookTooLong(MethodFailure):
    """It did not return within its time limit."""


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
    previous = _handle(signal.SIGALRM, expire)
    theirs, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _handle(signal.SIGALRM, previous)
        if theirs > 0:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, theirs - (time.monotonic() - began)), interval)


class _Watched:
    """What is being called at the moment, and until when it may take."""

    method: str | None = None
    deadline = 0.0


def start_watchdog(report: Callable[[str], None], *, grace: float = 5.0) -> None:
    """End the process with exit code 2 when a call ignores its time limit (a hang inside a C extension).

    For the command line only: `report` gets the one line. The signal of `time_limit` can't interrupt foreign C code.
    """

    def watch() -> None:
        while True:
            time.sleep(0.25)
            method = _Watched.method
            if method is not None and time.monotonic() > _Watched.deadline + grace:
                report(f"{method}: did not return and could not be interrupted (--time-limit)")
                os._exit(2)

    threading.Thread(target=watch, daemon=True, name="dpaudit-watchdog").start()


def call(method: str, function: Callable[..., Any], *arguments: Any, limit: float = TIME_LIMIT, **options: Any) -> Any:
    """`function(*arguments, **options)`; raises MethodFailure with one line for whatever goes wrong in it."""
    _Watched.deadline = time.monotonic() + limit
    _Watched.method = method
    try:
        with time_limit(limit), packages.theirs():
            return function(*arguments, **options)
    except _Expired:
        raise TookTooLong(method, f"did not return within {limit:g} s (--time-limit)") from None
    except UsageError as error:  # ours, with a line of its own (a claim that can't be true)
        field, _, problem = str(error).partition(": ")
        ours = (field, problem) if field.startswith(f"{method}.") else (method, str(error))
        raise MethodFailure(*ours) from error
    # The code is not ours: anything may come out of it, and the reader needs the method's name and not our stack.
    except (Exception, SystemExit) as error:
        raise MethodFailure(method, f"raised {describe(error)}") from error
    finally:
        _Watched.method = None


def describe(error: BaseException) -> str:
    """Type, message and the place in the user's code, on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 160 else text[:157] + "..."
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    # An argument that their function does not take is raised here, in none of their lines.
    theirs = place is not None and place.tb_frame.f_code.co_filename != __file__
    where = f" ({Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno})" if place and theirs else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
