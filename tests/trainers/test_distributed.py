"""Two ranks over gloo are one run: same weights, same ledger; a rank that dies ends the other; any number resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attacks.training import resume_run, start_run
from dpaudit.documents import LedgerDocument
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.runs import RunFolder
from tests.trainers import ranks
from tests.trainers.ranks import together
from trainers import feature_folder, probe
from trainers.distributed import Alone, Ranks, joined
from trainers.gradients import Gradient, UnitSum
from trainers.vlm import VisionLanguageModel

DPAUDIT = Path(sys.executable).parent / "dpaudit"
METHODS = {
    "dp-sgd": ["canaries.count=6", "canaries.kinds=[noise]", "training.optimizer=sgd"],
    "dual-priv": ["method=dual-priv", "reducer.keep=4", "reducer.fuse=3", "training.sampling=shuffle"],
    # Shards of the base model, and more passes on one rank than on the other.
    "fsdp": ["training.parallel=fsdp", "training.rows-at-once=2", "pruning={by: previous, keep: 0.5}"],
    "dp-zo": ["method=dp-zo", "zeroth-order.directions=3", "training.learning-rate=1e-3"],
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "release/model/adapter_model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    assert RunFolder(one).ledger.read_bytes() == RunFolder(two).ledger.read_bytes()
    assert RunFolder(one).claim.read_bytes() == RunFolder(two).claim.read_bytes()
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= 1e-6, worst


@pytest.mark.parametrize("method", list(METHODS))
def test_two_ranks_equal_one(tiny: Path, tmp_path: Path, method: str) -> None:
    codes, errors = together(ranks.start, tiny, tmp_path / "two", *METHODS[method], notes=tmp_path)
    assert codes == [0, 0], errors
    ranks.start(tiny, tmp_path / "one", *METHODS[method])
    assert_same_run(tmp_path / "one", tmp_path / "two")
    # The hook sees the whole sum and the whole noise, on rank 0 (`ranks.start` asserts that it is silent elsewhere).
    one, two = (load_file(tmp_path / name / "seen.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    # dp-zo divides a difference of losses by 2e-3, so float32 rounding of 1e-7 becomes 1e-4.
    allowed = 1e-3 if method == "dp-zo" else 1e-5
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= allowed * scale
    lines = [json.loads(line) for line in (tmp_path / "two/private/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / "two/release/environment.json").read_text().count("cpu on 2 ranks") == 1


def test_ghost_norms_and_features_of_two_ranks_are_those_of_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("training.gradient-path=ghost", "training.feature-cache=always")
    codes, errors = together(ranks.start_sharing, tiny, tmp_path / "two", *extra, notes=tmp_path)
    assert codes == [0, 0], errors
    (part,) = feature_folder.parts(tmp_path / "features")
    assert (part.pictures, len(part.files)) == (21, 2), "each rank keeps its own pictures there"
    monkeypatch.setenv(feature_folder.VARIABLE, str(tmp_path / "features"))
    monkeypatch.setattr(probe, "check", lambda *_: None)  # it encodes a picture of noise
    monkeypatch.setattr(VisionLanguageModel, "encoded", lambda *_: pytest.fail("encoded again"))
    ranks.start(tiny, tmp_path / "one", *extra)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_gradient_canaries_score_the_same_on_two_ranks(tiny: Path, tmp_path: Path) -> None:
    codes, errors = together(ranks.twin, tiny, tmp_path / "two", "model.lora.rank=4", notes=tmp_path)
    assert codes == [0, 0], errors
    ranks.twin(tiny, tmp_path / "one", "model.lora.rank=4")
    one, two = (np.array(json.loads((tmp_path / name / "scores.json").read_text())) for name in ("one", "two"))
    assert np.abs(one).max() > 0.1 and np.allclose(one, two, atol=1e-4)
    assert_same_run(tmp_path / "one", tmp_path / "two")


class _Stopped(Exception):
    """Power failure at a step, in a single process."""


def test_one_process_stopped_and_two_resume(tiny: Path, tmp_path: Path) -> None:
    config = ranks.settings(tiny, *METHODS["fsdp"])

    def stop(step: int, noisy: Gradient, known: Gradient) -> None:
        if step == 4:
            raise _Stopped

    with pytest.raises(_Stopped):
        start_run(config, tmp_path / "cut", dataset=ranks.data(), after_step=stop)
    spent = LedgerDocument.read(RunFolder(tmp_path / "cut").ledger).spent
    assert spent is not None and spent.steps_started == 4  # paid for, though nobody applied it
    codes, errors = together(ranks.resume, tiny, tmp_path / "cut", notes=tmp_path)
    assert codes == [0, 0], errors
    start_run(config, tmp_path / "whole", dataset=ranks.data())
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_each_rank_keeps_its_share_of_the_frozen_layers(tiny: Path, tmp_path: Path) -> None:
    codes, errors = together(ranks.shares, tiny, tmp_path, notes=tmp_path)
    assert codes == [0, 0], errors
    (one, whole, adapter_one), (two, _, adapter_two) = (
        json.loads((tmp_path / f"share-{rank}").read_text()) for rank in (0, 1)
    )
    assert one + two == whole and max(one, two) <= 0.52 * whole
    assert adapter_one == adapter_two > 0  # the adapter lies whole on every rank


def test_a_rank_that_dies_among_shards_ends_the_other(tiny: Path, tmp_path: Path) -> None:
    """The loss shows inside FSDP's own exchanges; the run goes on alone, with the whole base model."""
    extra = ["training.parallel=fsdp", "training.gradient-path=micro-batch"]
    codes, errors = together(ranks.dies, tiny, tmp_path / "cut", *extra, notes=tmp_path)
    assert codes == [4, -signal.SIGKILL], errors
    assert errors[0].startswith("EnvironmentFailure: rank 0 of 2: lost another rank")
    ranks.resume(tiny, tmp_path / "cut")
    start_run(ranks.settings(tiny, *extra), tmp_path / "whole", dataset=ranks.data())
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_errors_of_one_rank_are_errors_of_all(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    codes, errors = together(ranks.start, tiny, tmp_path / "taken", notes=tmp_path)
    assert codes == [2, 2] and errors[0] == errors[1] and errors[0].startswith("UsageError: --out")
    codes, errors = together(ranks.other_data, tiny, tmp_path / "run", notes=tmp_path)
    assert codes == [4, 4]
    assert errors == ["EnvironmentFailure: rank 1: has other data than rank 0; start every rank alike"] * 2


def rank_command(tiny: Path, out: Path, rank: int, port: int) -> "subprocess.Popen[str]":
    extra = ["training.steps=24", "training.checkpoint-every=5", "data.limit=40"]
    command = [str(DPAUDIT), "train", f"model.path={tiny}", *ranks.FAST, *extra, "--out", str(out)]
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(command, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_kill_of_one_rank_ends_the_other_and_one_process_resumes(tiny: Path, tmp_path: Path) -> None:
    """`kill -9` of rank 1: rank 0 stops with one line and exit code 4; resumed alone the run loses nothing."""
    out, port = tmp_path / "killed", ranks.free_port()
    processes = [rank_command(tiny, out, rank, port) for rank in (0, 1)]
    metrics = out / "private/metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and processes[0].poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 6:
            break
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, stderr = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert processes[0].returncode == 4, stderr
    assert processes[1].wait(10) == -signal.SIGKILL
    last = [line for line in stderr.splitlines() if line.startswith("dpaudit: ")]
    assert len(last) == 1 and "rank 0 of 2: lost another rank" in last[0] and "--resume" in last[0]
    assert "Traceback" not in stderr
    spent = LedgerDocument.read(RunFolder(out).ledger).spent
    assert spent is not None and 6 <= spent.steps_started < 24, "the kill came too late to test anything"
    resume_run(out)
    config = ranks.settings(tiny, "training.steps=24", "training.checkpoint-every=5", "data.limit=40")
    start_run(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)


def join(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined() as group:
        assert group.first and group.size == 1


def test_launchers_that_say_too_little_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    join(monkeypatch)
    join(monkeypatch, WORLD_SIZE="1", RANK="0")
    with pytest.raises(UsageError, match=r"^MASTER_ADDR: not set, but WORLD_SIZE is 2"):
        join(monkeypatch, WORLD_SIZE="2", RANK="0")
    full = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    with pytest.raises(UsageError, match=r"^RANK: got 2; accepted: 0 to 1"):
        join(monkeypatch, **full, RANK="2")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE: got 'two'"):
        join(monkeypatch, WORLD_SIZE="two")
    with pytest.raises(EnvironmentFailure, match=r"^rank 1 of 2: the ranks don't find each other"):
        join(monkeypatch, **full, RANK="1", DPAUDIT_RANK_TIMEOUT="1")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_unit_belongs_to_one_rank(size: int) -> None:
    units, batch = list("abcdefghijk"), [0, 3, 4, 7, 10]
    groups = [Ranks(rank, size) for rank in range(size)] if size > 1 else [Alone()]
    assert sorted(unit for group in groups for unit in group.own(units)) == units
    taken = sorted(group.own(units)[index] for group in groups for index in group.share(batch))
    assert taken == [units[index] for index in batch]


def test_a_device_is_chosen_by_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks(1, 2, 1).device("auto") == "auto"  # no CUDA here: as a single process would choose
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Ranks(rank, 4, rank % 2).device("auto") for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Ranks(1, 2, 1).device("cpu") == "cpu"
    with pytest.raises(UsageError, match=r"^model.device: got 'cuda:1'"):
        Ranks(0, 2, 0).device("cuda:1")
    with pytest.raises(EnvironmentFailure, match=r"^LOCAL_RANK 2: this machine has 2 CUDA"):
        Ranks(2, 4, 2).device("cuda")


def test_alone_nothing_is_sent() -> None:
    part = UnitSum({"w": torch.ones(2)}, torch.zeros(1), torch.zeros(1))
    alone = Alone()
    assert alone.add(part, [0]) is part and alone.publish(lambda: part.gradient, {}) is part.gradient
    assert alone.from_first(lambda: b"x") == b"x" and alone.device("auto") == "auto"
