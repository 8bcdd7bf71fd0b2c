"""`dpaudit doctor`: each fault is found, named and comes with a command; the environment names nobody."""

import getpass
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpaudit import environment
from dpaudit.documents import DoctorDocument
from dpaudit.environment import public_command

DPAUDIT = Path(sys.executable).parent / "dpaudit"
FINE = {"errors": {"torchvision": "missing"}, "torch": "2.13.0", "device": "cpu"}


def test_the_installed_command(tmp_path: Path) -> None:
    done = subprocess.run([DPAUDIT, "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    document = DoctorDocument.model_validate_json(done.stdout)
    assert done.returncode == (0 if document.healthy else 4)
    status = {check.name: check.status for check in document.checks}
    # What these tests themselves run on:
    for name in ("python", "packages", "torch", "imports", "folder"):
        assert status[name] == "pass", document.checks
    assert document.healthy == ("fail" not in status.values())
    assert list(tmp_path.iterdir()) == []


def test_a_broken_machine_for_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpaudit.cli.app import run

    monkeypatch.setattr(environment, "_probe", lambda: FINE)
    monkeypatch.setattr(environment, "LEAST_DISK", 1e9)
    assert run(["doctor", "--out", str(tmp_path / "new" / "run")]) == 4
    out = capsys.readouterr().out
    assert "BROKEN  disk" in out and "df -h" in out and out.endswith("BROKEN\n")


def test_torchvision_of_another_build() -> None:
    """The trap: torchvision is there, and its _C does not load."""
    error = "RuntimeError('operator torchvision::nms does not exist')"
    check = environment.check_torchvision({"errors": {"torchvision": error}})
    assert check.status == "fail" and "nms" in check.measured and "pip uninstall -y torchvision" in check.explanation
    assert environment.check_torchvision(FINE).status == "pass"
    assert environment.check_torchvision({"errors": {}}).status == "pass"


def test_the_probe_survives_a_torchvision_that_kills_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in (
        ("raises", "raise RuntimeError('operator torchvision::nms')"),
        ("dies", "import os; os._exit(11)"),
    ):
        folder = tmp_path / name
        (folder / "torchvision").mkdir(parents=True)
        (folder / "torchvision" / "__init__.py").write_text(body)
        for other in ("torch", "peft", "opacus"):  # light stand-ins: the real ones take seconds and are not under test
            (folder / other).mkdir()
        (folder / "torch" / "__init__.py").write_text(
            "__version__ = '0'\nclass cuda: is_available = staticmethod(lambda: False)\n"
            "class backends:\n  class mps: is_available = staticmethod(lambda: False)\n"
            "class version: cuda = None\n"
        )
        (folder / "transformers" / "models" / "llava").mkdir(parents=True)
        (folder / "transformers" / "models" / "llava" / "modeling_llava.py").write_text("")
        monkeypatch.setenv("PYTHONPATH", str(folder))
        found = environment._probe()
        if name == "raises":
            assert "nms" in found["errors"]["torchvision"] and found["torch"] == "0"
            assert environment.check_torchvision(found).status == "fail"
        else:
            assert environment.check_torch(found).status == "fail"
            assert "exit code 11" in environment.check_torch(found).measured


def test_missing_libraries() -> None:
    probe = {"errors": {"torchvision": "missing", "peft": "missing", "opacus": "ImportError('x')"}, "torch": "2"}
    check = environment.check_imports(probe)
    assert check.status == "fail" and "peft" in check.measured and "peft opacus" in check.explanation
    assert environment.check_torch({"errors": {"torch": "missing"}}).status == "fail"
    assert environment.check_imports(FINE).status == "pass"


def test_packages_against_their_ranges() -> None:
    (fine,) = environment.check_packages(
        ["numpy>=2", "scipy", 'ruff>=99; extra == "dev"', 'winonly; sys_platform == "x"']
    )
    assert fine.status == "pass" and fine.measured == "2 packages in range"
    (broken,) = environment.check_packages(["numpy>=99", "no-such-package-here>=1", "scipy"])
    assert broken.status == "fail"
    assert "numpy" in broken.measured and "no-such-package-here missing" in broken.measured
    assert broken.explanation == "pip install 'numpy>=99' 'no-such-package-here>=1'"


@pytest.mark.parametrize("version, good", [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_python(version: tuple[int, int], good: bool) -> None:
    assert (environment.check_python(version).status == "pass") == good


@pytest.mark.parametrize("version, status", [(None, "fail"), ("0.6.0", "fail"), ("0.8.0", "fail"), ("0.7.3", "pass")])
def test_lmms_eval(version: str | None, status: str) -> None:
    requirements = ['numpy; extra == "benchmark"', 'lmms-eval<0.8,>=0.7.3; extra == "lmms"']
    check = environment.check_lmms_eval(version, requirements)
    assert check.status == status and "--no-deps" in check.explanation
    lacking = environment.check_lmms_eval("0.7.3", [*requirements, 'no-such-package-here; extra == "benchmark"'])
    assert lacking.status == "fail" and "no-such-package-here" in lacking.measured


def test_base_checkpoint(tmp_path: Path) -> None:
    assert environment.check_base(tmp_path / "none").status == "fail"
    assert environment.check_base(tmp_path).measured == "missing"
    save_file({"w": np.zeros(3)}, tmp_path / "model.safetensors")
    assert environment.check_base(tmp_path).status == "pass"
    (tmp_path / "other.safetensors").write_bytes(b"not safetensors at all")
    assert "other.safetensors" in environment.check_base(tmp_path).measured


def test_limits_and_folder(tmp_path: Path) -> None:
    assert environment.check_disk(0.5).status == "fail" and environment.check_disk(50).status == "pass"
    assert environment.check_memory(0.5).status == "fail" and environment.check_memory(8).status == "pass"
    assert environment.check_memory(None).status == "not applicable"
    assert environment.check_folder(tmp_path / "not" / "yet").status == "pass"
    assert environment.check_folder(Path("/proc/nothing")).status == "fail"
    assert environment.check_chromium(lambda name: None).status == "not applicable"
    assert environment.check_chromium(lambda name: "/usr/bin/chromium" if name == "chromium" else None).status == "pass"
    memory = environment._memory_gib()
    assert memory is None or 0 < memory < 10_000


def test_the_environment_document_names_nobody() -> None:
    document = environment.describe("cpu", ["train", "--out", f"{Path.home()}/secret/run1", "seed=1"])
    text = document.to_json()
    assert socket.gethostname() not in text and str(Path.home()) + "/" not in text and "secret" not in text
    assert getpass.getuser() not in document.platform
    assert document.command == "dpaudit train --out run1 seed=1"
    packages = json.loads(text)["packages"]
    assert packages["numpy"] == np.__version__ and "torch" in packages
    assert environment.describe().command is None


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (["train", "-c", "conf/run.yaml"], "dpaudit train -c conf/run.yaml"),
        (["report", "/home/ann/runs/a/", "-o", "~/x/report.html"], "dpaudit report a -o report.html"),
        (["train", "data.path=/srv/clinic/ann", "a=/x/y,/z/w"], "dpaudit train data.path=ann a=y,w"),
        (["train", "--out=/home/ann/run"], "dpaudit train --out=run"),
        (["audit", "--trainer", "pkg.module:factory"], "dpaudit audit --trainer pkg.module:factory"),
        (["audit", "../ann/run"], "dpaudit audit run"),
        (["audit", r"/home/ann/my runs/one"], "dpaudit audit one"),
    ],
)
def test_paths_are_cut_from_commands(arguments: list[str], shown: str) -> None:
    assert public_command(arguments) == shown


def test_disk_is_measured_where_the_runs_would_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    original = shutil.disk_usage

    def watch(path: Path) -> object:
        asked.append(path)
        return original(path)

    monkeypatch.setattr(shutil, "disk_usage", watch)
    monkeypatch.setattr(environment, "_probe", lambda: FINE)
    environment.examine(tmp_path / "deep" / "run")
    assert asked == [tmp_path]
