"""`--executor`, `--address`, `--gpus-per-trial`: where independent trainings run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.errors import UsageError, rejected

if TYPE_CHECKING:
    from dpaudit.executors import Executor

LANES = 8  # shares into which many small jobs are dealt on a cluster; each share starts its libraries once

EXECUTOR_OPTION = typer.Option(help="local: processes on this machine; ray: a Ray cluster, see --address.")
ADDRESS_OPTION = typer.Option(
    help="Address of a running Ray cluster: auto or HOST:PORT (default: start Ray on this machine)."
)
GPUS_OPTION = typer.Option(help="Ray: GPUs per training, e.g. 0.25 for four trainings on one GPU.")
ExecutorName = Annotated[str, EXECUTOR_OPTION]
Address = Annotated[str | None, ADDRESS_OPTION]
GpusPerTrial = Annotated[float | None, GPUS_OPTION]


@dataclass(frozen=True)
class Chosen:
    """make: the executor, for a folder of logs or for none. lanes: how many shares keep it busy. connection: what holds
    it open between calls."""

    make: "Callable[[Path | None], Executor]"
    lanes: int
    connection: AbstractContextManager[object]


def choose(name: str, processes: int | None, threads: int, address: str | None, gpus: float | None) -> Chosen:
    """The executor that was asked for. Raises UsageError for a bad setting, before anything is written or started.

    processes: trainings side by side; None: PROCESSES here, and on Ray as many as the cluster has room for.
    """
    from dpaudit.executors import PROCESSES, LocalExecutor
    from dpaudit.forks import TRAINING

    if processes is not None and processes < 1:
        raise rejected("--processes", processes, "a whole number of at least 1")
    if name == "local":
        for flag, value in (("--address", address), ("--gpus-per-trial", gpus)):
            if value is not None:
                raise UsageError(f"{flag}: only with --executor ray")
        local = LocalExecutor(PROCESSES if processes is None else processes, threads, modules=TRAINING)
        return Chosen(lambda logs: replace(local, logs=logs), local.processes, nullcontext())
    if name != "ray":
        raise rejected("--executor", name, "local or ray")
    from dpaudit.executors_ray import RayExecutor

    far = RayExecutor(
        address=address,
        cpus_per_trial=threads,
        gpus_per_trial=gpus or 0.0,
        threads_per_process=threads,
        processes=processes,
    )
    return Chosen(lambda logs: replace(far, logs=logs), processes or LANES, far.connection())
