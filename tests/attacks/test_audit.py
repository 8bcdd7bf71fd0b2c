"""attacks.audit and attacks.games: from scores to verdict, and the command on a tiny run."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from attacks.audit import audit
from attacks.canaries import ALL, Plan
from attacks.fusion.audit import path_of
from attacks.games.canaries import summaries
from attacks.games.reading import bound_tests, claim_tests
from attacks.games.twins import canary_twin
from attacks.games.white_box import wrong_claim
from attacks.options import Options
from attacks.training import start_run
from dpaudit import accounting, verdict
from dpaudit.bounds import steinke
from dpaudit.cli.app import run as command_line
from dpaudit.config import resolve
from dpaudit.documents import AuditDocument, Claim, EnvironmentDocument, FusionAudit, GradientPathName
from dpaudit.errors import UsageError
from dpaudit.runs import RunFolder
from tests import commands
from tests.tiny import random_units

KINDS = ("mislabelled", "noise", "new-token")


def frame(scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> pd.DataFrame:
    n = len(scores)
    kinds = [KINDS[index * len(KINDS) // n] for index in range(n)]
    return pd.DataFrame({"id": [f"c{i}" for i in range(n)], "kind": kinds, "member": members, "score": scores})


def plan_of(table: pd.DataFrame) -> Plan:
    return Plan.default({kind: int((table["kind"] == kind).sum()) for kind in dict.fromkeys(table["kind"])}, 7)


def test_bounds_are_those_of_counts_made_by_hand() -> None:
    rng = np.random.default_rng(0)
    members = rng.random(150) < 0.5
    table = frame(members * 3.0 + rng.normal(size=150), members)
    tests = bound_tests(table, plan_of(table), confidence=0.95, delta=1e-5)
    assert [test.name for test in tests] == ["canaries: all kinds", *(f"canaries: {kind}" for kind in KINDS)]
    assert sum(1 - test.confidence for test in tests) == pytest.approx(0.05)
    assert tests[0].confidence == pytest.approx(0.975)
    kind = table[table["kind"] == "noise"].sort_values("score")
    correct = int((~kind["member"][:5]).sum() + kind["member"][-5:].sum())  # a tenth on each side
    assert (tests[2].n, tests[2].guesses, tests[2].correct) == (50, 10, correct)
    level = 1 - 0.025 / 3
    assert tests[2].epsilon_lower == steinke.epsilon_lower(
        canaries=50, guesses=10, correct=correct, delta=1e-5, confidence=tests[2].confidence
    )
    assert tests[2].confidence == pytest.approx(level)
    for test in tests:
        assert test.ceiling is not None and test.epsilon_lower is not None
        assert test.epsilon_lower <= test.ceiling
        assert test.assumes == "none"


def test_one_kind_alone_keeps_the_whole_budget() -> None:
    members = np.arange(40) % 3 == 0
    table = frame(members * 1.0, members).assign(kind="noise")
    tests = bound_tests(table, plan_of(table), confidence=0.95, delta=1e-5)
    assert [test.confidence for test in tests] == [0.95]
    assert len(summaries(table)) == 1


def test_on_null_scores_bounds_are_zero_as_often_as_stated() -> None:
    """400 games without leakage: some bound above 0 in at most 5 %, up to a binomial limit of false alarm 1e-7."""
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(400):
        table = frame(rng.normal(size=90), rng.random(90) < 0.5)
        tests = bound_tests(table, plan_of(table), confidence=0.95, delta=1e-5)
        wrong += any(float(test.epsilon_lower or 0) > 0 for test in tests)
    assert wrong <= 46  # binom(400, 0.05): P[> 46] = 7e-08


def test_perfect_scores_reach_the_ceiling() -> None:
    members = np.random.default_rng(4).random(300) < 0.5
    table = frame(members * 5.0 + np.linspace(0, 0.1, 300), members)
    tests = bound_tests(table, plan_of(table), confidence=0.95, delta=1e-5)
    assert tests[0].epsilon_lower == tests[0].ceiling
    assert tests[0].guesses == 110
    # closed form at delta = 0: logit((1 - confidence)^(1/r)), here with a delta term of 2 m delta = 0.006
    q = 0.025 ** (1 / 110)
    assert float(tests[0].ceiling or 0) == pytest.approx(np.log(q / (1 - q)), abs=0.05)


def claim_of(sigma: float) -> Claim:
    event = accounting.DpSgd(sigma, 0.2, 50, "add-remove")
    return Claim(
        epsilon=accounting.epsilon(event, 1e-5), delta=1e-5, relation="add-remove", unit="image", sampling="poisson",
        noise_multiplier=sigma, sample_rate=0.2, steps=50, max_grad_norm=1.0,
    )  # fmt: skip


def test_the_claim_is_tested_with_the_same_guesses_and_its_power_is_not_claimed() -> None:
    members = np.random.default_rng(5).random(150) < 0.5
    table = frame(members * 5.0 + np.random.default_rng(6).normal(size=150), members)
    bounds = bound_tests(table, plan_of(table), confidence=0.95, delta=1e-5)
    tests = claim_tests(table, plan_of(table), claim=claim_of(2.0), confidence=0.95, alpha=0.001)
    assert {test.correct for test in tests} == {bounds[0].correct}
    deciding = [test for test in tests if test.decides]
    assert len(deciding) == 1 and deciding[0].p_value is not None
    assert deciding[0].power is None


def test_the_alternative_is_said_with_its_figures() -> None:
    text = wrong_claim(claim_of(2.0), 0.3)
    weaker = accounting.epsilon(accounting.DpSgd(1.4, 0.2, 50, "add-remove"), 1e-5)
    assert "30% smaller" in text and "1.4 instead of 2" in text and f"eps {weaker:.3g}" in text


def test_audits_that_do_not_exist_are_refused_by_name() -> None:
    for name in ("leakage",):
        with pytest.raises(UsageError, match=rf"^--{name}: .*accepted: --canaries --mia --fusion"):
            Options(audits=(name,))


# -- a tiny run, end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local flat set of 60 random pictures with up to three questions each."""
    folder = tmp_path_factory.mktemp("vqa")
    for name, count, seed in (("train", 60, 0), ("test", 6, 9)):
        rows: list[dict[str, Any]] = []
        for unit in random_units(count, seed=seed):
            out = io.BytesIO()
            Image.fromarray(unit.pictures[0].pixels).save(out, "PNG")
            for question in unit.pictures[0].questions:
                rows.append({"image": out.getvalue(), "question": question.text, "answer": question.answer})
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def settings(tiny: Path, vqa: Path, *extra: str) -> list[str]:
    return [
        f"model.path={tiny}", "model.device=cpu", "model.lora.rank=2", f"data.path={vqa}", "data.train=train.parquet",
        "data.test=test.parquet", "data.reserve=12", "seed=1", "training.batch-size=8", "training.steps=3",
        "privacy.noise-multiplier=1.0", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny: Path, vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = resolve({}, settings(tiny, vqa, "canaries.count=30"))
    return start_run(config, tmp_path_factory.mktemp("runs") / "dp-sgd").path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "dp-sgd"))


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command in this process: a process of its own imports torch for seconds."""

    def run_it(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = command_line(["audit", *map(str, arguments)])
        return Outcome(code, *capfd.readouterr())

    return run_it


@pytest.mark.parametrize(
    ("recorded", "looked_at"),
    [
        (("rows",), ("rows",)),
        (("hooks",), ("rows", "hooks")),  # of a training on a GPU, or edited: what `auto` is here stays
        (("ghost", "rows"), ("rows", "ghost")),  # resumed on another machine
        (None, ("rows", "hooks")),  # an earlier dpaudit: what `auto` is here, and what it was before
        ((), ("rows", "hooks")),  # edited: a method with gradients has a path
    ],
)
def test_the_token_path_is_looked_at_as_the_training_took_it(
    run: Path, recorded: tuple[GradientPathName, ...] | None, looked_at: tuple[str, ...]
) -> None:
    folder = RunFolder(run)
    folder.write(EnvironmentDocument.read(folder.environment).model_copy(update={"gradient_paths": recorded}))
    path = path_of(folder, random_units(2, seed=3))
    assert tuple(way.kind for way in path.gradients) == looked_at


def test_a_recorded_path_that_clips_nothing_is_refused(run: Path) -> None:
    folder = RunFolder(run)
    folder.write(EnvironmentDocument.read(folder.environment).model_copy(update={"gradient_paths": ("plain",)}))
    with pytest.raises(UsageError, match="gradient_paths: got plain; accepted: a path that clips, for method dp-sgd"):
        path_of(folder, random_units(2, seed=3))


def test_the_installed_command_prints_one_document_and_leaves_it_in_the_release(run: Path) -> None:
    done = commands.run("audit", run, "--json", "--confidence", "0.9", timeout=300)
    assert done.code == 0, done.stderr
    document = AuditDocument.model_validate_json(done.stdout)
    assert document.to_json() == done.stdout == (run / "release" / "audit.json").read_text()
    assert document.verdict == "inconclusive"
    assert document.family_confidence == 0.9
    assert document.claim is not None and document.alternative
    assert [test.name for test in document.tests][:4] == ["canaries: all kinds", *(f"canaries: {k}" for k in KINDS)]
    assert {thumbnail.kind for thumbnail in document.gallery} == {"noise", "new-token"}
    assert document.fusion is not None
    assert document.run is not None and document.run.about == "weights"
    assert document.run.command == "dpaudit audit dp-sgd --json --confidence 0.9"
    assert str(run.parent) not in done.stdout
    scores = pd.read_parquet(run / "private" / "scores.parquet")
    assert list(scores.columns) == ["id", "kind", "member", "score"] and len(scores) == 30
    assert (run / "private" / "scores.parquet").stat().st_mode & 0o777 == 0o600
    assert not (run / "release" / "scores.parquet").exists()


def test_for_people_and_with_gates(run: Path, typed: Callable[..., Outcome]) -> None:
    gate = typed(run, "--fusion", "--fail-above", "1")
    assert gate.code == 0 and "no bound was computed" in gate.stderr and "--strict" in gate.stderr
    assert "eps >=" not in gate.stdout
    done = typed(run, "--canaries", "--strict")
    assert done.code == 3
    assert done.stdout.rstrip().endswith("An audit can refute a claim; it can never prove privacy.")
    assert f"next      dpaudit audit {run} --white-box" in done.stdout
    assert "verdict   inconclusive" in done.stdout
    assert "ceiling" in done.stdout


def test_edited_coins_make_the_game_invalid_and_no_number_is_printed(run: Path, typed: Callable[..., Outcome]) -> None:
    table = pd.read_parquet(run / "private" / "coins.parquet")
    table["member"] = ~table["member"]
    table.to_parquet(run / "private" / "coins.parquet")
    done = typed(run, "--canaries", "--json")
    assert done.code == 3
    document = AuditDocument.model_validate_json(done.stdout)
    assert document.verdict == "invalid"
    assert document.tests == () and document.scores == ()
    assert "the coins were edited" in " ".join(document.reasons)


def test_changed_data_make_the_game_invalid(run: Path, vqa: Path, typed: Callable[..., Outcome]) -> None:
    file = vqa / "train.parquet"
    before = file.read_bytes()
    table = pd.read_parquet(file)
    table["question"] = table["question"] + "?"
    table.to_parquet(file)
    try:
        done = typed(run, "--canaries", "--json")
    finally:
        file.write_bytes(before)
    assert done.code == 3
    assert "changed since training" in " ".join(json.loads(done.stdout)["reasons"])


def test_a_run_without_canaries_gets_a_twin(tiny: Path, vqa: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    start_run(resolve({}, settings(tiny, vqa)), path)
    lines: list[str] = []
    assert audit(path, Options(), log=lines.append).tests == ()
    assert "--canaries" in " ".join(lines)
    document = audit(path, Options(audits=("canaries",), count=18))
    assert document.run is not None and document.run.about == "procedure"
    assert document.tests[0].n == 18
    assert "these weights" in document.reasons[-1]
    twin = RunFolder.open(path / "twin-canaries")
    before = twin.noise_key.read_bytes()
    assert audit(path, Options(audits=("canaries",))).tests == document.tests  # trained once
    assert twin.noise_key.read_bytes() == before
    with pytest.raises(UsageError, match="--count: got 13; accepted: 18"):
        audit(path, Options(audits=("canaries",), count=13))


def test_the_count_of_a_run_with_canaries_is_what_it_is(run: Path, typed: Callable[..., Outcome]) -> None:
    done = typed(run, "--canaries", "--count", "10")
    assert done.code == 2 and "--count: got 10; accepted: 30" in done.stderr
    assert typed(run, "--fusion", "--count", "10").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confidence", "1"], "--confidence: got 1.0"),
        (["--alpha", "0"], "--alpha: got 0.0"),
        (["--fail-above", "-1"], "--fail-above: got -1.0"),
        (["--count", "0"], "--count: got 0"),
    ],
)
def test_wrong_flags_are_one_line(run: Path, arguments: list[str], message: str, typed: Callable[..., Outcome]) -> None:
    done = typed(run, *arguments)
    assert done.code == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_folders_that_are_no_finished_run(run: Path, tmp_path: Path, typed: Callable[..., Outcome]) -> None:
    assert typed(tmp_path / "gone").code == 2
    (tmp_path / "empty").mkdir()
    assert typed(tmp_path / "empty").code == 2
    (run / "release" / "model" / "complete.json").unlink()
    done = typed(run)
    assert done.code == 2 and "has not finished" in done.stderr


def test_a_leak_between_records_makes_the_claim_unsupported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leak = FusionAudit(
        training="UNACCOUNTED", release="not released", reducer="none", first_leaking_stage="loss", checks=()
    )
    monkeypatch.setattr("attacks.fusion.audit.audit_fusion", lambda run, log: leak)
    monkeypatch.setattr("attacks.fusion.audit.record", lambda run, result: None)
    document = audit(run, Options(audits=("fusion",)))
    assert document.verdict == "unsupported"
    assert any(row.status == "UNACCOUNTED" for row in document.ledger)


def test_a_twin_of_a_set_without_reserve_leaves_out_mislabelled(tiny: Path, vqa: Path) -> None:
    plain = resolve({}, [*settings(tiny, vqa), "data.reserve=0"])
    assert canary_twin(plain, 10).canaries.kinds == ("noise", "new-token")
    assert canary_twin(resolve({}, ["seed=1"]), 10).canaries.kinds == KINDS


def test_the_headline_is_the_best_bound_that_assumes_nothing(run: Path) -> None:
    document = audit(run, Options(audits=("canaries",)))
    bounds = [float(test.epsilon_lower or 0) for test in document.tests if test.bound == "steinke"]
    best = verdict.headline(document)
    assert best is not None and best.epsilon_lower == max(bounds)
    assert Plan.default({"noise": 5}, 0).guesses[ALL] == (1, 1)
