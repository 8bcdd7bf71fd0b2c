"""Accounted fusion: clipped jointly, noised once, composed with training; refused where it can't be kept."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.training import start_run
from dpaudit import accounting
from dpaudit.config import RunConfig, resolve
from dpaudit.errors import DpauditError, UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units, save_tiny_llava
from trainers.fusion import TokenRelease, clip_factor, main, release_of, shrinkage
from trainers.inputs import UnitInputs
from trainers.plan import Inserted, ledger_rows, make_plan
from trainers.records import Dataset
from trainers.run import load_model
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

RELEASE = ["fusion.release=clip-noise", "fusion.radius=5", "fusion.multiplier=2", "privacy.relation=zero-out"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


def tokens(seed: int, *shapes: tuple[int, int], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def joint(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_unit_moves_the_release_by_at_most_the_radius(scale: float) -> None:
    """The joint norm over all pictures of the unit, whatever their tokens: R against nothing, 2R against another."""
    release = TokenRelease(3.0, 1.0, Key.from_seed(0))
    one = release.clipped(tokens(0, (5, 4), (7, 4), scale=scale))
    two = release.clipped([-part for part in tokens(0, (5, 4), (7, 4), scale=scale)])
    assert joint(one) <= 3.0 * (1 + 1e-6)
    assert joint([a - b for a, b in zip(one, two, strict=True)]) <= 6.0 * (1 + 1e-6)
    if scale > 1e-3:
        assert joint(one) == pytest.approx(3.0, rel=1e-5)  # the bound is reached


def test_nothing_but_finite_tokens_pass_the_clipping() -> None:
    release = TokenRelease(3.0, 1.0, Key.from_seed(0))
    bad = tokens(1, (2, 3), (2, 3))
    bad[0][0, 0] = math.nan
    assert clip_factor(bad, 3.0) == 0 and all((part == 0).all() for part in release.clipped(bad))
    published = release.publish(bad, ["a", "b"])
    assert all(torch.isfinite(part).all() for part in published)


def test_noise_is_of_the_stated_size_and_the_same_at_every_use() -> None:
    release = TokenRelease(0.5, 4.0, Key.from_seed(0))
    zero = [torch.zeros(300, 64)]
    one, again = release.publish(zero, ["p"])[0], release.publish(zero, ["p"])[0]
    assert torch.equal(one, again) and not torch.equal(one, release.publish(zero, ["q"])[0])
    # 19,200 normal values: the variance lies within six standard errors (2e-9) of (zR)^2 = 4.
    assert abs(float(one.double().square().mean()) / 4 - 1) < 6 * math.sqrt(2 / one.numel())
    other = TokenRelease(0.5, 4.0, Key.from_seed(1)).publish(zero, ["p"])[0]
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 7 / math.sqrt(one.numel())


def test_the_estimate_is_the_linear_one_of_least_error() -> None:
    """f on the sphere of radius R, y = f + zR N: a |y|-free scalar a minimises E|a y - f|^2 at 1 / (1 + d z^2)."""
    rng, d, z = np.random.default_rng(0), 40, 0.3
    f = rng.normal(size=(4000, d))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    y = f + z * rng.normal(size=f.shape)
    best = float((y * f).sum() / (y * y).sum())
    assert shrinkage(d, z) == pytest.approx(best, rel=0.02)


def test_training_sees_published_tokens_only(tiny: Path) -> None:
    units = random_units(6, pictures=2)
    config = resolve({"method": "dual-priv"}, [f"model.path={tiny}", "reducer.keep=4", "reducer.fuse=3", *RELEASE])
    key = Key.from_seed(0)
    release = release_of(config, key)
    assert release is not None and release.std == 10.0
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(config.reducer)
    plain, noisy = UnitInputs(model, units), UnitInputs(model, units, release=release)
    first, second = noisy.select([0, 3]), noisy.select([3])
    torch.testing.assert_close(first.tokens[2:], second.tokens)  # whoever else is in the batch
    assert torch.equal(noisy.select([3], step=5).tokens, second.tokens)  # and whatever the step
    own = list(plain.select([3]).tokens)
    names = [picture.id for picture in units[3].pictures]
    expected = [release.estimate(part) for part in release.publish(own, names)]
    torch.testing.assert_close(second.tokens, torch.stack(expected))


def test_two_pictures_of_one_name_are_refused(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    release = TokenRelease(1.0, 1.0, Key.from_seed(0))
    UnitInputs(model, [random_units(1)[0]] * 2, release=release)  # the same picture twice is one picture
    units = [random_units(1)[0], random_units(1, seed=1)[0]]
    with pytest.raises(DpauditError, match=r"^fusion\.release: two pictures have the id 'u0\.0'"):
        UnitInputs(model, units, release=release)


def dataset() -> Dataset:
    return Dataset("random", "image", random_units(20), random_units(2, seed=9, prefix="t"))


def small(tiny: Path, *more: str) -> RunConfig:
    settings = ["seed=1", f"model.path={tiny}", "model.device=cpu", "reducer.keep=4", "reducer.fuse=3"]
    settings += ["training.batch-size=8", "training.steps=3", "privacy.delta=1e-3", *more]
    return resolve({"method": "dual-priv"}, settings)


@pytest.mark.parametrize(("relation", "moved"), [("zero-out", 1.0), ("replace", 2.0)])
def test_the_claim_covers_the_release(tiny: Path, relation: str, moved: float) -> None:
    config = small(tiny, *RELEASE, f"privacy.relation={relation}", "privacy.epsilon=6")
    plan = make_plan(config, dataset(), 0)
    claim = plan.claim
    assert claim is not None and claim.token_multiplier == 2.0 and "visual tokens" in claim.release
    training = accounting.DpSgd(plan.noise_multiplier, plan.sample_rate, 3, claim.relation)
    together = accounting.joint_epsilon([training, accounting.release_event(2.0, claim.relation)], 1e-3)
    assert 5.95 < together <= 6.0 == claim.epsilon
    assert accounting.epsilon(training, 1e-3) < 6.0
    assert claim.curve[0].delta == 1e-3 and float(claim.curve[0].epsilon) == together
    assert plan.epsilon_after(3) == together
    # Before the first step the release is spent already.
    assert float(plan.epsilon_after(0) or 0) == pytest.approx(accounting.gaussian_epsilon(moved / 2, 1e-3), rel=0.01)
    rows = {row.path: row for row in ledger_rows(config, dataset(), plan, Inserted())}
    assert rows["released visual tokens"].status == "accounted"
    assert f"mu = {moved / 2:.4g}" in rows["released visual tokens"].evidence
    assert "must not leave" not in rows["token pruning and fusion"].explanation
    without = ledger_rows(small(tiny), dataset(), make_plan(small(tiny), dataset(), 0), Inserted())
    assert "released visual tokens" not in {row.path for row in without}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fusion.release=clip-noise"], r"fusion\.radius: got None; accepted: a number > 0"),
        (["fusion.release=clip-noise", "fusion.radius=1"], r"fusion\.multiplier: got None"),
        ([*RELEASE, "privacy.relation=add-remove"], r"privacy\.relation: got 'add-remove'; accepted: zero-out or rep"),
        (["fusion.radius=1"], r"fusion\.radius: got 1\.0; accepted: only with fusion\.release=clip-noise"),
        ([*RELEASE, "fusion.multiplier=-1"], r"fusion\.multiplier"),
        ([*RELEASE, "method=non-private", "reducer.noise=none", "privacy.epsilon=null"], r"fusion\.release"),
    ],
)
def test_settings_that_can_not_be_kept_are_refused(tiny: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        small(tiny, *settings)


def test_a_release_that_costs_more_than_the_budget_is_refused(tiny: Path) -> None:
    config = small(tiny, *RELEASE, "fusion.multiplier=0.2")
    with pytest.raises(UsageError, match=r"^fusion\.multiplier: got 0\.2; accepted: more than"):
        make_plan(config, dataset(), 0)


def test_a_run_ends_with_the_release_in_claim_and_ledger(tiny: Path, tmp_path: Path) -> None:
    config = small(tiny, *RELEASE)
    run = start_run(config, tmp_path / "run", dataset=dataset())
    ledger = json.loads(run.ledger.read_text())
    claim = json.loads(run.claim.read_text())
    assert ledger["spent"]["epsilon"] <= claim["claim"]["epsilon"] and claim["claim"]["token_multiplier"] == 2.0
    assert "released visual tokens" in {row["path"] for row in ledger["rows"]}
    # New pictures are clipped and shrunk as in training, and not noised.
    model, plain = load_model(run, "cpu"), VisionLanguageModel.load(str(tiny), device="cpu")
    plain.set_reducer(config.reducer)
    pixels = [dataset().test[0].pictures[0].pixels]
    seen, own = model.encoded(pixels)[0].tokens, plain.encoded(pixels)[0].tokens
    factor = min(1.0, 5.0 / float(own.norm())) * shrinkage(own.numel(), 2.0)
    torch.testing.assert_close(seen, own * factor)


def test_the_step_of_a_trainer_uses_the_release(tiny: Path) -> None:
    config = small(tiny, *RELEASE)
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    plan = make_plan(config, dataset(), 0)
    trainer = Trainer.build(config, plan, Key.from_seed(1), model, dataset().train)
    expected = UnitInputs(model, dataset().train, release=release_of(config, Key.from_seed(1)))
    assert torch.equal(trainer.inputs.select([2]).tokens, expected.select([2]).tokens)


def test_public_norms_are_printed_to_choose_the_radius_by() -> None:
    lines: list[str] = []
    main([], lines.append)
    assert "200 public pictures" in lines[0] and len(lines) == 4
