"""At least 500 cases by grammar: never a traceback, always an allowed exit code, one line an error, no file outside.

`benchmarks/fuzz.py` plays new cases for as long as it is given.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.grammar import FAMILIES, Case
from tests.fuzz.runner import Runner

CASES = {
    "configuration": 180,
    "score file": 130,
    "data file": 90,
    "run folder": 60,
    "handed over": 40,
    "command line": 90,
}
assert sum(CASES.values()) >= 500


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    root = Path(tempfile.mkdtemp(prefix="dpaudit-fuzz-"))
    yield Runner(root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_input_is_answered(runner: Runner, family: str) -> None:
    played = 0

    @settings(max_examples=CASES[family], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=FAMILIES[family])
    def play(case: Case) -> None:
        nonlocal played
        played += 1
        problem = runner.play(case)
        assert problem is None, f"{problem}\n{case}"

    play()
    assert played >= CASES[family]


def test_the_judge_sees_what_it_must() -> None:
    from tests.faults.harness import Ended
    from tests.fuzz.runner import judge

    case = Case("x", ("train", "--json"))
    traceback = "Traceback (most recent call last):\n  x\nValueError: y\n"
    for ended in (
        Ended(1, "", traceback, (), ()),
        Ended(99, "", "", (), ()),
        Ended(-11, "", "", (), ()),
        Ended(-14, "", "", (), ()),
        Ended(0, "{}", "", (), ("/etc/x",)),
        Ended(2, "", "dpaudit: a\ndpaudit: b\n", (), ()),
        Ended(2, "", "", (), ()),
        Ended(0, "no document", "", (), ()),
        Ended(2, "", "dpaudit: " + "x" * 3000 + "\n", (), ()),
    ):
        assert judge(case, ended) is not None, ended
    assert judge(case, Ended(0, "{}", "epoch 1\n", (), ())) is None
    assert judge(case, Ended(2, "", "run: encoding\ndpaudit: data.train: got 1; accepted: 2\n", (), ())) is None


def test_damage_never_leaves_the_run(tmp_path: Path) -> None:
    """A file that became a link or a folder is left alone by what is drawn next."""
    from tests.fuzz.grammar import DAMAGES
    from tests.fuzz.runner import damage

    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "run" / "folder").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(outside)
    for how in DAMAGES:
        for name in ("link", "folder", "missing", "a/file", "a/file"):
            (tmp_path / "run" / "a").mkdir(exist_ok=True)
            if not os.path.lexists(tmp_path / "run" / "a" / "file"):
                (tmp_path / "run" / "a" / "file").write_text("x")
            for where in (0, 3):
                damage(tmp_path / "run", name, how, where)
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "run"}
    assert outside.read_text() == "precious" and (tmp_path / "run" / "link").is_symlink()
    assert (tmp_path / "run" / "folder").is_dir()


def test_the_grammar_reaches_every_field() -> None:
    from tests.fuzz.grammar import LEAVES

    seen: set[str] = set()

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        case = data.draw(FAMILIES["configuration"])
        seen.update(item.partition("=")[0].replace("_", "-") for item in case.arguments)

    draw()
    assert len(seen & set(LEAVES)) > len(LEAVES) * 0.6
