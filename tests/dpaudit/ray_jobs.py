"""Jobs for the tests of dpaudit.executors_ray."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from dpaudit.runs import RunFolder


def square(payload: dict[str, Any]) -> dict[str, Any]:
    """A slow job that notes every attempt and holds the lock of a run, as a training does."""
    folder = Path(payload["folder"])
    run = RunFolder.create(folder / f"run-{payload['index']}")
    with (folder / f"attempts-{payload['index']}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    with run.lock():
        deadline = time.monotonic() + payload["seconds"]
        while time.monotonic() < deadline:
            time.sleep(0.05)
    here = Path.cwd() == Path(payload["cwd"])
    return {"square": payload["index"] ** 2, "here": here, "arguments": sys.argv[1:]}
