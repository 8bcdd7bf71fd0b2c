"""The white-box game: exact law of the scores, claims tested on real (tiny) runs, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest

from attacks import white_box
from attacks.audit import audit
from attacks.canaries import ALL, Plan
from attacks.options import Options
from attacks.training import start_run
from attacks.white_box import (
    PARAMETERS_PER_CANARY,
    Directions,
    GradientGame,
    audit_twin,
    loud,
    loud_of,
    loud_tests,
    train_twin,
)
from dpaudit import accounting
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import Claim
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.tiny import save_tiny_llava

DPAUDIT = Path(sys.executable).parent / "dpaudit"
COUNT = 400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


def config(tiny: Path, *extra: str) -> RunConfig:
    settings = ["seed=3", f"model.path={tiny}", "model.device=cpu", "data.limit=40", "training.batch-size=24"]
    return resolve({}, [*settings, "training.steps=12", "model.lora.rank=4", "privacy.noise-multiplier=1.0", *extra])


def game(**changes: Any) -> GradientGame:
    values: dict[str, Any] = {
        "max_grad_norm": 0.5,
        "noise_multiplier": 1.3,
        "sample_rate": 0.4,
        "expected_batch_size": 7.0,
    } | changes
    return GradientGame(20, Key.from_seed(1), **values)


def test_directions_are_orthonormal_and_room_is_required() -> None:
    mine = game()
    rows = mine.rows(400)
    assert len(rows) == int(mine.members.sum())
    gram = mine._directions @ mine._directions.T
    torch.testing.assert_close(gram, torch.eye(20), atol=1e-5, rtol=0)
    norms = rows.norm(dim=1)
    assert set(np.round(norms.numpy(), 3).tolist()) == {0.5, 50.0}
    with pytest.raises(UsageError, match=r"--count: got 20; accepted: at most 19"):
        game().rows(20 * PARAMETERS_PER_CANARY - 1)


def test_scores_are_the_log_likelihood_ratio_of_the_claimed_mechanism() -> None:
    """Against a direct computation, and E_out[exp(score)] = 1 as any likelihood ratio must have."""
    rng, mine = np.random.default_rng(0), game()
    mine.rows(400)
    expected = np.zeros(20)
    for step in range(1, 6):
        known = {"b": torch.tensor(rng.normal(size=(300,)), dtype=torch.float32), "a": torch.zeros(10, 10)}
        noise = {
            name: torch.tensor(rng.normal(size=tuple(value.shape)) * 0.65).float() for name, value in known.items()
        }
        noisy = {name: (known[name] + noise[name]) / 7.0 for name in known}
        mine.observe(step, noisy, known)
        flat = torch.cat([noise["a"].flatten(), noise["b"].flatten()])
        for index in range(20):
            z = float(mine._directions[index] @ flat) / 0.5
            density = np.exp(-((z - np.array([0.0, 1.0])) ** 2) / (2 * 1.3**2))
            expected[index] += np.log(0.6 + 0.4 * density[1] / density[0])
    np.testing.assert_allclose(mine.scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("directions", ["orthogonal", "dirac", "random"])
def test_directions_are_unit_vectors_and_meet_as_they_say(directions: Directions) -> None:
    mine = game(directions=directions)
    mine.rows(4000)
    gram = (mine._directions @ mine._directions.T).numpy()
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-5)
    meeting = np.abs(gram - np.eye(20)).max()
    assert meeting < 1e-5 if directions != "random" else 1e-3 < meeting < 6 / 4000**0.5
    if directions == "dirac":
        assert (mine._directions != 0).sum() == 20
    assert mine.kind == ("gradient" if directions == "orthogonal" else f"gradient-{directions}")


def test_only_separate_canaries_that_every_step_shows_are_decided_by_order_statistics(
    tiny: Path, tmp_path: Path
) -> None:
    """And from the final update alone members are told apart: AUC of 0.5 +- 6 standard errors would be chance."""
    noise = ("privacy.noise-multiplier=0.3", "training.batch-size=120", "training.optimizer=sgd")
    decided = {}
    for directions, final in (("random", False), ("dirac", False), ("orthogonal", True)):
        twin = train_twin(
            config(tiny, *noise), tmp_path / f"{directions}{final}", count=200, directions=directions, final=final
        )  # type: ignore[arg-type]
        part = audit_twin(twin, confidence=0.95, alpha=1e-6)
        deciding = [test for test in part.tests if test.decides and test.p_value is not None]
        assert [test.n for test in deciding] == [200, 100]  # all, and those that arrive at 100 C
        assert all(test.p_value is not None and test.p_value > 1e-6 for test in deciding)
        assert deciding[0].bound == deciding[1].bound
        decided[directions, final] = deciding[0].bound
        assert part.scores[0].auc > 0.5 + 6 * 0.29 / 100**0.5 * 0.82
        assert all("final update" in test.statistic for test in part.tests) == final
    assert decided == {("random", False): "f-dp", ("dirac", False): "order-statistic", ("orthogonal", True): "f-dp"}


def test_a_correct_run_is_not_refuted_and_half_the_noise_is(tiny: Path, tmp_path: Path) -> None:
    """At level 1e-6 (the false-alarm rate of this test); half the noise is found far beyond it."""
    values, members = {}, {}
    for name, scale in (("correct", 1.0), ("half", 0.5)):
        twin = train_twin(
            config(tiny, f"planted.noise-scale={scale}", "training.batch-size=400", "privacy.noise-multiplier=3"),
            tmp_path / name,
            count=COUNT,
        )
        part = audit_twin(twin, confidence=0.95, alpha=1e-6)
        deciding = [test for test in part.tests if test.decides and test.p_value is not None]
        assert [(test.bound, test.n) for test in deciding] == [
            ("order-statistic", COUNT),
            ("order-statistic", COUNT // 2),
        ]
        values[name] = deciding[0].p_value
        members[name] = part
    other = train_twin(config(tiny, "seed=4", "training.steps=1"), tmp_path / "other", count=COUNT)
    (tmp_path / "correct" / "private" / "scores.parquet").write_bytes(
        other.scores.read_bytes()
    )  # the same ids, other coins
    mixed = audit_twin(RunFolder.open(tmp_path / "correct"), confidence=0.95, alpha=1e-6)
    assert not mixed.validity.sound and not mixed.tests and "scores of another run" in mixed.validity.checks[0].measured
    assert values["correct"] is not None and values["correct"] > 1e-6
    assert values["half"] is not None and values["half"] < 1e-6
    bound = {test.bound: test for test in members["half"].tests if test.assumes == "none"}["steinke"]
    assert 0 < float(bound.epsilon_lower or 0) <= float(bound.ceiling or 0)


@pytest.mark.parametrize("name", ["gradient-99999999999", "gradient--1", "gradient-x", "canary-000001", "", "9" * 5000])
def test_an_id_of_no_gradient_canary_is_an_invalid_game(name: str) -> None:
    """No array of the size that an id asks for is made."""
    frame = pd.DataFrame({"id": ["gradient-00000", name]})
    with pytest.raises(InvalidGame, match="not that of a gradient canary"):
        loud_of(frame)


def test_loud_canaries_are_judged_by_themselves() -> None:
    """Where clipping lets 100 C through and drowns the rest, ranks of all together find nothing and the loud half does:
    a true claim gives p <= 1e-6 at most once in a million games."""
    rng = np.random.default_rng(3)
    members = rng.random(600) < 0.5
    mine = loud(600)
    scores = np.where(mine, 100.0 * members, 0.0) + rng.normal(size=600)
    epsilon = accounting.epsilon(accounting.DpSgd(1.0, 0.2, 10, "add-remove"), 1e-5)
    claim = Claim(
        epsilon=epsilon, delta=1e-5, relation="add-remove", unit="image", sampling="poisson", noise_multiplier=1.0,
        sample_rate=0.2, steps=10, max_grad_norm=1.0,
    )  # fmt: skip
    together = white_box.tests_of(scores, members, claim, Plan({ALL: (150, 150)}, 1), confidence=0.95, alpha=0.05)
    alone = loud_tests(scores[mine], members[mine], claim, 1, (75, 75), alpha=0.05)
    worst = [test.p_value for test in (*together, *alone) if test.decides and test.p_value is not None]
    assert len(worst) == 2 and worst[0] > 1e-6 and worst[1] < 1e-15
    frame = pd.DataFrame({"id": [f"gradient-{index:05d}" for index in range(600)]}).sample(frac=1, random_state=0)
    assert np.array_equal(loud_of(frame), mine[frame.index.to_numpy()])  # whatever the order of the rows
    assert loud_tests(np.empty(0), np.empty(0, bool), claim, 1, (0, 0), alpha=0.05) == ()


def test_residuals_of_candidates_left_out_are_pure_noise(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """What the auditor sees of a canary whose coin fell tails is N(0, sigma^2), whatever the records do."""
    seen: list[np.ndarray] = []
    plain = GradientGame.observe

    def spy(self, step, noisy, known):  # type: ignore[no-untyped-def]
        rest = torch.cat([(noisy[name] * self.expected_batch_size - known[name]).flatten() for name in sorted(noisy)])
        seen.append((self._directions @ rest).double().numpy()[~self.members] / self.max_grad_norm)
        plain(self, step, noisy, known)

    monkeypatch.setattr(GradientGame, "observe", spy)
    train_twin(config(tiny), tmp_path / "twin", count=COUNT)
    assert kstest(np.concatenate(seen), "norm").pvalue > 1e-7


def test_audit_command_with_white_box(tiny: Path, tmp_path: Path) -> None:
    run = start_run(config(tiny), tmp_path / "run")
    done = subprocess.run(
        [str(DPAUDIT), "audit", str(run.path), "--white-box", "--count", "100", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] in ("inconclusive", "not refuted")
    assert document["run"]["audits"] == "the training procedure, not these weights"
    powers = [test["power"] for test in document["tests"] if test["power"] is not None]
    assert powers and (document["verdict"] == "not refuted") == (powers[0] >= 0.8)
    twin = RunFolder(run.path / "twin-white-box")
    twin.coins.write_bytes(twin.coins.read_bytes() + b"x")
    edited = audit(run.path, Options(audits=("white-box",)))
    assert edited.verdict == "invalid" and not edited.tests


def test_a_run_without_a_claim_has_no_mechanism_to_audit(tiny: Path, tmp_path: Path) -> None:
    run = start_run(resolve({"method": "non-private"}, ["seed=1", f"model.path={tiny}", "model.device=cpu",
                                                       "data.limit=20", "training.batch-size=8", "training.steps=2"]),
                    tmp_path / "run")  # fmt: skip
    with pytest.raises(UsageError, match="--white-box"):
        audit(run.path, Options(audits=("white-box",)))
