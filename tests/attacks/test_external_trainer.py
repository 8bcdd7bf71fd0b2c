"""Audits of trainers that dpaudit did not write: games, verdicts, what is not offered, interruption."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attacks.contract.guard import MethodFailure
from attacks.external import runs
from attacks.external.folder import loaded_code
from attacks.external.options import TrainerOptions
from attacks.external.trainer import audit_trainer
from dpaudit.cli import app
from dpaudit.documents import AuditDocument, LedgerDocument, Test
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.attacks import external_toy
from tests.dpaudit.jobs import InProcess
from trainers.progress import Silent

TOY = "tests.attacks.external_toy:factory"


def audit(out: Path, target: str = TOY, executor: Any = None, **options: Any) -> AuditDocument:
    asked = TrainerOptions(target, **{"seed": 1, **options})
    return audit_trainer(asked, out, reporter=lambda _: Silent(), executor=executor)[0]


def deciding(document: AuditDocument, name: str) -> Test:
    """The test of the claim that may decide, of the game whose name starts so."""
    found = [
        test for test in document.tests if test.name.startswith(name) and test.decides and test.p_value is not None
    ]
    assert len(found) >= 1
    return found[0]


def test_a_correct_trainer_is_not_refuted_and_the_game_had_power(tmp_path: Path) -> None:
    """False alarm below 1e-6: alpha is set there."""
    document = audit(tmp_path / "a", audits=("canaries", "white-box"), alpha=1e-6, confidence=0.999999)
    assert document.verdict in ("inconclusive", "not refuted")
    assert document.validity.sound and document.claim is not None
    assert document.claim.epsilon == pytest.approx(external_toy.Toy(seed=0).epsilon(1e-5) or document.claim.epsilon)
    white = deciding(document, "white box")
    assert white.n == 250 and white.bound == "exact likelihood" and white.power is not None
    assert deciding(document, "canaries").bound == "f-dp"
    # All bounds of all games hold together.
    bounds = [test for test in document.tests if test.epsilon_lower is not None and test.bound != "f-dp"]
    assert len(bounds) == 4 and sum(1 - test.confidence for test in bounds) <= 1e-6


@pytest.mark.parametrize("arguments", [{"noise": 0.5}, {"clip": False}])
def test_wrong_noise_and_missing_clipping_are_refuted_by_the_white_box(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    document = audit(tmp_path / "a", audits=("white-box",), arguments=arguments)
    assert document.verdict == "refuted", document.reasons
    assert max(float(test.e_value) for test in document.tests if test.e_value is not None) > 1e6


def test_missing_noise_is_refuted_by_canaries_alone(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", audits=("canaries",), count=200, arguments={"sigma": 2.0, "noise": 0.0})
    assert document.verdict == "refuted", document.reasons
    free = next(test for test in document.tests if test.assumes == "none")
    assert free.correct == free.guesses and free.epsilon_lower == pytest.approx(free.ceiling)


def test_runs_refute_missing_noise_and_merge_as_e_values(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", runs=60, arguments={"sigma": 2.0, "noise": 0.0})
    assert document.verdict == "refuted"
    test = deciding(document, "runs")
    assert test.bound == "order-statistic" and test.n == 60 and test.power is None
    evidence = next(test for test in document.tests if test.bound == "e-process")
    assert evidence.decides and evidence.p_value is not None and evidence.p_value < 0.01
    assert {test.bound for test in document.tests} >= {"clopper-pearson", "gdp", "e-process"}


@pytest.mark.parametrize("name, code", [("SomeScoresLost", 0), ("AllScoresLost", 3)])
def test_scores_that_are_not_finite_are_counted(
    name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"tests.attacks.white_box_faults:{name}"
    words = ["--canaries", "--count", "60", "--seed", "1", "--alpha", "1e-6", "--out", str(tmp_path / "a"), "--json"]
    assert app.run(["audit-trainer", target, *words]) == code
    document = json.loads(capsys.readouterr().out)
    (check,) = [item for item in document["validity"]["checks"] if item["name"] == "finite scores"]
    count = int(check["measured"].split()[0])
    assert check["measured"] == f"{count} of 60 scores after training are not finite"
    if code:
        assert (document["verdict"], check["status"], count) == ("invalid", "fail", 60) and not document["tests"]
    else:
        assert (document["verdict"], check["status"]) == ("inconclusive", "not applicable") and 5 < count < 40


def test_an_eps_below_what_the_mechanism_costs_is_unsupported(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", "tests.attacks.external_toy:boastful", audits=("white-box",), alpha=1e-6)
    assert document.verdict == "unsupported"
    assert [row.status for row in document.ledger] == ["UNACCOUNTED"]


def test_epsilon_on_the_command_line_comes_first(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", audits=("canaries",), count=40, epsilon=30.0, delta=1e-4)
    assert document.claim is not None
    assert (document.claim.epsilon, document.claim.delta) == (30.0, 1e-4)
    assert document.ledger[0].status == "accounted"


def test_what_is_not_offered_is_not_applicable(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", "tests.attacks.external_toy:bare", audits=("canaries", "white-box"), runs=20)
    skipped = {check.name: check for check in document.validity.checks if check.status == "not applicable"}
    assert set(skipped) == {"canary game", "white-box game", "multi-run audit"}
    assert "inject" in skipped["white-box game"].measured
    assert document.verdict == "inconclusive" and not document.tests


def test_coins_are_hashed_before_the_first_step_and_checked_after(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "a"
    step = external_toy.Toy.step

    def spy(self, indices):  # type: ignore[no-untyped-def]
        assert LedgerDocument.read(place / "release" / "ledger.json").coins_sha256
        if self.done == 3:
            frame = pd.read_parquet(place / "private" / "coins.parquet")
            frame.assign(member=~frame["member"]).to_parquet(place / "private" / "coins.parquet")
            raise KeyboardInterrupt
        step(self, indices)

    monkeypatch.setattr(external_toy.Toy, "step", spy)
    with pytest.raises(KeyboardInterrupt):
        audit(place, audits=("canaries",), count=30)
    monkeypatch.setattr(external_toy.Toy, "step", step)
    with pytest.raises(InvalidGame, match="the coins were edited"):
        audit(place, audits=("canaries",), count=30)


def test_an_interrupted_multi_run_audit_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch) -> None:
    whole = audit(tmp_path / "whole", runs=24, steps=2)
    train_one, trained = runs.train_one, []

    def stops(setting, target, index, member):  # type: ignore[no-untyped-def]
        if len(trained) == 10:
            raise KeyboardInterrupt
        trained.append(index)
        return train_one(setting, target, index, member)

    monkeypatch.setattr(runs, "train_one", stops)
    with pytest.raises(KeyboardInterrupt):
        audit(tmp_path / "cut", runs=24, steps=2)
    log = tmp_path / "cut" / "private" / "runs.jsonl"
    with log.open("a") as file:
        file.write('{"run": 10, "bef')  # torn by a kill
    trained.clear()
    monkeypatch.setattr(runs, "train_one", lambda *a: trained.append(a[2]) or train_one(*a))
    resumed = audit(tmp_path / "cut", runs=24, steps=2)
    assert trained == list(range(10, 24))
    assert resumed == whole
    release = tmp_path / "cut" / "release"
    shutil.copy(release / "SHA256SUMS", release / ".SHA256SUMS.next")  # killed at its very last write
    with pytest.raises(UsageError, match="holds a finished audit"):
        audit(tmp_path / "cut", runs=24, steps=2)
    assert not (release / ".SHA256SUMS.next").exists()


def test_the_hash_of_the_code_is_that_of_ones_own_files(tmp_path: Path, monkeypatch) -> None:
    """Not of the packages in a virtual environment inside the project: an executor imports others."""
    monkeypatch.chdir(tmp_path)

    def load(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        module = ModuleType(path.stem)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, path.stem, module)

    before = loaded_code()
    load(tmp_path / ".venv" / "lib" / "python3.11" / "site-packages" / "a_package_of_others.py")
    assert loaded_code() == before
    load(tmp_path / "a_module_of_mine.py")
    assert loaded_code() != before


def test_an_executor_gives_the_same_document_and_sees_no_key(tmp_path: Path) -> None:
    executor = InProcess()
    far = audit(tmp_path / "far", executor=executor, runs=24, steps=2)
    assert far == audit(tmp_path / "near", runs=24, steps=2)
    assert [payload["run"] for payload in executor.payloads] == list(range(24))
    key = RunFolder(tmp_path / "far").noise_key.read_text()
    sent = json.dumps(executor.payloads)
    assert all(word not in sent for word in re.findall(r"[0-9a-f]{32,}", key))
    assert Key.load(RunFolder(tmp_path / "far").noise_key).material.hex() not in sent


def test_an_unfinished_audit_is_not_taken_up_by_another(tmp_path: Path, monkeypatch) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_one", stops)
    with pytest.raises(KeyboardInterrupt):
        audit(tmp_path / "a", runs=24, steps=2)
    with pytest.raises(UsageError, match="holds an unfinished audit with another runs"):
        audit(tmp_path / "a", runs=30, steps=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        audit(tmp_path / "b", runs=24, steps=2)


def test_nothing_private_is_released(tmp_path: Path) -> None:
    document = audit(tmp_path / "a", audits=("canaries",), count=40)
    released = sorted(file.name for file in (tmp_path / "a" / "release").iterdir())
    assert released == ["SHA256SUMS", "audit.json", "claim.json", "games", "ledger.json"]
    assert json.loads((tmp_path / "a" / "release" / "audit.json").read_text()) == json.loads(document.to_json())
    for name in ("coins.parquet", "canary-scores.parquet", "noise.key", "settings.json"):
        assert (tmp_path / "a" / "private" / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("sample", lambda self: [999], r"sample\(\): drew index 999; accepted: 0 to"),
        ("canaries", lambda self, n, seed: [1, 2], r"canaries\(\): returned 2 records; accepted: a list of the 30"),
        ("score", lambda self, record: "high", r"score\(\): raised ValueError"),
        ("epsilon", lambda self, delta: None, r"epsilon\(\): returned None"),
        ("step", lambda self, indices: 1 / 0, r"step\(\): raised ZeroDivisionError"),
    ],
)
def test_foreign_mistakes_are_one_line(tmp_path: Path, monkeypatch, method: str, value: Any, message: str) -> None:
    monkeypatch.setattr(external_toy.Toy, method, value)
    with pytest.raises(MethodFailure, match=message):
        audit(tmp_path / "a", audits=("canaries",), count=30)


def test_a_hanging_factory_is_named(tmp_path: Path, monkeypatch) -> None:
    import time

    monkeypatch.setattr(external_toy.Toy, "sample", lambda self: time.sleep(60))
    with pytest.raises(MethodFailure, match=r"sample\(\): did not return within 0.2 s \(--time-limit\)"):
        audit(tmp_path / "a", audits=("canaries",), count=30, time_limit=0.2)


def test_repeated_candidates_make_the_game_invalid(tmp_path: Path, monkeypatch) -> None:
    drawn = external_toy.Toy.canaries
    monkeypatch.setattr(external_toy.Toy, "canaries", lambda self, n, seed: [drawn(self, 1, seed)[0]] * n)
    document = audit(tmp_path / "a", audits=("canaries",), count=30)
    assert document.verdict == "invalid" and not document.tests and not document.scores


def test_options_are_checked_before_anything_runs() -> None:
    for options, message in (
        ({"count": 1}, "--count"),
        ({"runs": 5}, "--runs"),
        ({"audits": ("mia",)}, "--mia: there is no such audit of a trainer"),
        ({"delta": 2.0}, "--delta"),
        ({"epsilon": 0.0}, "--epsilon"),
        ({"time_limit": 0.0}, "--time-limit"),
        ({"audits": ("contract",), "count": 20}, "--count: sets the canaries of a game"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainerOptions("a:b", **options)  # type: ignore[arg-type]


def test_scores_that_are_not_finite_rank_at_the_ends() -> None:
    from attacks.games.reading import finite

    found = finite(np.array([1.0, np.nan, np.inf, -np.inf, 2.0]))
    assert found.tolist() == [1.0, 0.0, 3.0, 0.0, 2.0]
