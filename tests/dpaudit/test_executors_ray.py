"""Jobs on a two-node Ray cluster: the results of local processes, also when a node is killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.executors import LocalExecutor, Outcome, load_function
from dpaudit.executors_ray import RayExecutor
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder

# As dpaudit does for --address, and before Ray is imported: the nodes ask for a token, and we present it.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'dpaudit[ray]'): NO CLUSTER TEST WAS RUN")
SQUARE = "tests.dpaudit.ray_jobs:square"


def start() -> Any:
    """Two nodes of one CPU each. Ray gives a node 30 seconds to start, which a loaded machine may miss."""
    from ray.cluster_utils import Cluster

    for attempt in range(5):
        made = Cluster()
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, include_dashboard=False)
            return made
        except Exception as error:  # Ray raises nothing more specific
            made.shutdown()
            if attempt == 4 or "timed out" not in str(error):
                raise
    return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = start()
    yield made
    ray.shutdown()
    made.shutdown()


def payloads(folder: Path, count: int, seconds: float) -> list[dict[str, Any]]:
    folder.mkdir()
    cwd = str(Path.cwd())
    return [{"index": index, "folder": str(folder), "seconds": seconds, "cwd": cwd} for index in range(count)]


def results(outcomes: list[Outcome]) -> list[tuple[int, Any, str | None]]:
    return sorted((outcome.index, outcome.result, outcome.error) for outcome in outcomes)


def attempts(folder: Path) -> dict[int, int]:
    return {int(path.name.rpartition("-")[2]): len(path.read_text().split()) for path in folder.glob("attempts-*")}


@pytest.mark.slow
def test_a_killed_node_costs_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    here = results(list(LocalExecutor(2).run(SQUARE, payloads(tmp_path / "local", 4, 0.1))))
    folder = tmp_path / "ray"
    jobs = payloads(folder, 4, 2.0)
    victim = cluster.worker_nodes and next(iter(cluster.worker_nodes))

    def kill_when_both_run() -> None:
        deadline = time.monotonic() + 120
        while len(attempts(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill_when_both_run)
    killer.start()
    told: list[int] = []
    executor = RayExecutor(address=cluster.address, logs=tmp_path / "logs")
    outcomes = list(executor.run(SQUARE, jobs, started=told.append))
    killer.join()
    assert results(outcomes) == here
    assert sorted(told) == [0, 1, 2, 3]
    tried = attempts(folder)
    assert sorted(tried) == [0, 1, 2, 3] and sum(tried.values()) >= 5, "no job was running on the node that was killed"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"job-{index:04d}.log" for index in range(4)]


@pytest.mark.slow
def test_failures_are_those_of_local_processes(cluster: Any) -> None:
    jobs = [{"kind": kind} for kind in ("usage", "kill", "fine")]
    function = "tests.dpaudit.jobs:mixed"
    far = results(list(RayExecutor(address=cluster.address).run(function, jobs)))
    assert far == results(list(LocalExecutor(2).run(function, jobs)))
    assert [error is None for _, _, error in far] == [False, False, True]


@pytest.mark.slow
def test_one_training_of_a_multi_run_audit_is_that_of_here(cluster: Any, tmp_path: Path) -> None:
    """benchmarks/cluster.py compares whole documents."""
    from attacks.external.options import TrainerOptions

    key = RunFolder.create(tmp_path / "audit").noise_key
    Key.from_seed(1).save(key)
    options = TrainerOptions("tests.attacks.external_toy:factory", runs=20, steps=2)
    payload = {"options": asdict(options), "folder": str(tmp_path / "audit"), "run": 3, "member": True}
    function = "attacks.external.runs:job"
    with RayExecutor(address=cluster.address).connection():
        (far,) = RayExecutor(address=cluster.address).run(function, [payload])
    assert far.error is None
    assert far.result == load_function(function)(json.loads(json.dumps(payload)))


_DRIVER = """
import json, sys
from dpaudit.executors_ray import RayExecutor
for outcome in RayExecutor(address=sys.argv[1]).run("tests.dpaudit.ray_jobs:square", json.loads(sys.argv[2])):
    print(outcome.index, flush=True)
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_job_behind(cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    jobs = payloads(folder, 1, 600)
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, cluster.address, json.dumps(jobs)], cwd=Path.cwd())
    deadline = time.monotonic() + 120
    while not attempts(folder).get(0) and time.monotonic() < deadline:
        time.sleep(0.05)
    job = int((folder / "attempts-0").read_text().split()[0])
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while Path(f"/proc/{job}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{job}").exists(), "the job of a dead driver still runs"
    again = payloads(tmp_path / "again", 1, 0.0)
    assert results(list(RayExecutor(address=cluster.address).run(SQUARE, again)))[0][2] is None


def test_what_no_node_can_offer_is_refused_at_once(cluster: Any) -> None:
    with pytest.raises(EnvironmentFailure, match="--gpus-per-trial"):
        list(RayExecutor(address=cluster.address, gpus_per_trial=1).run(SQUARE, [{}]))
    assert list(RayExecutor(address="nowhere:1").run(SQUARE, [])) == []


@pytest.mark.parametrize(
    ("setting", "value"), [("cpus_per_trial", 0.0), ("gpus_per_trial", 1.5), ("gpus_per_trial", -1.0), ("processes", 0)]
)
def test_bad_settings(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=setting.replace("_", "-")):
        RayExecutor(**{setting: value})  # type: ignore[arg-type]


_ALONE = """
import json, os
import psutil
from dpaudit.executors_ray import RayExecutor
with RayExecutor().connection():
    servers = psutil.Process().children(recursive=True)
    mine = {process.pid for process in servers} | {os.getpid()}
    found = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in mine]
    modes = {p.name(): p.environ().get("RAY_AUTH_MODE") for p in servers if p.name() in ("gcs_server", "raylet")}
print(json.dumps({"addresses": found, "modes": modes, "token": len(os.environ["RAY_AUTH_TOKEN"])}))
"""


def test_ray_on_this_machine_is_for_this_machine_and_this_process(tmp_path: Path) -> None:
    """Left to itself Ray listens on all interfaces; whoever gets in runs code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    typed = [sys.executable, "-c", _ALONE]
    done = subprocess.run(typed, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["addresses"]) >= 4
    assert all(address.removeprefix("::ffff:").startswith("127.") for address in told["addresses"]), told
    assert told["modes"] == {"gcs_server": "token", "raylet": "token"} and told["token"] == 64
    assert not (tmp_path / ".ray").exists(), "the token stays in memory"
