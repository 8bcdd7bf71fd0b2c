"""The run folder: modes, refusals, one process at a time, nothing used half-written."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dpaudit import atomic
from dpaudit.config import read_yaml, resolve
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.runs import RunFolder


def finished_run(path: Path) -> RunFolder:
    run = RunFolder.create(path)
    atomic.write_text(run.config, "method: dp-sgd\n")
    atomic.write_bytes(run.model / "adapter.safetensors", bytes(100))
    (run.model / "tokenizer").mkdir()
    atomic.write_text(run.model / "tokenizer" / "vocab.json", "{}")
    run.finish_model()
    return run


def test_layout_and_modes(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run")
    root = tmp_path / "deep" / "run"
    assert stat.S_IMODE(run.private.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.checkpoints.stat().st_mode) == 0o700
    named = {
        "release/config.yaml": run.config,
        "release/claim.json": run.claim,
        "release/ledger.json": run.ledger,
        "release/model": run.model,
        "release/audit.json": run.audit,
        "release/benchmark.json": run.benchmark,
        "release/environment.json": run.environment,
        "private/coins.parquet": run.coins,
        "private/scores.parquet": run.scores,
        "private/metrics.jsonl": run.metrics,
        "private/noise.key": run.noise_key,
        "private/checkpoints": run.checkpoints,
    }
    for name, path in named.items():
        assert path == root / name


def test_create_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "build" / "release").mkdir(parents=True)
    for name in ("file", "other", "build"):
        with pytest.raises(UsageError) as caught:
            RunFolder.create(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(entry.name for entry in (tmp_path / "other").iterdir()) == ["thesis.tex"]
    assert not (tmp_path / "build" / "private").exists()


def test_create_takes_up_an_empty_folder_an_interrupted_one_and_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty")
    (tmp_path / "interrupted" / "private").mkdir(parents=True, mode=0o755)
    (tmp_path / "interrupted" / "private").chmod(0o700)
    assert RunFolder.create(tmp_path / "interrupted").model.is_dir()
    run = finished_run(tmp_path / "run")
    (run.path / "twin-canaries").mkdir()
    assert RunFolder.create(tmp_path / "run") == run and run.finished


def test_create_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="file"):
        RunFolder.create(tmp_path / "file" / "run")


def test_open(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder.open(tmp_path)
    assert RunFolder.open(finished_run(tmp_path / "run").path).finished


_HOLDER = """
import sys, time
from pathlib import Path
from dpaudit.runs import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentFailure) as caught, run.lock():
            pass
        assert f"process {holder.pid}" in str(caught.value) and "\n" not in str(caught.value)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with run.lock():
        assert (run.private / "lock").read_text() == str(os.getpid())
        with pytest.raises(EnvironmentFailure), RunFolder(run.path).lock():
            pass
    with run.lock():
        pass


def test_lock_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), atomic.replacing(run.model / "w") as temporary:
        name = temporary.name
        raise KeyboardInterrupt
    left = run.model / name
    left.write_bytes(b"half")
    (run.release / ".keep").write_text("not ours")
    with run.lock():
        assert not left.exists() and (run.release / ".keep").exists()


def test_lock_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="does not exist"), RunFolder(tmp_path / "none").lock():
        pass


def test_require_finished(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    run.require_finished()
    recorded = json.loads((run.model / "complete.json").read_text())["sha256"]
    assert set(recorded) == {"adapter.safetensors", "tokenizer/vocab.json"}


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    atomic.write_bytes(run.model / "adapter.safetensors", bytes(100))
    assert not run.finished
    with pytest.raises(UsageError, match="--resume"):
        run.require_finished()
    with pytest.raises(ValueError):
        RunFolder.create(tmp_path / "empty").finish_model()


@pytest.mark.parametrize("name", ["adapter.safetensors", "tokenizer/vocab.json"])
def test_every_flipped_bit_and_truncation_is_found_and_named(tmp_path: Path, name: str) -> None:
    run = finished_run(tmp_path / "run")
    file = run.model / name
    whole = file.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], whole + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(UsageError) as caught:
            run.require_finished()
        assert str(file) in str(caught.value) and "damaged" in str(caught.value) and "--resume" in str(caught.value)
    file.unlink()
    with pytest.raises(UsageError, match="missing"):
        run.require_finished()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"sha256": {}}', '{"sha256": 3}', '{"sha256": {"../../../etc/hostname": "00"}}', "\x00"],
)
def test_a_damaged_marker(tmp_path: Path, content: str) -> None:
    run = finished_run(tmp_path / "run")
    (run.model / "complete.json").write_text(content)
    with pytest.raises(UsageError, match="damaged"):
        run.require_finished()


def test_the_released_configuration_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "alice" / "project"
    (home / "photos").mkdir(parents=True)
    monkeypatch.chdir(home)
    for given, released in ((str(home / "photos"), "photos"), ("photos", "photos"), ("../project/photos", "photos")):
        run = RunFolder.create(tmp_path / f"run-{len(given)}")
        config = resolve({}, [f"data.path={given}", "data.train=a.jsonl", "data.test=b.jsonl", "model.path=org/model"])
        run.write_config(config)
        assert run.read_config() == config
        assert resolve(read_yaml(run.config)).data.path == released
        assert "alice" not in run.config.read_text() and stat.S_IMODE(run.folders.stat().st_mode) == 0o600
        monkeypatch.chdir(tmp_path)
        elsewhere = run.read_config()
        assert Path(elsewhere.data.path or "").resolve() == home / "photos" and elsewhere.model.path == "org/model"
        monkeypatch.chdir(home)
    for damaged in ("", "[]", "{}", run.folders.read_text().replace("photos", "photoz")):
        run.folders.write_text(damaged)
        with pytest.raises(UsageError, match=r"folders\.json: damaged"):
            run.read_config()
    run.folders.unlink()  # the release alone
    assert run.read_config().data.path == "photos"
