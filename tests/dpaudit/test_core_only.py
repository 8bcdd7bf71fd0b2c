"""Without the extras every command works or names the extra: packages that the core does not bring are hidden."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpaudit.extras import EXTRAS, LMMS_EVAL, missing

# A meta path finder that knows none of the packages of the extras, as in an environment without them.
HIDE = """
import sys
hidden = set({names!r})
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from dpaudit.cli import main
sys.argv = ["dpaudit", *{words!r}]
main()
"""


def without_extras(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    code = HIDE.format(names=sorted(EXTRAS), words=list(words))
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    "words",
    [
        ("bound", "steinke", "--help"),
        ("plan", "--claim-sigma", "0.8", "--claim-rate", "0.1", "--claim-steps", "20"),
        ("scores", "scores.csv", "--delta", "1e-5", "--coins", "independent"),
        ("--version",),
    ],
)
def test_works(tmp_path: Path, words: tuple[str, ...]) -> None:
    lines = [f"r{place},{place % 2},{place % 7}" for place in range(40)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,member,score", *lines]) + "\n", encoding="utf-8")
    done = without_extras(tmp_path, *words)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--dry-run"),
        ("check", "a:b"),
        ("audit", "--trainer", "a:b"),
        ("audit-trainer", "a:b"),
        ("audit-model", "x", "--base", "y", "--records", "r.jsonl", "--coins", "c.csv", "--epsilon", "1"),
        ("audit", "--model", "x", "--base", "y", "--records", "r.jsonl", "--coins", "c.csv", "--epsilon", "1"),
        ("bugs",),
        ("report", "scores.json", "-o", "r.html"),
    ],
)
def test_names_the_extra(tmp_path: Path, words: tuple[str, ...]) -> None:
    for name in ("scores.json", "r.jsonl", "c.csv"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    done = without_extras(tmp_path, *words)
    assert done.returncode == 4 and "pip install 'dpaudit[train]'" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("dpaudit: ")


@pytest.mark.parametrize("words", [("sweep", "--preset", "frontier"), ("benchmark", "x")])
def test_what_measures_accuracy_names_one_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Whatever it misses first: after `train` alone it would name another extra, and then lmms-eval."""
    (tmp_path / "x").mkdir()
    done = without_extras(tmp_path, *words)
    assert done.returncode == 4 and done.stderr.splitlines()[-1].endswith(LMMS_EVAL), done.stdout + done.stderr


def test_a_demo_without_lmms_eval_trains_nothing(tmp_path: Path) -> None:
    done = without_extras(tmp_path, "demo")
    assert done.returncode == 4 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("dpaudit: demo: needs lmms_eval, datasets") and "pip install 'dpaudit[benchmark]' &&" in line
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_lmms_eval_trains_nothing(tmp_path: Path) -> None:
    code = HIDE.format(names=["lmms_eval"], words=["sweep", "--preset", "frontier", "--seeds", "0"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4 and "sweep: needs lmms_eval, not installed: pip install" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_of_nobody_is_no_extra() -> None:
    assert missing(ModuleNotFoundError("No module named 'mine'", name="mine"), "x") is None
