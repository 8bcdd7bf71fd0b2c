"""A trainer without a noise seed in a process of its own; started by attacks.contract.production."""

import contextlib
import json
import os
import sys

import numpy as np


def main() -> None:
    """Read the task from stdin, write the noise of a few steps to stdout as JSON."""
    task = json.load(sys.stdin)
    answer: dict[str, object]
    with contextlib.redirect_stdout(sys.stderr):
        from attacks.contract.loading import load_factory
        from attacks.contract.probe import Probe
        from dpaudit.errors import UsageError

        os.chdir(task["folder"])
        sys.path[:] = task["path"]
        try:
            factory = load_factory(task["target"], limit=task["limit"])
            probe = Probe(factory, seed=task["seed"], limit=task["limit"])
            subject = probe.build(probe.own, None)
            probe.watch(subject, task["batch"])
            rows = [probe.watch(subject, []).vector[: task["most"]] for _ in range(task["steps"])]
            answer = {"noise": np.stack(rows).tolist()}
        except UsageError as error:
            answer = {"problem": str(error)}
    sys.stdout.write(json.dumps(answer))
