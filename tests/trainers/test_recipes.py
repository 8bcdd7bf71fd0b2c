"""Recipes: each setting against its formula, gradient paths against each other, resume, ledger, eps = infinity."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attacks.audit import audit
from attacks.options import Options
from attacks.training import resume_run, start_run
from dpaudit.config import TrainingConfig, resolve
from dpaudit.documents import ClaimDocument, LedgerDocument
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.tiny import random_units
from trainers.ghost import Ghost
from trainers.gradients import STABILITY, Hooks, MicroBatch, automatic_factors
from trainers.plan import make_plan
from trainers.progress import Silent, StepReport
from trainers.records import Dataset
from trainers.run import load_model
from trainers.step import PATHS, Trainer
from trainers.updates import AdamBc, Average, learning_rate, make_optimizer
from trainers.vlm import VisionLanguageModel

FAST = ["training.batch-size=8", "training.steps=6", "model.lora.rank=2", "model.device=cpu", "seed=1"]
RECIPES = {
    "AdamBC": ["training.optimizer=adambc", "training.beta2=0.95"],
    "average": ["training.average=0.7", "training.schedule=constant"],
    "B only": ["model.lora.train=b", "training.schedule=linear"],
    "alternating": ["model.lora.train=alternating", "pruning.keep=0.5"],
    "augmented": ["training.augmentations=3", "model.lora.train=b"],
    "automatic": ["privacy.clipping=automatic", "training.optimizer=sgd", "training.momentum=0.5"],
    "all": [
        "privacy.clipping=automatic", "model.lora.train=alternating", "training.optimizer=adambc",
        "training.average=0.5", "method=dual-priv", "reducer={keep: 4, fuse: 3, assign: tokens}",
    ],
}  # fmt: skip


def small(units: int = 24) -> Dataset:
    return Dataset("random", "image (with all its questions)", random_units(units), random_units(4, seed=9, prefix="t"))


def settings(tiny: Path, *extra: str) -> list[str]:
    return [f"model.path={tiny}", *FAST, *extra]


def build(tiny: Path, *extra: str) -> Trainer:
    config, dataset = resolve({}, settings(tiny, *extra)), small()
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    return Trainer.build(config, make_plan(config, dataset, 0), Key.from_seed(1), model, dataset.train)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.parameters.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_gradient_paths_agree_step_by_step(tiny: Path, name: str) -> None:
    trainers = [build(tiny, *RECIPES[name], f"training.gradient-path={path}") for path in PATHS if path != "auto"]
    for step in range(1, 4):
        one, *others = (trainer.clipped_sum(step, range(8)) for trainer in trainers)
        for other in others:
            assert one.gradient.keys() == other.gradient.keys()
            for key, value in one.gradient.items():
                torch.testing.assert_close(value, other.gradient[key], rtol=1e-5, atol=1e-5)
        for trainer in trainers:
            trainer.update(step, trainer.noisy_mean(step, one))


class Stopped(Exception):
    pass


class StopAt(Silent):
    """Ends a training behind step 3, one after the checkpoint."""

    def step(self, report: StepReport) -> None:
        if report.step == 3:
            raise Stopped


@pytest.mark.parametrize("name", RECIPES)
def test_resume_is_bit_identical(tiny: Path, tmp_path: Path, name: str) -> None:
    config = resolve({}, settings(tiny, *RECIPES[name], "training.checkpoint-every=2"))
    whole = start_run(config, tmp_path / "whole", dataset=small())
    with pytest.raises(Stopped):
        start_run(config, tmp_path / "cut", dataset=small(), reporter=StopAt())
    cut = resume_run(tmp_path / "cut", dataset=small())
    assert cut.ledger.read_bytes() == whole.ledger.read_bytes()
    one, two = (load_file(run.model / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_schedules_follow_the_step_alone() -> None:
    def rates(schedule: str, warmup: float = 0.0) -> list[float]:
        config = TrainingConfig(schedule=schedule, learning_rate=2.0, warmup=warmup)  # type: ignore[arg-type]
        return [learning_rate(config, step=step, steps=4) for step in range(1, 5)]

    assert rates("constant") == [2.0] * 4
    assert rates("linear") == pytest.approx([2 * (1 - done / 5) for done in (1, 2, 3, 4)])
    assert rates("cosine") == pytest.approx([1 + math.cos(math.pi * done / 5) for done in (1, 2, 3, 4)])
    assert rates("constant", 0.5) == pytest.approx([1.0, 2.0, 2.0, 2.0])
    assert rates("linear", 0.5) == pytest.approx([1.0, 2.0, 2 * (1 - 1 / 3), 2 * (1 - 2 / 3)])


def test_adambc_without_noise_is_adamw_and_with_noise_its_formula() -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7), rng.normal(size=(5, 7))
    config = TrainingConfig(optimizer="adamw", beta1=0.8, beta2=0.9, weight_decay=0.1, learning_rate=0.03)

    def run(optimizer: str, noise: float, floor: float = 0.1) -> torch.Tensor:
        value = nn.Parameter(torch.from_numpy(start.copy()))
        chosen = config.model_copy(update={"optimizer": optimizer, "variance_floor": floor})
        made = make_optimizer({"x": value}, chosen, noise=noise)
        for gradient in gradients:
            value.grad = torch.from_numpy(gradient.copy())
            made.step()
        return value.detach()

    torch.testing.assert_close(run("adambc", 0.0), run("adamw", 0.0), rtol=1e-12, atol=1e-12)
    x, mean, second = start.copy(), np.zeros(7), np.zeros(7)
    for step, gradient in enumerate(gradients, 1):
        mean, second = 0.8 * mean + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        corrected = np.maximum(second / (1 - 0.9**step) - 0.25, 0.3 * 0.25)
        x = x * (1 - 0.003) - 0.03 * (mean / (1 - 0.8**step)) / (np.sqrt(corrected) + 1e-8)
    np.testing.assert_allclose(run("adambc", 0.5, 0.3).numpy(), x, rtol=1e-12)


def test_adambc_takes_out_the_noise_that_is_added(tiny: Path) -> None:
    trainer = build(tiny, "training.optimizer=adambc", "privacy.max-grad-norm=0.3")
    assert isinstance(trainer.optimizer, AdamBc)
    noise = trainer.optimizer.param_groups[0]["noise"]
    assert noise == pytest.approx(trainer.plan.noise_multiplier * 0.3 / 8) and noise == trainer.plan.noise_std
    silent = trainer.noisy_mean(5, trainer.clipped_sum(5, []))
    values = torch.cat([value.flatten() for value in silent.values()])
    assert float(values.std()) == pytest.approx(noise, rel=6 / math.sqrt(2 * len(values)))


def test_the_average_is_the_weighted_mean_of_all_steps() -> None:
    rng = np.random.default_rng(1)
    seen = torch.from_numpy(rng.normal(size=(6, 4)))
    average, again = Average(0.7), Average(0.7)
    for index, value in enumerate(seen):
        average.observe({"x": value})
        if index == 3:
            again.restore(average.tensors())
        elif index > 3:
            again.observe({"x": value})
    held = {"x": torch.zeros(4, dtype=torch.float64)}
    average.install(held)
    shares = 0.7 ** np.arange(5, -1, -1)
    np.testing.assert_allclose(held["x"].numpy(), shares @ seen.numpy() / shares.sum(), rtol=1e-12)
    other = {"x": torch.zeros(4, dtype=torch.float64)}
    again.install(other)
    assert torch.equal(other["x"], held["x"])
    plain = Average(0.0)
    plain.observe({"x": seen[0]})
    plain.install(held := {"x": seen[1].clone()})
    assert torch.equal(held["x"], seen[1]) and plain.tensors() == {}


def test_automatic_clipping_is_its_formula_and_never_reaches_c(tiny: Path) -> None:
    trainer = build(tiny, "privacy.clipping=automatic", "privacy.max-grad-norm=0.5")
    rows = trainer.inputs.select(range(6))
    gradients, _ = Hooks(trainer.model, trainer.parameters).per_unit(rows)
    norms = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients.values()]).sum(dim=0).sqrt()
    expected = {
        name: sum(0.5 / (norms[unit] + 0.01) * value[unit] for unit in range(6)) for name, value in gradients.items()
    }
    for path in (Hooks, MicroBatch, Ghost):
        found = path(trainer.model, trainer.parameters, automatic_factors)(rows, 0.5).gradient
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    sizes = torch.tensor([0.0, 1e-6, 0.01, 1.0, 1e9, torch.inf, torch.nan])
    moved = torch.nan_to_num(sizes, posinf=1.0) * automatic_factors(sizes, 2.0)
    assert STABILITY == 0.01 and bool((moved <= 2.0).all()) and float(moved[2]) == pytest.approx(1.0)
    assert automatic_factors(sizes, 2.0)[-2:].tolist() == [0.0, 0.0]


def test_only_b_is_trained_and_the_released_a_is_the_one_drawn(tiny: Path, tmp_path: Path) -> None:
    trainer = build(tiny, "model.lora.train=b")
    both = build(tiny)
    assert trainer.parameters and all("lora_B" in name for name in trainer.parameters)
    assert len(both.parameters) == 2 * len(trainer.parameters)
    run = start_run(resolve({}, settings(tiny, "model.lora.train=b")), tmp_path / "run", dataset=small())
    released = load_file(run.model / "adapter_model.safetensors")
    start = {name: value for name, value in weights(both).items() if "lora_A" in name}
    for name, value in start.items():
        (key,) = [key for key in released if name.removesuffix(".weight") in key]
        assert torch.equal(released[key], value), "A as the key draws it for any run"
    model = load_model(run, "cpu")
    assert set(model.adapter_parameters()) == set(trainer.parameters)


def test_alternating_steps_release_and_move_b_and_a_in_turn(tiny: Path) -> None:
    trainer = build(tiny, "model.lora.train=alternating")
    for step, mine in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        before = weights(trainer)
        noisy = trainer.noisy_mean(step, trainer.clipped_sum(step, range(8)))
        assert noisy and all(mine in name for name in noisy)
        assert trainer.update(step, noisy) == set(noisy)
        moved = {name for name, value in trainer.parameters.items() if not torch.equal(before[name], value)}
        assert moved == set(noisy)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["model.lora.train=alternating", "pruning={keep: 0.5, by: previous}"], "model.lora.train: got 'alternating'"),
        (["model.lora.train=alternating", "pruning={keep: 0.5, granularity: layer}"], "model.lora.train"),
        (["model.lora.train=alternating", "method=dp-zo"], "model.lora.train"),
        (["training.optimizer=adambc", "method=dp-zo"], "training.optimizer: got 'adambc'"),
        (["training.optimizer=adambc", "method=non-private"], "training.optimizer"),
        (["training.optimizer=adambc", "privacy.epsilon=inf"], "training.optimizer"),
        (["training.optimizer=sgd", "training.beta2=0.9"], "training.beta2: got 0.9; accepted: only with"),
        (["training.momentum=0.5"], "training.momentum"),
        (["training.variance-floor=0.5"], "training.variance-floor"),
        (["privacy.clipping=automatic", "method=non-private"], "privacy.clipping"),
        (["reducer.assign=tokens"], "reducer.assign: got 'tokens'; accepted: keys"),
        (["privacy.epsilon=inf", "privacy.noise-multiplier=1"], "privacy.epsilon"),
        (["privacy.epsilon=inf", "planted.noise-scale=0.5"], "planted.noise-scale"),
        (["privacy.epsilon=inf", "fusion={release: clip-noise, radius: 1, multiplier: 1}"], "fusion.release"),
    ],
)
def test_what_does_not_fit_is_one_line(extra: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, extra)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_ledger_says_what_a_recipe_does(tiny: Path, tmp_path: Path) -> None:
    run = start_run(resolve({}, settings(tiny, *RECIPES["all"])), tmp_path / "run", dataset=small())
    rows = {row.path: row for row in LedgerDocument.read(run.ledger).rows}
    for path in ("trained matrices", "noise correction", "averaged weights"):
        assert rows[path].status == "post-processing"
    assert "automatic clipping" in rows["gradients"].explanation and rows["gradients"].status == "accounted"
    assert (
        "K = 4, k = 3, attention of layer -2, features of layer -2, assigned by tokens"
        in rows["token pruning and fusion"].evidence
    )


NOISELESS = {
    "dp-sgd": [],
    "dual-priv": ["reducer={keep: 4, fuse: 3}"],
    "dp-zo": ["training.optimizer=sgd", "training.learning-rate=0.01"],
}


@pytest.mark.parametrize("method", NOISELESS)
def test_a_run_at_infinite_eps_clips_and_claims_nothing(tiny: Path, tmp_path: Path, method: str) -> None:
    config = resolve({"method": method}, settings(tiny, "privacy.epsilon=inf", *NOISELESS[method]))
    assert not config.claims and resolve(json.loads(config.model_dump_json(by_alias=True))) == config
    run = start_run(config, tmp_path / "run", dataset=small())
    claim, ledger = ClaimDocument.read(run.claim), LedgerDocument.read(run.ledger)
    assert claim.claim is None and claim.reasons[0].endswith("no privacy is claimed") and ledger.spent is None
    (row,) = [row for row in ledger.rows if row.path == "gradients"]
    assert row.status == "UNACCOUNTED" and "no finite eps holds" in row.explanation and "sigma = 0" in row.evidence
    assert not any(row.path == "fusion noise" for row in ledger.rows)
    for name in ("white-box", "contract"):
        with pytest.raises(UsageError, match=rf"--{name}: the run makes no claim \(privacy\.epsilon=inf\)"):
            audit(run.path, Options(audits=(name,)))
    assert RunFolder.open(run.path).read_config().privacy.epsilon == "inf"


def test_clipping_holds_without_noise(tiny: Path) -> None:
    trainer = build(tiny, "privacy.epsilon=inf", "privacy.max-grad-norm=0.01")
    assert trainer.plan.claim is None and trainer.plan.noise_multiplier == 0
    alone = trainer.noisy_mean(1, trainer.clipped_sum(1, [0]))
    norm = math.sqrt(sum(float(value.square().sum()) for value in alone.values()))
    assert norm == pytest.approx(0.01 / 8, rel=1e-5)
