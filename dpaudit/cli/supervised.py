"""Commands that run other people's code, in a process of their own: code that ends it can't choose our exit code.

`os._exit(0)` in a step would look like a pass. The parent process does nothing but wait: it reads the exit code that
the command has reached from a pipe, and a command that ended without one reached no verdict.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from dpaudit.cli import console

FOREIGN = ("check", "audit-trainer")
_DEATH = 1  # prctl's PR_SET_PDEATHSIG
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def wanted(words: Sequence[str]) -> bool:
    """Whether this command line runs other people's code, on a system where a child ends with its parent (Linux)."""
    named = next((word for word in words if not word.startswith("-")), "")
    foreign = named in FOREIGN or (named == "audit" and any(word.partition("=")[0] == "--trainer" for word in words))
    return foreign and sys.platform == "linux"


def run(command: Callable[[], int]) -> int:
    """The exit code of `command`, or that of a defect where its process ended without one."""
    import ctypes

    reading, writing = os.pipe()
    parent, children, early = os.getpid(), list[int](), list[int]()

    def forward(number: int, _: object) -> None:
        if children:
            os.kill(children[0], number)
        else:
            early.append(number)

    before = {number: signal.getsignal(number) for number in _FORWARDED}
    for number in _FORWARDED:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, forward)
    child = os.fork()
    if child == 0:
        for number in _FORWARDED:
            signal.signal(number, before[number])
        os.close(reading)
        ctypes.CDLL(None).prctl(_DEATH, signal.SIGKILL)
        if os.getppid() != parent:  # gone before the line above
            os._exit(console.DEFECT)
        code = command()
        sys.stdout.flush()
        os.write(writing, bytes([code]))
        return code
    os.close(writing)
    children.append(child)
    told = b""
    for received in early:
        os.kill(child, received)
    _, status = os.waitpid(child, 0)  # goes on after a signal (PEP 475)
    os.set_blocking(reading, False)  # a process that the code under audit has left behind holds the other end open
    with contextlib.suppress(BlockingIOError):
        told = os.read(reading, 1)
    if told:
        return told[0]
    if os.WIFSIGNALED(status):
        _as_the_child(os.WTERMSIG(status))
    code = os.waitstatus_to_exitcode(status)
    if code == console.USAGE:  # a call that could not be interrupted (attacks.contract.guard.start_watchdog) said why
        return code
    console.log(f"dpaudit: the code under audit ended the process (exit code {code}); no verdict was reached")
    return console.DEFECT


def _as_the_child(number: int) -> None:
    """End by the signal that ended the child."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
