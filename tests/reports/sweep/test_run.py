"""A sweep's bookkeeping, with an executor that only pretends to train; and one real, small, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpaudit.cli import app
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.ledger import Ledger
from reports.sweep import jobs
from reports.sweep.board import locked
from reports.sweep.document import SweepDocument
from reports.sweep.grid import make_plan
from tests.reports.sweep.fakes import PICTURES, SMALL, FakeExecutor, correctness, write_sweep

DPAUDIT = Path(sys.executable).parent / "dpaudit"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping is under test here, not the resampling."""
    monkeypatch.setattr("reports.sweep.table.RESAMPLES", 50)
    monkeypatch.setattr("reports.metrics.RESAMPLES", 50)
    monkeypatch.setattr("dpaudit.atomic.os.fsync", lambda descriptor: None)


def test_a_sweep_fills_its_table_and_is_not_done_twice(tmp_path: Path) -> None:
    executor = FakeExecutor()
    document = write_sweep(tmp_path, executor)
    assert document.finished and len(document.cells) == 10 and document.name == "small"
    assert document == SweepDocument.read(tmp_path / "sweep.json")
    # 10 trainings; a benchmark job for each of two lanes a round
    assert [name for name, _ in executor.done].count(jobs.MEASURE) == 4 and len(executor.done) == 14
    rows = {row.configuration: row for row in document.rows}
    private = [row for row in document.rows if row.method in ("dp-sgd", "dual-priv")]
    assert all(row.epsilon == row.swept["privacy.epsilon"] and row.seeds == (0, 1) for row in private)
    assert rows["base model"].method is None and rows["base model"].exact_match is not None
    dual = rows["dual-priv, epsilon 8"]
    cells = {c.point.name + str(c.seed): correctness(c.config) for c in make_plan(SMALL, seeds=(0, 1)).cells}
    expected = [sum(cells[f"dual-priv, epsilon 8{seed}"]) / (2 * PICTURES) for seed in (0, 1)]
    assert dual.exact_match is not None and dual.exact_match.value == pytest.approx(sum(expected) / 2)
    assert dual.against == "dp-sgd, epsilon 8" and dual.difference is not None
    other = rows["dp-sgd, epsilon 8"].exact_match
    assert other is not None
    assert dual.difference.value == pytest.approx(dual.exact_match.value - other.value)
    again = FakeExecutor()
    assert write_sweep(tmp_path, again) == document and again.done == []


def test_more_seeds_train_only_what_is_new_and_tell_the_old_cells(tmp_path: Path) -> None:
    write_sweep(tmp_path, FakeExecutor(), seeds=(0,))
    more = FakeExecutor()
    document = write_sweep(tmp_path, more, seeds=(0, 1, 2))
    assert [name for name, _ in more.done].count(jobs.TRAIN) == 10 and document.finished
    rows = Ledger.load(tmp_path / "runs" / document.cells[0].folder / "release" / "ledger.json").rows
    tuning = [row for row in rows if row.path == "hyper-parameter tuning"]
    assert len(tuning) == 1 and "15 runs compared" in tuning[0].evidence and tuning[0].status == "UNACCOUNTED"
    assert tuning[0] == document.ledger[0]


def test_a_failing_cell_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fail(function: str, payload: Mapping[str, Any]) -> str | None:
        if function == jobs.TRAIN and payload["config"]["method"] == "non-private":
            return "out of memory"
        bad = function == jobs.MEASURE and any("dp-sgd-epsilon-3-s0" in run for run in payload["runs"])
        return "lmms-eval failed" if bad else None

    document = write_sweep(tmp_path, FakeExecutor(fail))
    states = {cell.folder[: -len("-12345678")]: (cell.state, cell.error) for cell in document.cells}
    assert states["non-private-s0"] == states["non-private-s1"] == ("failed", "out of memory")
    # the job that held the bad run also held good ones: they were measured one by one
    assert states["dp-sgd-epsilon-3-s0"] == ("failed", "lmms-eval failed")
    assert [state for state, _ in states.values()].count("finished") == 7 and not document.finished
    row = next(row for row in document.rows if row.configuration == "dp-sgd, epsilon 3")
    assert row.failed == 1 and row.seeds == (1,) and row.exact_match and row.exact_match.covers == "pictures"
    dual = next(row for row in document.rows if row.configuration == "dual-priv, epsilon 3")
    assert dual.difference is not None and dual.difference.seeds == 1  # only the seed that both have
    healed = FakeExecutor()
    document = write_sweep(tmp_path, healed)
    assert document.finished and [name for name, _ in healed.done].count(jobs.TRAIN) == 2


