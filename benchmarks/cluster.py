"""A sweep, a multi-run audit and reference models on two Ray nodes: one killed in the middle, and the same result.

    python benchmarks/cluster.py        # writes benchmarks/results/cluster.json

The nodes are processes of this machine (ray.cluster_utils.Cluster), each with one CPU. Cells are trainings of a model
of a few thousand weights with their benchmark through lmms-eval: what is tested is that nothing is lost, done twice
into the same place, or computed differently; not speed. The driver of the sweep is killed as well, and resumed.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before Ray is imported: the nodes ask for a token, and dpaudit presents it.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
import yaml
from ray.cluster_utils import Cluster

from dpaudit import atomic
from tests.faults.scenarios import SETTINGS, write_data
from tests.tiny import save_tiny_llava

RESULTS = Path(__file__).parent / "results" / "cluster.json"
DPAUDIT = [sys.executable, "-m", "dpaudit"]
PATIENCE = 14_400  # seconds for one sweep, on a machine that has much else to do
TIMES = ("seconds", "started", "ended", "command")  # what differs by nature; the command names the executor
RUNS = ("--trainer", "tests.attacks.external_toy:factory", "--runs", "20", "--steps", "2", "--seed", "1")
REFERENCES = ("--mia", "--references", "4", "--processes", "4")  # a share for each: no stack of several models


def grid(root: Path) -> Path:
    """Four cells: two budgets, two seeds."""
    settings = [item for item in SETTINGS if not item.startswith(("seed", "privacy.noise-multiplier"))]
    model = save_tiny_llava(root / "model", reserved=8)
    data = write_data(root / "data", 80)  # 68 to train on: an audit of real records needs 40
    settings += [f"model.path={model}", f"data.path={data}", "data.train=train.jsonl", "data.test=test.jsonl"]
    tree = {
        "name": "cluster",
        "settings": {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in settings)},
        "grid": {"privacy.noise-multiplier": [1.0, 2.0]},
        "seeds": [0, 1],
    }
    tree["settings"]["privacy.epsilon"] = None
    path = root / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(nodes: int) -> Cluster:
    """A cluster of one-CPU nodes. Ray gives a node 30 seconds to start, which a loaded machine may miss."""
    for attempt in range(8):
        made = Cluster()
        try:
            for _ in range(nodes):
                made.add_node(num_cpus=1, include_dashboard=False)
            return made
        except Exception as error:  # Ray raises nothing more specific
            made.shutdown()
            if attempt == 7 or "timed out" not in str(error):
                raise
    raise AssertionError


def sweep(grid_file: Path, out: Path, *extra: str) -> "subprocess.Popen[str]":
    command = [*DPAUDIT, "sweep", str(grid_file), "--out", str(out), "--json", *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def without_times(tree: Any) -> Any:
    """A sweep document without how long things took."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(item) for item in tree] if isinstance(tree, list) else tree


def finish(process: "subprocess.Popen[str]", place: Path) -> Any:
    """The sweep's document without times, and the hash of every adapter."""
    out, _ = process.communicate(timeout=PATIENCE)
    if process.returncode != 0:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}")
    adapters = sorted((place / "runs").glob("*/release/model/adapter_model.safetensors"))
    weights = {path.parents[2].name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapters}
    return {"document": without_times(json.loads(out)), "weights": weights}


def when_training(out: Path, count: int) -> float:
    """Wait until `count` cells have begun to train; seconds."""
    began = time.monotonic()
    while sum(1 for _ in (out / "runs").glob("*/private/metrics.jsonl")) < count:
        if time.monotonic() - began > PATIENCE:
            raise SystemExit("no training began")
        time.sleep(0.05)
    return time.monotonic() - began


def audits(root: Path, cluster: Cluster, ray_flags: tuple[str, ...]) -> dict[str, Any]:
    """A multi-run audit and a membership audit with reference models, each here and on the cluster, a node killed."""
    first = sorted((root / "node" / "runs").iterdir())[0]
    found: dict[str, Any] = {}
    for name, words, log in (
        ("a multi-run audit", [*RUNS, "--out"], "private/runs.jsonl"),
        ("reference models", [*REFERENCES], "twin-members/private/references/progress-*.json"),
    ):
        place = root / "audited"
        documents = []
        for flags in ((), ray_flags):
            shutil.rmtree(place, ignore_errors=True)
            if words[-1] != "--out":
                shutil.copytree(first, place)
            command = [*DPAUDIT, "audit", *words, str(place), *flags, "--json"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if flags:
                began = time.monotonic()
                while not list(place.glob(log)) and process.poll() is None and time.monotonic() - began < PATIENCE:
                    time.sleep(0.05)
                cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            out, err = process.communicate(timeout=PATIENCE)
            if not out:
                raise SystemExit(f"{name}: exit code {process.returncode}: {err[-2000:]}")
            documents.append((process.returncode, without_times(json.loads(out))))
            if flags:
                cluster.add_node(num_cpus=1)
        found[f"{name}, a node killed while it trained: same JSON"] = documents[0] == documents[1]
    return found


def main() -> None:
    """Local, with a node killed, with the driver killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-cluster-"))
    found: dict[str, Any] = {"ray": ray.__version__, "nodes": 2, "cpus per node": 1}
    try:
        file = grid(root)
        place = root / "sweep"  # the same for all three: paths are part of a document
        here = finish(sweep(file, place), place)
        found["cells"] = len(here["weights"])
        shutil.move(place, root / "local")

        cluster = start(2)
        ray_flags = ("--executor", "ray", "--address", cluster.address)
        process = sweep(file, place, *ray_flags)
        when_training(place, 2)
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        found["a node killed while it trained: same JSON and weights"] = finish(process, place) == here
        shutil.move(place, root / "node")

        cluster.add_node(num_cpus=1)
        found |= audits(root, cluster, ray_flags)

        process = sweep(file, place, *ray_flags)
        when_training(place, 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and _jobs(place):
            time.sleep(0.2)
        found["jobs left behind by a killed driver"] = len(_jobs(place))
        again = finish(sweep(file, place, *ray_flags, "--resume"), place)
        found["the driver killed, then --resume: same JSON and weights"] = again == here
        cluster.shutdown()
        atomic.write_text(options.out, json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _jobs(out: Path) -> list[int]:
    """Processes that still hold the lock of a run below `out`."""
    import fcntl

    held = []
    for lock in (out / "runs").glob("*/private/lock"):
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(1)
        finally:
            os.close(descriptor)
    return held


if __name__ == "__main__":
    main()
