"""Jobs for the tests of dpaudit.executors."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.executors import Outcome, load_function


def double(payload: dict[str, Any]) -> dict[str, Any]:
    return {"value": 2 * payload["value"], "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def arguments(payload: dict[str, Any]) -> dict[str, Any]:
    return {"arguments": sys.argv[1:]}


def mixed(payload: dict[str, Any]) -> dict[str, Any]:
    print("said by", payload["kind"])
    match payload["kind"]:
        case "usage":
            raise UsageError("field: got 1; accepted: 2")
        case "bug":
            raise ZeroDivisionError("division by nothing")
        case "disk":
            raise EnvironmentFailure("FILE: can't be written: the disk is full")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "unwritable":
            return {"x": {1, 2}}
    return {"kind": payload["kind"]}


def wait(payload: dict[str, Any]) -> dict[str, Any]:
    """Start a grandchild, say who both are, and stay."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    Path(payload["folder"], f"{os.getpid()}").write_text(str(child.pid))
    time.sleep(60)
    return {}


def first_is_quick(payload: dict[str, Any]) -> dict[str, Any]:
    if payload["index"]:
        time.sleep(60)
    return {}


def heavy(payload: dict[str, Any]) -> dict[str, Any]:
    return {"loaded": sorted({"torch", "transformers"} & set(sys.modules)), "first": sys.path[0]}


class InProcess:
    """An executor that runs every job here, the last first; everything passes through JSON. `payloads`: what it got."""

    def __init__(self) -> None:
        self.payloads: list[dict[str, Any]] = []

    def run(self, function: str, payloads: Any, *, started: Any = None) -> Iterator[Outcome]:
        self.payloads += [json.loads(json.dumps(payload)) for payload in payloads]
        for index in reversed(range(len(payloads))):
            result = load_function(function)(json.loads(json.dumps(payloads[index])))
            yield Outcome(index, json.loads(json.dumps(result)), None, 0.0)


IMPORTED_BY = os.getpid()


def imported(payload: dict[str, Any]) -> dict[str, Any]:
    return {"by": IMPORTED_BY, "pid": os.getpid()}