@pytest.mark.parametrize("stop", [0, 3, 6, 9])
def test_interrupted_anywhere_it_ends_with_the_same_table(tmp_path: Path, stop: int) -> None:
    whole = write_sweep(tmp_path / "whole", FakeExecutor())
    with pytest.raises(KeyboardInterrupt):
        write_sweep(tmp_path / "parts", FakeExecutor(stop=stop))
    assert not SweepDocument.read(tmp_path / "parts" / "sweep.json").finished
    resumed = FakeExecutor()
    document = write_sweep(tmp_path / "parts", resumed)
    assert len([1 for name, _ in resumed.done if name == jobs.TRAIN]) <= 10 - min(stop, 5)
    assert document.rows == whole.rows


def test_a_folder_of_another_configuration_and_a_second_sweep_are_refused(tmp_path: Path) -> None:
    document = write_sweep(tmp_path, FakeExecutor(), seeds=(0,))
    config = tmp_path / "runs" / document.cells[0].folder / "release" / "config.yaml"
    config.write_text(config.read_text().replace("limit: null", "limit: 7"))
    with pytest.raises(UsageError, match="another configuration"):
        write_sweep(tmp_path, FakeExecutor(), seeds=(0,))
    with locked(tmp_path / "x"), pytest.raises(EnvironmentFailure, match="another sweep"), locked(tmp_path / "x"):
        pass


def test_damaged_answers_are_named(tmp_path: Path) -> None:
    document = write_sweep(tmp_path, FakeExecutor(), seeds=(0,))
    (tmp_path / "runs" / document.cells[0].folder / "private" / "answers.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"answers\.parquet: damaged"):
        write_sweep(tmp_path, FakeExecutor(), seeds=(0,))


def command(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(DPAUDIT), "sweep", *arguments], capture_output=True, text=True, check=False, **options)


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = tmp_path / "g.yaml"
    grid.write_text("grid: {privacy.epsilon: [1]}\n")
    for arguments, words in (
        ([], "give a grid"),
        (["--preset", "fronter"], "frontier"),
        ([str(grid), "--preset", "frontier"], "one grid"),
        ([str(grid), "--seeds", "1-x"], "--seeds"),
        ([str(grid), "--processes", "0"], "processes"),
        ([str(grid), "--audit", "magic"], "--magic"),
        (["--resume", "--out", str(tmp_path / "none")], "no such file"),
        ([str(tmp_path / "none.yaml")], "can't be read"),
    ):
        assert app.run(["sweep", *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "sweeps").exists()
    assert app.run(["sweep", str(grid), "--seeds", "0-2", "--dry-run", "data.limit=4"]) == 0
    assert "3 cells" in capsys.readouterr().out
    assert app.run(["sweep", str(grid), "--seeds", "0-2", "--dry-run", "--json", "data.limit=4"]) == 0
    listed = SweepDocument.model_validate_json(capsys.readouterr().out)
    assert not listed.finished and [cell.state for cell in listed.cells] == ["waiting"] * 3
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
def test_killed_and_resumed_for_real(tmp_path: Path) -> None:
    grid, out = tmp_path / "g.yaml", tmp_path / "out"
    grid.write_text("configurations: [{name: base model, train: false}, {name: dp, settings: {method: dp-sgd}}]\n")
    settings = ["data.limit=4", "training.steps=2", "training.batch-size=2", "privacy.delta=0.01"]
    arguments = [str(DPAUDIT), "sweep", str(grid), "--out", str(out), "--seeds", "0,1", "--processes", "1", *settings]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (done := list(out.glob("runs/*/release/model/complete.json"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = done
    stamp = os.stat(first).st_mtime_ns
    assert command(*arguments[2:]).returncode == 2  # it does not start over by itself
    ended = command("--resume", "--out", str(out), "--processes", "1", "--json", timeout=400)
    assert ended.returncode == 0, ended.stderr
    document = SweepDocument.model_validate(json.loads(ended.stdout))
    assert document.finished and [cell.state for cell in document.cells] == ["finished", "finished"]
    assert os.stat(first).st_mtime_ns == stamp
    base, trained = document.rows
    assert trained.seeds == (0, 1) and trained.exact_match is not None and base.exact_match is not None
    assert trained.exact_match.covers == "seeds and pictures" and trained.exact_match.pictures == 4
    assert trained.epsilon == 8.0 and "UNACCOUNTED" in document.ledger[0].status
