"""The wheel in an empty folder: the core alone, and beside a repository that has packages of our names.

Builds the wheel and installs it as a user would, so it needs an index of packages; without one it is skipped, loudly.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_all
from tests.dpaudit.test_packages import MINE, TESTS

# Installations depend on the index, not on us.
pytestmark = pytest.mark.timeout(3600)

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": ""}
PACKAGES = ("dpaudit", "trainers", "attacks", "reports")
# A line of a block of code; what stands behind a pipe or a redirection is the shell's.
COMMAND = re.compile(r"^ {4,}(?:\$ |run: )?(dpaudit [a-z][a-z-]*(?: .*)?)$", re.MULTILINE)
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def call(*words: object, folder: Path, seconds: float = 3600) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder `build` behind, whose deleted modules the next wheel would hold."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, folder=folder)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("dpaudit-*.whl"))


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Schemas, templates, presets, the base model and the marks of typing too."""
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted, held ^ wanted


def environment(folder: Path) -> Path:
    """A fresh one; its `bin`."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the core alone. Says what it took."""
    bin = environment(tmp_path_factory.mktemp("core"))
    before, start = os.times(), time.monotonic()
    done = call(bin / "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, folder=bin)
    if done.returncode:
        pytest.skip(f"the core can't be installed here: {done.stderr.strip().splitlines()[-1:]}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"pip install of the core: {time.monotonic() - start:.1f} s, {spent:.1f} s of them on the processor")
    return bin


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder with nothing but the score file that the pages speak of."""
    rows = [f"r{place},{place % 2},{(place * 7919) % 101 / 50 + place % 2:.2f}" for place in range(400)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,member,score", *rows]) + "\n", encoding="utf-8")
    return tmp_path


def test_scores_from_the_core(core: Path, empty: Path) -> None:
    start = time.monotonic()
    done = call(core / "dpaudit", "scores", "scores.csv", "--delta", "1e-5", "--coins", "independent", folder=empty)
    print(f"dpaudit scores: {time.monotonic() - start:.1f} s")
    assert done.returncode == 0 and "eps >=" in done.stdout, done.stdout + done.stderr
    code = (
        "import dpaudit; s = dpaudit.Scores('scores.csv', coins='independent', separate=True); "
        "print(s.epsilon(1e-5).value > 0, s.test(dpaudit.claim(sigma=1.0, rate=0.05, steps=200)).verdict)"
    )
    done = call(core / "python", "-c", code, folder=empty)
    assert done.stdout.split() == ["True", "refuted"], done.stdout + done.stderr


def typed() -> Iterator[list[str]]:
    """Commands of README, docs and examples as words, one for each command and set of flags."""
    seen: set[tuple[str, ...]] = set()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        text += "".join(textwrap.indent(block, "    ") for block in FENCED.findall(text))
        for line in COMMAND.findall(text):
            words = shlex.split(re.split(r"\s(?:[|>&;]|#)", f"{line} ", maxsplit=1)[0].rstrip("\\ "))
            kind = (words[1], *sorted(word for word in words if word.startswith("-")))
            if kind not in seen:
                seen.add(kind)
                yield words


def test_every_typed_command_works_or_names_its_extra(core: Path, empty: Path) -> None:
    commands = list(typed())
    assert len({words[1] for words in commands}) >= 11, commands
    worked, named = [], []
    told = [words[1:] for words in commands]
    done = run_all(told, cwd=empty, env=ENVIRONMENT, python=core / "python", timeout=3600)
    for words, one in zip(commands, done, strict=True):
        said = one.stdout + one.stderr
        assert "Traceback" not in said, (words, said)
        if one.code == 4:
            assert "pip install 'dpaudit[" in one.stderr.splitlines()[-1], (words, said)
            named.append(words)
        else:  # done, a verdict, or one line about a file of the page that is not here
            assert one.code in (0, 1, 2, 3), (words, said)
            if one.code == 2:
                assert one.line.startswith("dpaudit: "), (words, said)
            worked.append(words)
    print(f"{len(worked)} commands of the core, {len(named)} that name their extra")
    assert {words[1] for words in worked} >= {"scores", "plan"}
    assert {words[1] for words in named} >= {"check", "audit-trainer"}


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel, and with the packages of this one behind it."""
    folder = tmp_path_factory.mktemp("full")
    bin = environment(folder)
    done = call(bin / "pip", "install", "-q", "--no-deps", wheel, folder=bin)
    assert done.returncode == 0, done.stderr
    shared = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (next(folder.glob("lib/*/site-packages")) / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return bin


@pytest.mark.parametrize("kind", ["packages", "folders"])
def test_a_repository_with_packages_of_our_names(full: Path, tmp_path: Path, kind: str) -> None:
    """With `__init__.py` and without: the plugin and the command find the user's code, and ours.

    A correct trainer by the plugin and a wrong one by the command; the other two are in tests/dpaudit/test_packages.py.
    """
    files = {"trainers/mine.py": MINE, "trainers/helpers.py": "scale = 1.0\n", "attacks/own.py": "NAME = 'theirs'\n"}
    files |= {"test_privacy.py": TESTS}
    if kind == "packages":
        files |= {"trainers/__init__.py": "", "attacks/__init__.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = ("-m", "pytest", "-q", "-k", "contract", "-p", "no:cacheprovider")
    done = call(full / "python", *words, folder=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    done = call(full / "dpaudit", "check", "trainers.mine:half", folder=tmp_path)
    assert done.returncode == 1 and "FAIL  noise level" in done.stdout, done.stdout + done.stderr
