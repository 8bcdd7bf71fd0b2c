"""Independent jobs on a Ray cluster (`pip install 'dpaudit[ray]'`): the same jobs, the same results, more machines.

Ray only decides where a job runs. On the machine that it chose, the job runs as LocalExecutor runs it, in a fresh
process of its own, so results do not depend on the executor. A job whose worker or whole node died is run again
elsewhere; since a job keeps what it must not lose in its run folder, it goes on there. Payloads name folders: every
node needs the same file system at the same paths, and the same dpaudit.

Nothing of ours is pickled: function names, payloads and results travel as JSON text. Ray itself moves Python objects
inside the cluster and runs whatever reaches its ports: a cluster belongs in a network of its own, see
docs/threat-model.md.
"""

import contextlib
import ipaddress
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpaudit import atomic, temporary
from dpaudit.errors import EnvironmentFailure, rejected
from dpaudit.executors import ARGUMENTS, LocalExecutor, Outcome

RETRIES = 3  # times that a job is run again after its worker or node died
LOCK_WAIT = 180  # seconds that such a job waits for the lock of the process that it replaces
POLL = 0.5  # seconds between two looks at the cluster
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": this machine's addresses only, whatever the system
AUTH_MODE, AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
# Settings of the driver that a job needs wherever it runs.
FORWARDED = ("HF_", "TRANSFORMERS_", "DPAUDIT_", "CUBLAS_")

_GONE = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError", "OwnerDiedError")


@dataclass(frozen=True)
class RayExecutor:
    """Jobs on a Ray cluster.

    address: of a running cluster ("auto", "host:6379"); None starts Ray on this machine alone, on its loopback
    address, and ends it afterwards. cpus_per_trial, gpus_per_trial: what a job takes of a node (a fraction of a GPU is
    fine: four jobs of 0.25 share one). processes: at most so many jobs at once; None: as many as the cluster has room
    for. logs: folder for `job-INDEX.log`, on the shared file system.
    """

    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    threads_per_process: int = 1
    processes: int | None = None
    logs: Path | None = None
    retries: int = RETRIES

    def __post_init__(self) -> None:
        if not 0 < self.cpus_per_trial <= 1024:
            raise rejected("--cpus-per-trial", self.cpus_per_trial, "a number above 0")
        if not 0 <= self.gpus_per_trial <= 1024 or (self.gpus_per_trial > 1 and self.gpus_per_trial % 1):
            raise rejected("--gpus-per-trial", self.gpus_per_trial, "0, a fraction of one GPU, or a whole number")
        if self.processes is not None and self.processes < 1:
            raise rejected("--processes", self.processes, "a whole number of at least 1")
        LocalExecutor(1, self.threads_per_process)  # its own check of the threads

    def run(
        self,
        function: str,
        payloads: Sequence[Mapping[str, Any]],
        *,
        started: Callable[[int], None] | None = None,
    ) -> Iterator[Outcome]:
        """See Executor.run. `started` is told when a job is handed to the cluster, which has room for it.

        Raises EnvironmentFailure: no Ray, no cluster at the address, a cluster without what one job needs.
        """
        texts = [json.dumps(dict(payload)) for payload in payloads]
        if not texts:
            return
        with _cluster(self.address, self.cpus_per_trial, self.gpus_per_trial) as ray:
            task = ray.remote(_job).options(
                num_cpus=self.cpus_per_trial, num_gpus=self.gpus_per_trial, max_retries=self.retries
            )
            running: dict[Any, tuple[int, float]] = {}
            waiting = iter(enumerate(texts))
            try:
                while True:
                    for index, text in _up_to(self._room(ray) - len(running), waiting):
                        reference = task.remote(function, text, self.threads_per_process, _settings(), self._log(index))
                        running[reference] = (index, time.monotonic())
                        if started is not None:
                            started(index)
                    if not running:
                        return
                    ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL)
                    for reference in ended:
                        index, began = running.pop(reference)
                        yield self._outcome(ray, reference, index, began)
            finally:
                for reference in running:
                    with contextlib.suppress(ray.exceptions.RayError, ValueError):
                        ray.cancel(reference, force=True)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        """Holds the cluster between several calls of `run`, which would else connect (or start Ray) each time.

        Ray prints on standard output what happens to its nodes; meanwhile that goes to standard error.
        """
        with (
            contextlib.redirect_stdout(sys.stderr),
            _cluster(self.address, self.cpus_per_trial, self.gpus_per_trial) as ray,
        ):
            yield ray

    def _log(self, index: int) -> str | None:
        if self.logs is None:
            return None
        atomic.make_folder(self.logs)
        return str((self.logs / f"job-{index:04d}.log").resolve())

    def _room(self, ray: Any) -> int:
        """How many jobs the nodes that live have room for; at least one, so that a job can wait for a node."""
        total = ray.cluster_resources()
        room = int(total.get("CPU", 0.0) / self.cpus_per_trial)
        if self.gpus_per_trial:
            room = min(room, int(total.get("GPU", 0.0) / self.gpus_per_trial))
        return max(1, room if self.processes is None else min(room, self.processes))

    def _outcome(self, ray: Any, reference: Any, index: int, began: float) -> Outcome:
        seconds, log = time.monotonic() - began, self._log(index)
        try:
            answer = json.loads(ray.get(reference))
        except ray.exceptions.RayError as error:
            name = type(error).__name__
            why = f"its worker or node died {self.retries + 1} times" if name in _GONE else _last_line(error)
            code = EnvironmentFailure.exit_code
            return Outcome(index, None, f"{why} ({name})", seconds, Path(log) if log else None, code)
        place = Path(log) if log else None
        return Outcome(index, answer["result"], answer["error"], answer["seconds"], place, answer["code"])


