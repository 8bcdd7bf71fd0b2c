"""Modules for the tests of dpaudit.forks: who imported this, and what a copy starts from."""

import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np

IMPORTED_BY = os.getpid()
STATE: list[int] = []


def write(out: str) -> int:
    """Into the file `out`: who imported this module, who runs it, and what is random."""
    STATE.append(1)
    drawn = [random.random(), float(np.random.random()), os.urandom(8).hex()]
    about = [IMPORTED_BY, os.getpid(), len(STATE), drawn, sys.argv[1:], os.environ.get("ADDED"), os.getpgrp()]
    Path(out).write_text(repr(about))
    print("said on standard output")
    sys.stderr.write(f"in {Path.cwd()}\n")
    return 7


def leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def stay(out: str) -> None:
    Path(out).write_text(str(os.getpid()))
    time.sleep(60)


def fail() -> None:
    raise ZeroDivisionError("division by nothing")


def stop(code: object) -> None:
    raise SystemExit(code)
