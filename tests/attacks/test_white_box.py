"""The white-box game: exact law of what is seen, controls, claims tested on real (tiny) runs, audits that add up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from attacks.audit import audit
from attacks.games import directions, twins
from attacks.games.controls import Arrived, Liveness, judge_liveness
from attacks.games.directions import Kind
from attacks.games.gradients import PARAMETERS_PER_CANARY, GradientGame
from attacks.games.played import Played
from attacks.options import Options
from attacks.training import start_run
from dpaudit.cli.app import run as command_line
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import AuditDocument, GameDocument, Test
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests import commands
from tests.tiny import save_tiny_llava

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


def played(config: RunConfig, place: Path, **changes: Any) -> Played:
    values: dict[str, Any] = {"count": COUNT, "confidence": 0.95, "alpha": 1e-6} | changes
    return twins.play_white_box(config, place, **values)[0]


def matrix(mine: GradientGame) -> torch.Tensor:
    """(n, P) all directions."""
    assert mine.vectors is not None
    return torch.stack([mine.vectors.row(index) for index in range(len(mine.vectors))])


def deciding(part: Played) -> list[Test]:
    return [test for test in part.tests if test.e_value is not None]


def test_directions_are_orthonormal_and_room_is_required() -> None:
    mine = game()
    rows = mine.rows(400)
    assert len(rows) == int(mine.members.sum())
    vectors = matrix(mine)
    assert len(vectors) == 20 + mine.spare and mine.spare >= 100
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)), atol=1e-5, rtol=0)
    norms = rows[torch.arange(len(rows))].norm(dim=1)
    assert set(np.round(norms.numpy(), 3).tolist()) == {0.5, 50.0}
    with pytest.raises(UsageError, match=r"--count: got 20; accepted: at most 19"):
        game().rows(20 * PARAMETERS_PER_CANARY - 1)


def test_scores_are_the_log_likelihood_ratio_of_the_claimed_mechanism() -> None:
    """Against a direct computation over the densities; and the spare directions add up the squares of the noise."""
    rng, mine = np.random.default_rng(0), game()
    mine.rows(400)
    expected, squares = np.zeros(20), 0.0
    for step in range(1, 6):
        known = {"b": torch.tensor(rng.normal(size=(300,)), dtype=torch.float32), "a": torch.zeros(10, 10)}
        noise = {
            name: torch.tensor(rng.normal(size=tuple(value.shape)) * 0.65).float() for name, value in known.items()
        }
        noisy = {name: (known[name] + noise[name]) / 7.0 for name in known}
        mine.observe(step, noisy, known, np.array([], dtype=int))
        flat = torch.cat([noise["a"].flatten(), noise["b"].flatten()])
        z = (matrix(mine) @ flat).numpy() / 0.5
        density = np.exp(-((z[:20, None] - np.array([0.0, 1.0])) ** 2) / (2 * 1.3**2))
        expected += np.log(0.6 + 0.4 * density[:, 1] / density[:, 0])
        squares += float((z[20:] ** 2).sum()) / 1.3**2
    np.testing.assert_allclose(mine.scores(), expected, rtol=1e-3, atol=1e-4)
    assert float(np.square(mine.empty()).sum()) == pytest.approx(squares, rel=1e-4)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["orthogonal", "dirac", "random"])
def test_directions_are_unit_vectors_and_meet_as_they_say(
    kind: Kind, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """large: as drawn for models of which no matrix of directions is made."""
    if large:
        monkeypatch.setattr(directions, "DENSE", 0)
    mine = game(directions=kind)
    rows = mine.rows(4000)
    vectors = matrix(mine)
    gram = (vectors @ vectors.T).numpy()
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-5)
    meeting = np.abs(gram - np.eye(len(gram))).max()
    assert meeting < 1e-5 if kind != "random" else 1e-3 < meeting < 6.5 / 4000**0.5
    if kind == "dirac":
        assert (vectors != 0).sum() == len(gram)
    if kind == "orthogonal" and large:
        used = (vectors != 0).sum(dim=0)
        assert set(used.tolist()) <= {0, 1} and int(used.sum()) == len(vectors) * (4000 // len(vectors))
        assert 0.45 < float((vectors[vectors != 0] > 0).float().mean()) < 0.55
    flat = torch.from_numpy(np.random.default_rng(0).normal(size=4000)).float()
    assert mine.vectors is not None
    torch.testing.assert_close(mine.vectors.along(flat), vectors @ flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.vectors.total(torch.tensor([5, 1, 7])), vectors[[5, 1, 7]].sum(dim=0))
    several = torch.tensor([2, 0])
    torch.testing.assert_close(rows[several], torch.stack([rows[2], rows[0]]))
    torch.testing.assert_close(rows[2], vectors[mine.inserted[2]] * float(rows[2].norm()))
    assert mine.exact == (kind != "random")
    assert mine.kind == ("gradient" if kind == "orthogonal" else f"gradient-{kind}")


@pytest.mark.parametrize(
    "least, most, elsewhere, outcome",
    [
        (1.0, 1.0, 0.0, "earned"),
        (0.0, 0.0, 0.0, "failed"),
        (-1.0, 1.0, 0.0, "failed"),  # a turned sign
        (0.4, 1.0, 0.0, "failed"),
        (0.9, 1.0, 0.0, "not earned"),
        (1.0, 100.0, 0.0, "broken"),
        (1.0, 1.05, 0.0, "broken"),
        (0.0, 2.0, 0.0, "broken"),  # that another one is dead takes nothing back
        (1.0, 1.03, 0.02, "not earned"),  # rounding of the release, as it shows along the others
        (1.0, 100.0, 0.3, "not earned"),  # equal steps that differ
        (1.0, 1.0, 0.3, "not earned"),
        (1.0, float("inf"), 0.0, "failed"),
        (float("nan"), 1.0, 0.0, "failed"),
    ],
)
def test_liveness(least: float, most: float, elsewhere: float, outcome: str) -> None:
    moved = np.array([least, most, elsewhere, 0.0])
    found = judge_liveness([Liveness.of(moved, np.array([0, 1]), "step 1")], Arrived(), 1.0)
    assert [(item.name, item.outcome) for item in found] == [("liveness", outcome)]


@pytest.mark.parametrize(
    "share, outcome", ((1.0, "earned"), (0.0, "failed"), (0.3, "failed"), (0.7, "not earned"), (1.4, "not earned"))
)
def test_arrival_over_the_whole_game(share: float, outcome: str) -> None:
    """A channel that dies late or lets a part through; 4,000 arrivals at sigma = 1, limits of 4.5 standard errors."""
    arrived = Arrived()
    arrived.add(share + np.random.default_rng(1).normal(size=4000))
    assert judge_liveness([], arrived, 1.0)[0].outcome == outcome
    few = Arrived()
    few.add(np.ones(5))
    assert judge_liveness([], few, 1.0)[0].outcome == "not earned"
    assert judge_liveness([], Arrived(), 1.0)[0].outcome == "not earned"


def test_where_the_channel_is_not_known_coins_are_counted_and_no_power_is_stated(tiny: Path, tmp_path: Path) -> None:
    """And from the final update alone members are told apart: AUC of 0.5 +- 6 standard errors would be chance."""
    noise = ("privacy.noise-multiplier=0.3", "training.batch-size=120", "training.optimizer=sgd")
    decided = {}
    for kind, final in (("random", False), ("dirac", False), ("orthogonal", True)):
        words: dict[str, Any] = {"count": 200, "directions": kind, "final": final}
        part = played(config(tiny, *noise), tmp_path / f"{kind}{final}", **words)
        assert part.validity.sound
        found = deciding(part)
        assert all(float(test.e_value or 0) * test.share < 1e6 for test in found)
        decided[kind, final] = found[0].bound
        assert (found[0].power is not None) == (kind == "dirac")
        assert part.scores[0].auc > 0.5 + 6 * 0.29 / 100**0.5 * 0.82
        assert all("final update" in test.statistic for test in part.tests) == final
    assert decided == {("random", False): "f-dp", ("dirac", False): "exact likelihood", ("orthogonal", True): "f-dp"}


def test_a_correct_run_is_not_refuted_and_less_noise_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At level 1e-6 (the false-alarm rate of this test); nine tenths of the noise are found far beyond it. The bound
    within DP-SGD(q, T) lies below the claim and near it, and above it where noise is missing. Large: with directions
    as they are drawn for large models."""
    values = {}
    for name, scale in (("correct", 1.0), ("ninety", 0.9), ("correct, large", 1.0), ("ninety, large", 0.9)):
        if "large" in name:
            monkeypatch.setattr(directions, "DENSE", 0)
        settings = (f"planted.noise-scale={scale}", "training.batch-size=400", "privacy.noise-multiplier=2")
        part = played(config(tiny, *settings), tmp_path / name)
        tests = deciding(part)
        assert [test.bound for test in tests] == ["exact likelihood"] * 2 + ["chi-square"] * 3
        values[name] = sum(test.share * float(test.e_value or 0) for test in tests)
        within = next(test for test in part.tests if test.assumes == "dp-sgd(q,T)")
        free = next(test for test in part.tests if test.bound == "steinke")
        assert 0 <= float(free.epsilon_lower or 0) <= float(free.ceiling or 0)
        assert 0 < float(within.epsilon_lower or 0) <= float(within.ceiling or 0)
        earned = {control.name: control.outcome for control in part.controls}
        assert earned["liveness"] == "earned"
        assert "records" not in earned, "their sum is the trainer's own: it agrees with itself"
        assert (earned["noise level"] == "earned") == (scale == 1.0)
        assert (tests[0].power is not None) == (scale == 1.0)
    for large in ("", ", large"):
        assert values[f"correct{large}"] < 1e6 < values[f"ninety{large}"]