def _up_to(count: int, items: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for _ in range(max(0, count)):
        with contextlib.suppress(StopIteration):
            yield next(items)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1].strip()[:300]


def _settings() -> dict[str, str]:
    """The driver's settings that jobs need, and where it stands."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    return {ARGUMENTS: json.dumps(sys.argv[1:]), **chosen, "DPAUDIT_FOLDER": os.getcwd()}


def _job(function: str, payload: str, threads: int, settings: dict[str, str], log: str | None) -> str:
    """One job on the node that Ray chose: a fresh process, as LocalExecutor starts it. Runs in a Ray worker."""
    with contextlib.suppress(OSError):
        os.chdir(settings["DPAUDIT_FOLDER"])
    os.environ.update(settings)
    # When Ray runs a job again, the process that it replaces may not have noticed yet that it is alone.
    os.environ["DPAUDIT_WAIT_FOR_LOCK"] = str(LOCK_WAIT)
    with temporary.folder("ray") as name:
        executor = LocalExecutor(1, threads, name)
        outcome = next(executor.run(function, [json.loads(payload)]))
        if log is not None and outcome.log is not None:
            with contextlib.suppress(OSError, EnvironmentFailure):
                atomic.write_bytes(Path(log), outcome.log.read_bytes())
    names = ("result", "error", "seconds", "code")
    return json.dumps({name: getattr(outcome, name) for name in names})


@contextlib.contextmanager
def _cluster(address: str | None, cpus: float, gpus: float) -> Iterator[Any]:
    """Ray, connected; left as it was found. EnvironmentFailure in one line where that can't be."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user wants it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _protect(address)
    try:
        import ray
    except ImportError:
        raise EnvironmentFailure("--executor ray: Ray is not installed; pip install 'dpaudit[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        _check_room(ray, cpus, gpus)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _protect(address: str | None) -> None:
    """Set what Ray reads when it is imported: who reaches one of its ports, and knows the token, runs code here.

    On this machine alone: loopback addresses only, which Ray itself does on Windows and macOS (on Linux it replaces
    127.0.0.1 by the address of the machine), and a token that lives as long as this process. To a cluster we present a
    token unless the user says that it has none.
    """
    if address is None:
        os.environ[LOOPBACK_ONLY] = "0"
        os.environ[AUTH_MODE] = "token"
        os.environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
    else:
        os.environ.setdefault(AUTH_MODE, "token")


def _require_loopback(ray: Any) -> None:
    """EnvironmentFailure where Ray listens on other addresses all the same, as when it was imported before."""
    found = str(ray.util.get_node_ip_address())
    if not ipaddress.ip_address(found).is_loopback:
        ray.shutdown()
        raise EnvironmentFailure(
            f"--executor ray: Ray would listen on {found} instead of this machine's loopback address; start a cluster "
            "of your own and give --address"
        )


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except ray.exceptions.AuthenticationError as error:
        hint = f"{AUTH_TOKEN} or {AUTH_TOKEN}_PATH hold its token; {AUTH_MODE}=disabled where it has none"
        raise EnvironmentFailure(f"--address: the cluster takes no unknown callers ({hint})") from error
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        where = "on this machine" if address is None else f"at {address!r}"
        raise EnvironmentFailure(f"--address: no Ray cluster {where} ({_last_line(error)})") from None
    if address is None:
        _require_loopback(ray)
    sys.stderr.flush()


def _check_room(ray: Any, cpus: float, gpus: float) -> None:
    """Refuse a job that no node could ever take; Ray itself would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        have = f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs and {sum(node.get('GPU', 0) for node in nodes):g}"
        raise EnvironmentFailure(
            f"--gpus-per-trial: no node of the cluster offers {cpus:g} CPUs and {gpus:g} GPUs to one trial; "
            f"{len(nodes)} nodes with {have} GPUs in all"
        )
