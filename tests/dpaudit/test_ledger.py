"""Spent budget is on disk before it is used, never decreases, and a resumed run ends with the same bytes."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpaudit.documents import LedgerDocument, LedgerRow
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.ledger import Ledger

ROW = LedgerRow(path="gradients", status="accounted", explanation="Clipped and noised.", evidence="sigma = 1")
OTHER = LedgerRow(path="vocabulary", status="UNACCOUNTED", explanation="Built from answers.", evidence="data.train")


def make(folder: Path, planned: int = 10) -> Ledger:
    return Ledger.create(folder / "ledger.json", [ROW], "ab" * 32, planned, 1e-5)


def on_disk(folder: Path) -> LedgerDocument:
    return LedgerDocument.read(folder / "ledger.json")


def test_created_loaded_and_written_at_every_step(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    assert on_disk(tmp_path) == ledger.document and ledger.steps_started == 0
    for step in range(1, 11):
        ledger.start_step(step, step / 10)
        spent = on_disk(tmp_path).spent
        assert spent is not None and (spent.steps_started, spent.epsilon) == (step, step / 10)
    assert Ledger.load(tmp_path / "ledger.json").document == ledger.document
    assert on_disk(tmp_path).coins_sha256 == "ab" * 32


def test_never_erased(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UsageError, match="never erased"):
        make(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 12), st.floats(0, 2)), max_size=25))
def test_spent_never_decreases_whatever_is_asked(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[int, float]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = make(folder)
    seen = [(0, 0.0)]
    for step, epsilon in calls:
        before = (folder / "ledger.json").read_bytes()
        try:
            ledger.start_step(step, epsilon)
        except ValueError:
            assert (folder / "ledger.json").read_bytes() == before
        spent = on_disk(folder).spent
        assert spent is not None and spent.epsilon is not None
        seen.append((spent.steps_started, spent.epsilon))
    for (steps, epsilon), (later, more) in itertools.pairwise(seen):
        assert later in (steps, steps + 1) and more >= epsilon


def test_a_repeat_changes_nothing_and_must_be_the_same_run(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    for step in (1, 2, 3):
        ledger.start_step(step, step / 10)
    before = (tmp_path / "ledger.json").read_bytes()
    ledger.start_step(3, 0.3)
    ledger.start_step(2, 0.2)
    assert (tmp_path / "ledger.json").read_bytes() == before
    for step, epsilon in ((3, 0.31), (3, 0.2), (2, 0.4)):
        with pytest.raises(ValueError, match="not the same run"):
            ledger.start_step(step, epsilon)
    for step, epsilon in ((0, 0.1), (-1, 0.1), (5, 0.5), (4, 0.2), (4, float("nan"))):
        with pytest.raises(ValueError):
            ledger.start_step(step, epsilon)
    assert (tmp_path / "ledger.json").read_bytes() == before


def test_the_plan_is_a_limit(tmp_path: Path) -> None:
    ledger = make(tmp_path, planned=1)
    ledger.start_step(1, 0.1)
    with pytest.raises(ValueError, match="beyond the plan"):
        ledger.start_step(2, 0.2)


def test_a_run_without_a_claim_spends_nothing(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.json", [ROW], None, None, None)
    assert ledger.spent is None and ledger.steps_started == 0
    with pytest.raises(ValueError):
        ledger.start_step(1, 0.1)


def test_infinite_eps(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    ledger.start_step(1, float("inf"))
    assert Ledger.load(tmp_path / "ledger.json").document == ledger.document


def test_rows(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    ledger.add_row(OTHER)
    ledger.add_row(OTHER)
    assert on_disk(tmp_path).rows == (ROW, OTHER)
    changed = ROW.model_copy(update={"evidence": "sigma = 2"})
    with pytest.raises(ValueError, match="replace_row"):
        ledger.add_row(changed)
    ledger.replace_row(changed)
    assert on_disk(tmp_path).rows == (changed, OTHER)
    with pytest.raises(KeyError):
        ledger.replace_row(ROW.model_copy(update={"path": "tokens"}))


def test_a_failed_write_leaves_memory_and_disk_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make(tmp_path)
    ledger.start_step(1, 0.1)

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EnvironmentFailure, match="disk is full"):
        ledger.start_step(2, 0.2)
    monkeypatch.undo()
    assert on_disk(tmp_path) == ledger.document and ledger.steps_started == 1
    ledger.start_step(2, 0.2)


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 1}', "\xff"])
def test_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="ledger"):
        Ledger.load(tmp_path / "ledger.json")


# A trainer in miniature: checkpoint every third step, killed at the n-th replacement of a file.
_TRAINER = """
import os, sys
from pathlib import Path
from dpaudit import atomic
from dpaudit.documents import LedgerRow
from dpaudit.ledger import Ledger
folder, left = Path(sys.argv[1]), int(sys.argv[2])
original = os.replace
def counted(source, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    original(source, target)
    if left == 0:
        os._exit(9)
os.replace = counted
path, checkpoint = folder / "ledger.json", folder / "checkpoint"
row = LedgerRow(path="gradients", status="accounted", explanation="x", evidence="y")
ledger = Ledger.load(path) if path.exists() else Ledger.create(path, [row], None, 8, 1e-5)
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
while step < 8:
    step += 1
    ledger.start_step(step, step * 0.25)
    print(step, flush=True)
    if step % 3 == 0 or step == 8:
        atomic.write_text(checkpoint, str(step))
"""


def test_killed_anywhere_and_resumed_gives_the_same_ledger(tmp_path: Path) -> None:
    def train(folder: Path, left: int) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", _TRAINER, str(folder), str(left)], capture_output=True, text=True, check=False
        )

    assert train(tmp_path / "whole", 1000).returncode == 0
    expected = (tmp_path / "whole" / "ledger.json").read_bytes()
    rng = random.Random(1)
    for left in rng.sample(range(12), 4):
        folder = tmp_path / str(left)
        killed = train(folder, left)
        assert killed.returncode == 9
        used = [int(line) for line in killed.stdout.split()]
        if used:  # whatever was used is on disk
            assert Ledger.load(folder / "ledger.json").steps_started >= max(used)
        assert train(folder, 1000).returncode == 0
        assert (folder / "ledger.json").read_bytes() == expected