def test_what_is_seen_of_candidates_left_out_is_pure_noise(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """What the auditor sees of a canary whose coin fell tails is N(0, sigma^2), whatever the records do."""
    games: list[GradientGame] = []
    monkeypatch.setattr(twins, "read_game", lambda game, *_, **__: games.append(game))
    twins.play_white_box(config(tiny), tmp_path / "twin", count=COUNT, confidence=0.95, alpha=1e-6)
    mine = games[0]
    assert len(mine.liveness) == 3 and all(item.least == pytest.approx(1.0, abs=1e-3) for item in mine.liveness)
    assert kstest(mine.seen()[~mine.members].ravel() / mine.noise_multiplier, "norm").pvalue > 1e-7


def test_audits_add_up_and_lose_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole command: white box, then canaries, then again; what was found stays, and what was taken out is
    noticed. The first audit is a process of its own."""
    run = start_run(config(tiny, "planted.noise-scale=0.5"), tmp_path / "run")

    def command(*flags: str) -> tuple[int, dict[str, Any], str]:
        count = [] if "--fusion" in flags else ["--count", "30"]
        words = ["audit", str(run.path), *count, "--json", *flags]
        if not run.audit.exists():
            done = commands.run(*words)
            return done.code, json.loads(done.stdout) if done.stdout else {}, done.stderr
        capfd.readouterr()
        code = command_line(words)
        stdout, stderr = capfd.readouterr()
        return code, json.loads(stdout) if stdout else {}, stderr

    code, first, errors = command("--white-box")
    assert (code, first["verdict"]) == (1, "refuted"), errors
    assert first["run"]["about"] == "procedure" and len(first["games"]) == 1
    code, second, errors = command("--white-box", "--canaries")
    assert (code, second["verdict"]) == (1, "refuted"), errors
    assert "played already" in errors and [game["game"] for game in second["games"]] == ["white-box", "canaries"]
    assert second["tests"][: len(first["tests"])] == first["tests"]
    twin = RunFolder(run.path / "twin-white-box")
    twin.coins.write_bytes(b"x")  # the twin is no part of the evidence any more
    code, third, errors = command("--white-box", "--again")
    assert code == 1 and len(third["games"]) == 3, errors
    assert (run.path / "twin-white-box-2").is_dir()
    assert third["games"][2]["coins_sha256"] != third["games"][0]["coins_sha256"]
    games = sorted(run.games.iterdir())
    for game in games[:2]:
        kept = game.read_bytes()
        game.unlink()
        code, _, errors = command("--fusion")
        assert code == 2 and len(errors.strip().splitlines()) == 1 and "missing" in errors
        game.write_bytes(kept.replace(b'"n": 30', b'"n": 31'))
        assert command("--fusion")[0] == 2
        game.write_bytes(kept)
    run.audit.unlink()  # killed between the two writes: made again from the games
    code, last, errors = command("--canaries")
    assert code == 1 and last["verdict"] == "refuted" and len(last["games"]) == 3, errors


def test_an_audit_of_version_1_stays(tiny: Path, tmp_path: Path) -> None:
    """A folder audited before games were recorded: its refutation and its tests are the first game of the record."""
    run = start_run(config(tiny), tmp_path / "run")
    old = {
        "schema_version": 1, "verdict": "refuted", "reasons": ["p = 1e-12"], "claim": None, "alternative": None,
        "alpha": 0.001, "family_confidence": 0.95, "validity": {"sound": True, "checks": []},
        "run": {"name": "run", "method": "dual-priv", "config_sha256": "0" * 64,
                "audits": "the training procedure, not these weights"},
        "tests": [{"name": "white box", "statistic": "s", "bound": "order-statistic", "assumes": "claimed-mechanism",
                   "selection": "fixed", "confidence": 0.999, "delta": 1e-5, "n": 100, "guesses": 50,
                   "epsilon_lower": None, "ceiling": None, "p_value": 1e-12, "power": 0.99}],
    }  # fmt: skip
    document = AuditDocument.model_validate(old)
    with run.lock():
        run.write(document)
    found = audit(run.path, Options(audits=("fusion",)))
    assert found.verdict == "refuted" and [entry.game for entry in found.games] == ["earlier audit", "token path"]
    first = GameDocument.read(run.games / "01-earlier-audit.json")
    assert first.about == "procedure" and first.tests[0].power is None and first.tests[0].p_value == 1e-12
    lines: list[str] = []
    again = audit(run.path, Options(audits=("fusion",)), log=lines.append)  # the same run: nothing is looked at twice
    assert len(again.games) == 2 and "token path: played already" in " ".join(lines)


def test_a_run_without_a_claim_has_no_mechanism_to_audit(tiny: Path, tmp_path: Path) -> None:
    run = start_run(resolve({"method": "non-private"}, ["seed=1", f"model.path={tiny}", "model.device=cpu",
                                                       "data.limit=20", "training.batch-size=8", "training.steps=2"]),
                    tmp_path / "run")  # fmt: skip
    with pytest.raises(UsageError, match="--white-box"):
        audit(run.path, Options(audits=("white-box",)))
