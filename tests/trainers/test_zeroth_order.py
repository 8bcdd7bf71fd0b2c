"""DP-ZO: numbers against autograd, clipping, noise, claim, resume, and the step contract."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chi2, kstest

from attacks.contract import sampling, verdict
from attacks.training import resume_run, start_run
from dpaudit import accounting
from dpaudit.analysis.claim import claimed_event
from dpaudit.config import ZerothOrderConfig, resolve
from dpaudit.documents import ClaimDocument, LedgerDocument
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.contract import all_but
from tests.tiny import random_units
from trainers.adapters.vlm import factory_for
from trainers.gradients import Gradient, MicroBatch
from trainers.inputs import Rows
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.run import load_model
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel
from trainers.zeroth_order import NUMBERS, ZerothOrder, directions, laplace

DATA = Dataset("random", "image (with all its questions)", random_units(24), random_units(4, seed=9, prefix="t"))
FAST = ["method=dp-zo", "seed=1", "training.batch-size=8", "training.steps=6", "model.lora.rank=2", "model.device=cpu"]
FAST += ["privacy.noise-multiplier=1.5"]


def build(tiny: Path, *extra: str) -> Trainer:
    config = resolve({}, [f"model.path={tiny}", *FAST, *extra])
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    return Trainer.build(config, make_plan(config, DATA, 0), Key.from_seed(1), model, DATA.train)


def zeroth(trainer: Trainer) -> ZerothOrder:
    assert trainer.zeroth is not None
    return trainer.zeroth


def test_numbers_are_directional_derivatives_and_parameters_stay(tiny: Path) -> None:
    trainer = build(tiny, "zeroth-order.directions=3", "zeroth-order.perturbation=1e-3")
    with torch.no_grad():
        for value in trainer.parameters.values():
            value.add_(0.05)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    lines = zeroth(trainer).lines(trainer.key, 1)
    numbers, losses = zeroth(trainer).per_unit(trainer.inputs.select(range(5)), lines)
    assert all(torch.equal(before[name], value) for name, value in trainer.parameters.items())
    assert all(value.grad is None for value in trainer.parameters.values())
    oracle = MicroBatch(trainer.model, trainer.parameters)
    for unit in range(5):
        gradient, loss = oracle.gradient(trainer.inputs.select([unit]))
        exact = torch.stack([sum((gradient[name] * line[name]).sum() for name in line) for line in lines])  # type: ignore[arg-type]
        assert float((numbers[unit] - exact).norm()) <= 0.03 * float(exact.norm())
        assert float(losses[unit]) == pytest.approx(float(loss), rel=1e-3)


class Fixed(ZerothOrder):
    """Numbers given instead of measured."""

    rows = torch.tensor([[3.0, -4.0], [0.3, 0.4], [math.nan, 1.0], [math.inf, 0.0], [0.0, 0.0]])

    def per_unit(self, rows: Rows, lines: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows, torch.zeros(len(self.rows))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [("gaussian", [0.6 + 0.3, -0.8 + 0.4]), ("laplace", [3 / 7 + 0.3, -4 / 7 + 0.4])],
    ids=["gaussian: L2", "laplace: L1"],
)
def test_each_unit_is_clipped_as_one_vector_and_nan_contributes_nothing(
    tiny: Path, noise: str, expected: list[float]
) -> None:
    trainer = build(tiny)
    config = ZerothOrderConfig.model_validate({"noise": noise, "directions": 2})
    found = Fixed(trainer.model, trainer.parameters, config).clipped_sum(trainer.inputs.select([0]), 1.0, [])
    torch.testing.assert_close(found.gradient[NUMBERS], torch.tensor(expected))


def test_directions_are_standard_normal_public_and_fresh_each_step(tiny: Path) -> None:
    parameters = build(tiny).parameters
    key = Key.from_seed(5)

    def flat(step: int, index: int) -> np.ndarray:
        line = directions(key, parameters, step=step, count=2)[index]
        return torch.cat([line[name].flatten() for name in sorted(line)]).double().numpy()

    drawn = [flat(1, 0), flat(1, 1), flat(2, 0)]
    assert np.array_equal(drawn[0], flat(1, 0))
    # False alarm below 1e-6 in all: three laws at 1e-7, three correlations at six standard deviations.
    assert all(kstest(part, "norm").pvalue > 1e-7 for part in drawn)
    worst = np.abs(np.corrcoef(np.stack(drawn)) - np.eye(3)).max()
    assert worst * math.sqrt(len(drawn[0])) < 6


def test_laplace_noise_has_the_claimed_law() -> None:
    key = Key.from_seed(7)
    values = laplace(key, 20_000, step=3, name=NUMBERS).double().numpy()
    assert np.array_equal(values, laplace(key, 20_000, step=3, name=NUMBERS).double().numpy())
    assert kstest(values, "laplace").pvalue > 1e-7
    # The sum of |x| is Gamma(n): 2 |x| are chi-squares with two degrees of freedom.
    assert chi2.ppf(1e-7, 40_000) < 2 * np.abs(values).sum() < chi2.ppf(1 - 1e-7, 40_000)
    assert not np.array_equal(values[:9], laplace(key, 9, step=4, name=NUMBERS).double().numpy())


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_noise_of_a_step_scales_with_sigma_and_the_update_lies_on_the_lines(tiny: Path, noise: str) -> None:
    trainer = build(tiny, f"zeroth-order={{noise: {noise}, directions: 4}}", "privacy.max-grad-norm=0.5")
    plan = trainer.plan
    scale = plan.noise_multiplier * 0.5
    drawn = np.concatenate(
        [(trainer.noisy_mean(step, trainer.clipped_sum(step, []))[NUMBERS] * 8 / scale).numpy() for step in range(200)]
    )
    assert kstest(drawn, "laplace" if noise == "laplace" else "norm").pvalue > 1e-7
    noisy = {NUMBERS: torch.tensor([1.0, -2.0, 0.0, 5.0])}
    lines = zeroth(trainer).lines(trainer.key, 9)
    update = zeroth(trainer).update(noisy, lines)
    for name, value in update.items():
        torch.testing.assert_close(value, (lines[0][name] - 2 * lines[1][name] + 5 * lines[3][name]) / 4)


def test_a_step_takes_no_gradient(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tiny)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    noisy = trainer.noisy_mean(1, trainer.clipped_sum(1, range(8)))
    assert trainer.update(1, noisy) == set(before)
    assert all(not torch.equal(before[name], value) for name, value in trainer.parameters.items())


def test_the_claim_names_mechanism_and_noise(tiny: Path) -> None:
    for noise in ("gaussian", "laplace"):
        extra = (f"zeroth-order={{noise: {noise}, directions: 3}}", "privacy={epsilon: 2, noise-multiplier: null}")
        plan = make_plan(build(tiny, *extra).config, DATA, 0)
        claim = plan.claim
        assert claim is not None and (claim.mechanism, claim.noise) == ("zeroth-order", noise)
        event = accounting.DpSgd(plan.noise_multiplier, 8 / 24, 6, "add-remove", claim.noise)
        assert 0.97 * 2 <= accounting.epsilon(event, 1e-5) <= 2
        assert plan.epsilon_after(6) == accounting.epsilon(event, 1e-5)
        # Audits test a Gaussian claim by its mechanism, a Laplace one by (eps, delta) alone.
        assert claimed_event(claim) == (event if noise == "gaussian" else None)


class Stop(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize(
    ("noise", "optimizer", "count"), [("gaussian", "adamw", 1), ("laplace", "sgd", 2)], ids=["gaussian", "laplace"]
)
def test_an_interrupted_run_resumes_to_the_same_weights_and_ledger(
    tiny: Path, tmp_path: Path, noise: str, optimizer: str, count: int
) -> None:
    extra = [f"zeroth-order={{noise: {noise}, directions: {count}}}", f"training.optimizer={optimizer}"]
    config = resolve({}, [f"model.path={tiny}", *FAST, *extra, "training.checkpoint-every=2"])
    whole = start_run(config, tmp_path / "whole", dataset=DATA)

    def after_step(step: int, noisy: Gradient, known: Gradient) -> None:
        assert set(noisy) == set(known) == {NUMBERS} and noisy[NUMBERS].shape == (count,)
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", dataset=DATA, after_step=after_step)
    cut = RunFolder(tmp_path / "cut")
    spent = LedgerDocument.read(cut.ledger).spent
    assert spent is not None and spent.steps_started == 4 and not cut.finished
    resume_run(cut.path, dataset=DATA)
    assert cut.ledger.read_bytes() == whole.ledger.read_bytes()
    one, two = (load_file(run.model / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7)) and 0 < lines[-1]["epsilon"] < 20
    claim = ClaimDocument.read(whole.claim).claim
    assert claim is not None and claim.noise == noise
    assert "No gradient is taken" in LedgerDocument.read(whole.ledger).rows[0].explanation
    assert len(load_model(whole, "cpu").answer([DATA.test[0].pictures[0].pixels], ["what digit is this?"])) == 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["method=dp-zo", "pruning.keep=0.5"], "pruning.keep"),
        (["method=dp-zo", "training.gradient-path=hooks"], "training.gradient-path"),
        (["method=dp-zo", "zeroth-order.noise=laplace", "privacy.relation=replace"], "privacy.relation"),
        (["method=dp-zo", "zeroth-order.directions=0"], "zeroth-order.directions"),
        (["method=dp-zo", "zeroth-order.perturbation=nan"], "zeroth-order.perturbation"),
        (["method=dp-sgd", "zeroth-order.noise=laplace"], "zeroth-order.noise"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: list[str], field: str) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: got") as error:
        resolve({}, settings)
    assert "\n" not in str(error.value)


def test_the_step_contract_holds(tiny: Path) -> None:
    """Its sampler is that of all methods (test_sampling.py); on the reference model: bugs/test_real_trainers.py."""
    settings = ["training.batch-size=4", "training.steps=20", "training.optimizer=sgd", "training.warmup=0"]
    settings += ["privacy.delta=1e-3", "privacy.max-grad-norm=0.05", "model.lora.targets=[q_proj, v_proj]"]
    settings += ["zeroth-order={directions: 1, perturbation: 1e-2}"]
    data = replace(DATA, train=DATA.train[:12])
    checks = all_but(factory_for(resolve({}, [f"model.path={tiny}", *FAST, *settings]), data), sampling)
    assert verdict(tuple(checks.values())) == "pass", [item for item in checks.values() if item.status == "fail"]
    for name in ("influence of one unit", "noise level", "moves along the public line", "eps reported", "empty batch"):
        assert checks[name].status == "pass"
