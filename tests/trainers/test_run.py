"""The training run: sampling, noise, plan, ledger before use, resume after kill -9."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom, chi2, kstest

from attacks.training import resume_run, start_run
from dpaudit import accounting, atomic
from dpaudit.config import ReducerConfig, read_yaml, resolve
from dpaudit.documents import ClaimDocument, EnvironmentDocument, LedgerDocument
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests import commands
from tests.tiny import random_units
from trainers import run as run_module
from trainers.plan import fusion_std, make_plan
from trainers.records import Dataset
from trainers.run import load_model, read_config
from trainers.sampling import poisson_batch
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

FAST = ["training.batch-size=8", "training.steps=4", "model.lora.rank=2", "model.device=cpu"]


def small(units: int = 24) -> Dataset:
    return Dataset("random", "image (with all its questions)", random_units(units), random_units(4, seed=9, prefix="t"))


def settings(tiny: Path, *extra: str) -> list[str]:
    return [f"model.path={tiny}", "seed=1", *FAST, *extra]


def test_inclusion_frequencies_are_those_claimed() -> None:
    key, units, rate, steps = Key.from_seed(3), 40, 0.2, 2000
    counts = np.zeros(units)
    sizes = []
    for step in range(steps):
        batch = poisson_batch(key, step=step, units=units, rate=rate)
        counts[batch] += 1
        sizes.append(len(batch))
    # false alarm below 1e-6 in all: 40 two-sided binomial tests at 1e-8, one chi-square for the batch-size variance
    low, high = binom.ppf(0.5e-8, steps, rate), binom.ppf(1 - 0.5e-8, steps, rate)
    assert bool(((counts >= low) & (counts <= high)).all())
    variance = units * rate * (1 - rate)
    ratio = steps * np.var(sizes) / variance
    assert chi2.ppf(1e-8, steps) < ratio < chi2.ppf(1 - 1e-8, steps)


def build(tiny: Path, *extra: str) -> Trainer:
    config = resolve({}, settings(tiny, *extra))
    dataset = small()
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    return Trainer.build(config, make_plan(config, dataset, 0), Key.from_seed(1), model, dataset.train)


def test_noise_has_the_claimed_law_and_is_the_same_for_neighbours(tiny: Path) -> None:
    trainer = build(tiny, "privacy.max-grad-norm=0.5", "model.lora.rank=8")
    plan = trainer.plan
    residuals = []
    for step in (1, 2, 3):
        total = trainer.clipped_sum(step, range(8))
        noisy = trainer.noisy_mean(step, total)
        fewer = trainer.noisy_mean(step, trainer.clipped_sum(step, range(7)))
        parts = [noisy[name] * plan.expected_batch_size - total.gradient[name] for name in sorted(noisy)]
        residuals.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        gap = [(noisy[name] - fewer[name]) * plan.expected_batch_size for name in sorted(noisy)]
        assert float(torch.cat([part.flatten() for part in gap]).norm()) <= 0.5 * (1 + 1e-3)
    std = plan.noise_multiplier * 0.5
    values = np.concatenate(residuals) / std
    n = len(values)
    assert chi2.ppf(1e-8, n) < float((values**2).sum()) < chi2.ppf(1 - 1e-8, n)
    assert kstest(values, "norm").pvalue > 1e-8
    correlation = abs(float(np.corrcoef(residuals[0], residuals[1])[0, 1]))
    assert correlation * math.sqrt(len(residuals[0])) < 6.0


def test_an_empty_batch_is_a_noise_only_step(tiny: Path) -> None:
    trainer = build(tiny)
    noisy = trainer.noisy_mean(1, trainer.clipped_sum(1, []))
    assert all(float(value.abs().max()) > 0 for value in noisy.values())
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    kept = trainer.update(1, noisy)
    assert kept == set(before)
    assert all(not torch.equal(before[name], value) for name, value in trainer.parameters.items())


def test_the_plan_never_exceeds_the_target_and_counts_every_candidate(tiny: Path) -> None:
    dataset = small(60)
    for canaries in (0, 20):
        config = resolve({}, settings(tiny, "privacy.epsilon=3", "training.epochs=5", "training.steps=null"))
        plan = make_plan(config, dataset, canaries)
        assert plan.sample_rate == 8 / (60 + canaries)
        assert plan.steps == round(5 * (60 + canaries) / 8)
        event = accounting.DpSgd(plan.noise_multiplier, plan.sample_rate, plan.steps)
        assert 0.97 * 3 <= accounting.epsilon(event, 1e-5) <= 3
        assert plan.epsilon_after(plan.steps) == pytest.approx(accounting.epsilon(event, 1e-5))
        assert plan.claim is not None and plan.claim.candidates == 60 + canaries


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("training.batch-size=25", "training.batch-size"),
        ("privacy.delta=0.1", "privacy.delta"),
        ("reducer={name: cls-topk, keep: 16}", "reducer.keep"),
        ("reducer={name: visionzip, keep: 10, fuse: 7}", "reducer.fuse"),
        ("reducer={name: visionzip, keep: 4, fuse: 2, layer: 9}", "reducer.layer"),
        ("model.lora.targets=[nothing]", "model.lora.targets"),
        ("model.device=cuda", "model.device"),
    ],
)
def test_bad_settings_fail_before_training(tiny: Path, tmp_path: Path, override: str, field: str) -> None:
    with pytest.raises(Exception, match=rf"^{field}: got") as error:
        start_run(resolve({}, settings(tiny, override)), tmp_path / "run", dataset=small())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "release" / "ledger.json").exists()


@pytest.mark.parametrize("method", ["non-private", "dp-sgd", "dual-priv"])
def test_a_run_of_every_method_from_start_to_reload(tiny: Path, tmp_path: Path, method: str) -> None:
    extra = ["reducer.keep=4", "reducer.fuse=3"] if method == "dual-priv" else []
    config = resolve({"method": method}, settings(tiny, *extra))
    run = start_run(config, tmp_path / "run", dataset=small())
    run.require_finished()
    claim = ClaimDocument.read(run.claim)
    ledger = LedgerDocument.read(run.ledger)
    assert (claim.claim is None) == (method == "non-private") and not claim.releasable
    if claim.claim is not None:
        assert ledger.spent is not None and ledger.spent.steps_started == 4
        assert float(ledger.spent.epsilon or 0) <= 8
    assert EnvironmentDocument.read(run.environment).gradient_paths == ("rows",)
    paths = {row.path: row.status for row in ledger.rows}
    assert paths["gradients"] == ("UNACCOUNTED" if method == "non-private" else "accounted")
    marked = "not for release" in next(row.explanation for row in ledger.rows if row.path == "gradients")
    assert marked == (method != "non-private")  # the settings have a seed
    assert ("gradient-update pruning" in paths) == (method == "dual-priv")
    again = load_model(run, "cpu")
    pixels = [unit.pictures[0].pixels for unit in small().test]
    assert len(again.answer(pixels, ["what digit is this?"] * len(pixels))) == len(pixels)
    with pytest.raises(UsageError, match="holds a run already"):
        start_run(config, tmp_path / "run", dataset=small())


def test_fusion_noise_std_is_what_the_option_says(tiny: Path) -> None:
    for noise, factor in (("none", 0.0), ("sum", 1.0), ("mean", 1 / 8)):
        text = f"reducer={{name: visionzip, keep: 4, fuse: 2, noise: {noise}}}"
        config = resolve({}, settings(tiny, "privacy.max-grad-norm=0.3", text))
        plan = make_plan(config, small(), 0)
        assert fusion_std(config, plan) == pytest.approx(plan.noise_multiplier * 0.3 * factor)


def train_words(tiny: Path, out: Path) -> list[str]:
    extra = ["method=dual-priv", "reducer.keep=4", "reducer.fuse=3", "data.limit=60", "training.steps=24"]
    return [
        "train", *settings(tiny, *extra, "training.checkpoint-every=5"), "--canaries", "12",
        "--out", str(out),
    ]  # fmt: skip


def test_kill_in_the_middle_then_resume_equals_an_uninterrupted_run(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert commands.run(*train_words(tiny, whole)).code == 0
    process = commands.begin(train_words(tiny, killed), stdout=tmp_path / "out", stderr=tmp_path / "err")
    metrics = killed / "private" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 8:
            break
        time.sleep(0.005)
    process.tell(signal.SIGKILL)
    process.wait()
    assert not RunFolder(killed).finished, "the kill came too late to test anything"
    spent = LedgerDocument.read(RunFolder(killed).ledger).spent
    assert spent is not None and spent.steps_started >= 8
    done = commands.run("train", "--resume", killed, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["claim"]["steps"] == 24
    assert RunFolder(killed).ledger.read_bytes() == RunFolder(whole).ledger.read_bytes()
    assert RunFolder(killed).coins.read_bytes() == RunFolder(whole).coins.read_bytes()
    one, two = (load_file(folder / "release/model/adapter_model.safetensors") for folder in (whole, killed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_release_names_every_gradient_path_of_the_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Begun where `auto` means hooks, ended where it means rows; unknown where the first process did not record it."""
    step = run_module._one_step

    def stopped(*arguments: Any) -> None:
        step(*arguments)
        if arguments[3] == 2:
            raise KeyboardInterrupt

    config = resolve({}, settings(tiny, "training.checkpoint-every=1"))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("trainers.step._rows", lambda *_: None)
        elsewhere.setattr(run_module, "_one_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            start_run(config, tmp_path / "run", dataset=small())
    run = RunFolder(tmp_path / "run")
    first = EnvironmentDocument.read(run.environment)
    assert first.gradient_paths == ("hooks",)
    if not recorded:
        run.write(first.model_copy(update={"gradient_paths": None}))
    resume_run(run.path, dataset=small())
    expected = ("hooks", "rows") if recorded else None
    assert EnvironmentDocument.read(run.environment).gradient_paths == expected


def test_resume_of_a_finished_run_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    config = resolve({}, settings(tiny))
    run = start_run(config, tmp_path / "run", dataset=small())
    before = {path: path.read_bytes() for path in sorted(run.release.rglob("*")) if path.is_file()}
    resume_run(tmp_path / "run", dataset=small())
    assert before == {path: path.read_bytes() for path in sorted(run.release.rglob("*")) if path.is_file()}


def test_relative_paths_are_taken_from_where_the_run_was_started(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "project"
    (home / "model").parent.mkdir(parents=True)
    (home / "model").symlink_to(tiny, target_is_directory=True)
    monkeypatch.chdir(home)
    config = resolve({}, ["model.path=./model", "seed=1", *FAST])
    run = start_run(config, home / "run", dataset=small())
    monkeypatch.chdir(tmp_path)
    assert read_config(run).model.path == str(home / "./model")
    assert load_model(run, "cpu").source.endswith("model")
    text = "".join(
        path.read_text(errors="ignore") for path in run.release.rglob("*.*") if path.suffix != ".safetensors"
    )
    assert str(tmp_path) not in text, "a released file names a folder of this machine"


def test_a_run_of_an_earlier_version_is_read_as_it_was_trained(tiny: Path, tmp_path: Path) -> None:
    """Its file has no feature-layer, assign or recipe; LLaVA's features then came from the layer of the attention."""
    new = ("feature-layer", "assign", "clipping", "train", "schedule", "beta1", "beta2", "adam-epsilon")
    new += ("variance-floor", "momentum", "average")

    def earlier(reducer: str) -> ReducerConfig:
        run = RunFolder.create(tmp_path / reducer.replace(" ", ""))
        run.write_config(resolve({}, settings(tiny, f"reducer={{{reducer}}}")))
        lines = run.config.read_text().splitlines(keepends=True)
        text = "".join(line for line in lines if line.strip().partition(":")[0] not in new)
        atomic.write_text(run.config, text)
        assert resolve(read_yaml(run.config)).training.optimizer == "adamw"
        return read_config(run).reducer

    moved = earlier("name: visionzip, keep: 4, fuse: 3, layer: -3")
    assert (moved.layer, moved.feature_layer, moved.assign) == (-3, -3, "keys")
    plain = earlier("name: none, keep: 16, fuse: 8, layer: -2")
    assert plain.feature_layer is None
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(moved)
    assert tuple(model.layers) == (-3, -3)
