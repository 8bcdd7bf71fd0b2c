"""`benchmarks/gpu.py --tiny`: the command for a CUDA machine, played on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tiny_shape_gives_every_figure_of_the_large_one(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert found["tests"]["failed"] == [] and found["tests"]["passed"] >= 9 and found["tests"]["skipped"] == 0
    for name, arm in found["arms"].items():
        assert "not measured" not in arm, (name, arm)
        assert all(value > 0 for value in arm["seconds"].values()) and arm["peak_mib_above_the_model"] > 0
    # The same model in every arm, and zeroth order draws as many numbers as it has probes.
    assert len({arm["parameters"] for arm in found["arms"].values()}) == 1
    assert len(found["relative memory"]) == 4


def test_without_cuda_the_large_shape_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "no CUDA device; --tiny" in done.stderr
