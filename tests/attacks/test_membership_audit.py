"""`audit --mia` on tiny runs: games decided by coins, reference models, and what makes a game void."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load

from attacks.audit import audit
from attacks.games.members import Settings, play_membership
from attacks.membership.hygiene import look_alikes, overlap_check, require_disjoint
from attacks.membership.members import MemberGame, coins, distinct, member_twin
from attacks.membership.records import study_records
from attacks.membership.references import Study, folder_of, load_study, train_references, trial_of, trial_path, work
from attacks.membership.stacked import losses_under
from attacks.membership.trials import Trials
from attacks.options import MEMBER_TWIN, Options
from attacks.training import start_run
from dpaudit import accounting
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import AuditDocument, Claim, LedgerDocument
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.dpaudit.jobs import InProcess
from tests.tiny import random_units
from trainers.records import Dataset, Unit


def config(tiny: Path, *extra: str) -> RunConfig:
    settings = ["seed=3", f"model.path={tiny}", "model.device=cpu", "data.limit=80", "training.batch-size=16"]
    return resolve({}, [*settings, "training.steps=3", "model.lora.rank=2", "privacy.noise-multiplier=1.0", *extra])


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without canaries, its member twin, and three reference models."""
    run = start_run(config(tiny), tmp_path_factory.mktemp("mia") / "run")
    twin = member_twin(config(tiny), run.path / MEMBER_TWIN)
    train_references(twin, 3, processes=1)
    return run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def settings(**changes: object) -> Settings:
    plain = Settings(claim=None, delta=1e-5, confidence=0.95, alpha=0.001)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_command_audits_real_records_by_a_twin(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    # Any two pictures look alike, so that there are pairs to speak of.
    monkeypatch.setattr("attacks.membership.hygiene.MOST_BITS", 64)
    monkeypatch.setattr("attacks.membership.hygiene.MOST_GREY", 255.0)
    document = audit(run, Options(audits=("mia",), references=3), log=lines.append)
    assert document.run is not None and document.run.about == "procedure"
    names = {test.name for test in document.tests}
    assert names == {"membership: record", "membership: reference trainings"}
    bound = next(test for test in document.tests if test.bound == "steinke")
    assert bound.n == 40 and bound.guesses is not None and float(bound.ceiling or 0) > 0.5
    assert "chosen among" in bound.statistic
    assert {row.name for row in document.attacks} >= {"bavaria", "rmia", "loss-against-base", "gradient-alignment"}
    assert sum(row.chosen for row in document.attacks) == 1
    assert all(row.n == 40 for row in document.attacks)
    assert AuditDocument.read(RunFolder(run).audit) == document
    scores = pd.read_parquet(run / MEMBER_TWIN / "private" / "membership.parquet")
    assert {"id", "kind", "member", "bavaria"} <= set(scores.columns) and len(scores) == 80
    assert (run / MEMBER_TWIN / "private" / "membership.parquet").stat().st_mode & 0o777 == 0o600
    assert not any("trial" in path.name for path in (run / "release").rglob("*"))
    # Who was a member stays private: counts, no ids, in all that is released or printed.
    overlap = next(check for check in document.validity.checks if check.name == "overlap")
    assert overlap.measured.startswith("look-alike pairs: ") and any(overlap.measured in line for line in lines)
    printed = [*lines, *(path.read_text() for path in (run / "release").rglob("*.json"))]
    words = set(re.findall(r"[^\s\"',;()\[\]{}]+", "\n".join(printed)))
    assert not words & set(scores["id"])


def test_the_twin_counts_the_declared_units_and_trains_on_its_heads(run: Path) -> None:
    twin = RunFolder(run / MEMBER_TWIN)
    mine, theirs = (json.loads((place.release / "claim.json").read_text())["claim"] for place in (RunFolder(run), twin))
    for field in ("sample_rate", "steps", "noise_multiplier", "candidates", "epsilon"):
        assert mine[field] == theirs[field]
    frame = pd.read_parquet(twin.coins)
    assert LedgerDocument.read(twin.ledger).coins_sha256 is not None
    key = Key.load(twin.noise_key)
    np.testing.assert_array_equal(frame["member"], coins(key, 80))
    assert 15 < frame["member"].sum() < 65


def test_references_are_kept_resumed_and_the_models_that_their_keys_give(run: Path) -> None:
    twin = RunFolder(run / MEMBER_TWIN)
    before = {index: trial_path(twin, index).read_bytes() for index in range(3)}
    trial_path(twin, 1).write_bytes(before[1][:50])  # torn: not finished
    assert load_study(twin, 3).index.tolist() == [0, 2]
    study = train_references(twin, 3, processes=1)
    assert study.index.tolist() == [0, 1, 2]
    assert all(trial_path(twin, index).read_bytes() == before[index] for index in (0, 2))  # kept as they were
    again, old = load(trial_path(twin, 1).read_bytes()), load(before[1])
    for name, value in old.items():  # another stack adds in another order: equal but for rounding
        np.testing.assert_allclose(again[name], value, rtol=2e-3, atol=2e-4)
    assert oct(folder_of(twin).stat().st_mode & 0o777) == "0o700"
    records = study_records(twin)
    for index in range(3):
        _, inside = trial_of(records, index)
        np.testing.assert_array_equal(study.inside[index], inside)
    assert len({row.tobytes() for row in study.inside}) == 3  # coins of their own


def test_an_executor_trains_what_is_missing_of_each_share(run: Path) -> None:
    """Two shares on an executor; the one that comes back after its worker died trains the missing trial alone."""
    twin = RunFolder(run / MEMBER_TWIN)
    before = {index: trial_path(twin, index).read_bytes() for index in range(3)}
    for index in range(3):
        trial_path(twin, index).unlink()
    executor = InProcess()
    study = train_references(twin, 3, processes=2, executor=executor)
    assert study.index.tolist() == [0, 1, 2]
    assert [payload["trials"] for payload in executor.payloads] == [[0, 2], [1]]
    np.testing.assert_allclose(study.losses[1], load(before[1])["losses"], rtol=2e-3, atol=2e-4)
    kept = trial_path(twin, 0).read_bytes()
    trial_path(twin, 2).unlink()
    assert work({"run": str(twin.path), "trials": [0, 2], "worker": 0})["trained"] == 1  # as an executor does it
    assert trial_path(twin, 0).read_bytes() == kept and trial_path(twin, 2).is_file()


def study_of(leak: float, *, m: int = 400, k: int = 12, seed: int = 0) -> Study:
    rng = np.random.default_rng(seed)
    inside = rng.random((k, m)) < 0.5
    hard = rng.normal(0, 1, m)
    phi = hard + rng.normal(size=(k, m)) + leak * inside
    return Study(np.log1p(np.exp(-phi)), inside, np.ones((k, 5)), np.arange(k))


def claim(sigma: float) -> Claim:
    event = accounting.DpSgd(sigma, 0.2, 50, "add-remove")
    return Claim(
        epsilon=accounting.epsilon(event, 1e-5), delta=1e-5, relation="add-remove", unit="image", sampling="poisson",
        noise_multiplier=sigma, sample_rate=0.2, steps=50, max_grad_norm=1.0,
    )  # fmt: skip


def test_the_e_process_refutes_a_leak_and_leaves_the_null_alone() -> None:
    """Null: independent losses, 60 studies; a level of 0.05 is exceeded in at most 12: binom(60, 0.05), P = 1.4e-05,
    and by Ville's inequality the true rate is below 0.05 (calibration makes it far smaller), so in practice none."""
    kinds = np.array(["record"] * 400)
    trials = Trials(claim(20.0), kinds, seed=1, alpha=0.05)  # sigma = 20: next to nothing may leak
    assert trials.decided(study_of(4.0))
    assert trials.p_value(study_of(4.0)) < 1e-6
    refuted = sum(trials.decided(study_of(0.0, k=6, seed=seed)) for seed in range(60))
    assert refuted <= 12
    assert Trials(None, kinds, 1, 0.05).tests(study_of(4.0)) == ()
    gap = study_of(4.0)
    late = Study(gap.losses, gap.inside, gap.population, gap.index + 1)  # trial 0 is missing: who came first is unknown
    assert not trials.decided(late) and trials.tests(late) == ()


def test_edited_coins_changed_data_and_foreign_scores_void_the_game(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = RunFolder(run / MEMBER_TWIN)

    def reason() -> str:
        part = play_membership(twin, settings())
        assert not part.validity.sound and part.tests == () and part.scores == () and part.attacks == ()
        return part.validity.checks[-1].explanation

    whole = twin.coins.read_bytes()
    frame = pd.read_parquet(twin.coins)
    frame.assign(member=~frame["member"]).to_parquet(twin.coins)
    assert "the coins were edited" in reason()
    twin.coins.unlink()
    assert "the coins are missing" in reason()
    twin.coins.write_bytes(whole)
    other = Key.from_seed(99)
    monkeypatch.setattr("attacks.membership.records.Key.load", lambda _path: other)
    assert "the data set or the coins have changed since training" in reason()


def test_a_member_and_its_copy_outside_void_the_game() -> None:
    units = random_units(12)
    members = np.arange(12) % 2 == 0
    require_disjoint(units, members)
    copy = replace(units[0], id="copy")
    with pytest.raises(InvalidGame, match=r"overlap: 1 of 7 records that were left out are copies of"):
        require_disjoint((*units, copy), np.append(members, False))
    check = overlap_check((*units, copy), np.append(members, False))
    assert check.status == "fail" and "1 of 7" in check.explanation


def near(unit: Unit, name: str, amount: float) -> Unit:
    picture = unit.pictures[0]
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
    pixels = np.clip(smooth + amount * rng.normal(size=smooth.shape), 0, 255).astype(np.uint8)
    return replace(unit, id=name, pictures=(replace(picture, pixels=pixels),))


def test_look_alikes_are_counted_and_unlike_pictures_are_not() -> None:
    units = random_units(20)
    members = np.arange(22) % 2 == 0
    twins = (*units, near(units[0], "left", 0.0), near(units[1], "right", 2.0))
    pairs = look_alikes(twins, members)
    assert [(pair.member, pair.other, pair.exact) for pair in pairs] == [("left", "right", False)]
    warnings: list[str] = []
    check = overlap_check(twins, members, log=warnings.append)
    assert check.status == "pass" and check.measured == "look-alike pairs: 1, of them equal: 0"
    assert len(warnings) == 1 and check.measured in warnings[0]
    same = (*units, near(units[0], "left", 0.0), near(units[1], "right", 0.0))
    questions = same[-1].pictures[0].questions[:1]
    same = (*same[:-1], replace(same[-1], pictures=(replace(same[-1].pictures[0], questions=questions),)))
    assert look_alikes(same, members)[0].exact


def test_copies_toss_no_coin_and_few_units_make_no_game() -> None:
    units = random_units(50)
    doubled = (*units, replace(units[3], id="again"))
    assert distinct(doubled) == (units, 1)
    dataset = Dataset("x", "image", doubled, random_units(2, seed=9, prefix="e"))
    game = MemberGame.draw(dataset, Key.from_seed(0))
    assert len(game.units) == 50 and game.copies == 1
    with pytest.raises(InvalidGame, match=r"data.train: 10 different units; .* needs at least 40"):
        MemberGame.draw(replace(dataset, train=units[:10]), Key.from_seed(0))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="--references: reference models serve membership inference"):
        Options(audits=("canaries",), references=4)
    with pytest.raises(UsageError, match="--references"):
        Options(audits=("mia",), references=5000)


def test_a_run_with_canaries_is_audited_itself(tiny: Path, tmp_path: Path) -> None:
    """And the game of ten candidates gets no number."""
    wanted = config(tiny, "canaries.count=10", 'canaries.kinds=["blank","rare-answer"]')
    run = start_run(wanted, tmp_path / "run")
    document = audit(run.path, Options(audits=("mia",)))
    assert document.run is not None and document.run.about == "weights"
    assert document.tests == () and document.scores == ()
    assert any(check.name == "number of candidates" for check in document.validity.checks)
    assert not (run.path / MEMBER_TWIN).exists()
    records = study_records(run)
    assert records.candidates == 10 and set(records.population_kinds) == {"blank", "rare-answer"}
    assert len({unit.id for unit in records.units}) == len(records.units)
    shared = records.shared()
    assert np.isfinite(
        losses_under(shared, {n: v.detach() for n, v in shared.model.adapter_parameters().items()}, [0])
    ).all()
