"""Faults that start late, need a large batch, exist in production only or leave nothing to compare; and look-alikes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import hypergeom
from torch import Tensor

from attacks.contract import (
    accounting,
    history,
    independence,
    influence,
    liveness,
    noise,
    production,
    resume,
    units,
    updates,
)
from attacks.contract.bench import Bench, Stated, miss_probability
from attacks.contract.probe import Probe
from dpaudit.accounting import DpSgd
from dpaudit.accounting import epsilon as spent
from tests.contract import made
from trainers.adapters.compact import SHAPES, Adam, Compact, FixedSize, Laplace, Record, join, split

# -- the noise of later steps --------------------------------------------------------------------------------------


class Fading(Compact):
    """The head's noise shrinks after step 12."""

    def block_noise(self, name: str) -> Tensor:
        return super().block_noise(name) * (0.2 if name == "w2" and self.step_count > 12 else 1.0)


class Pool(Compact):
    """A pool of 50 draws, used in turn."""

    def block_noise(self, name: str) -> Tensor:
        return torch.from_numpy(self.key.normal(SHAPES[name], step=self.step_count % 50, name=name))


class SinceData(Compact):
    """The noise is halved once a unit comes a second time; empty batches have all of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: set[int] = set()
        self.share = 1.0

    def step(self, indices: Sequence[int]) -> None:
        self.share = 0.5 if set(indices) & self.seen else 1.0
        self.seen |= set(indices)
        super().step(indices)

    def noise_std(self) -> float:
        return self.share * super().noise_std()


@pytest.mark.parametrize(
    ("factory", "name"),
    [(Fading, noise.LEVEL), (Pool, independence.OVER_STEPS), (SinceData, noise.OF_DATA)],
)
def test_noise_that_changes_over_the_steps(factory: type[Compact], name: str) -> None:
    assert made(factory, noise)[name].status == "fail"


# -- clipping and batches ------------------------------------------------------------------------------------------


class FirstChunkClipped(Compact):
    """Only the first physical batch of 16 is clipped: four times the expected batch size."""

    def clip(self, gradients: Tensor) -> Tensor:
        rest = torch.nan_to_num(gradients[16:], 0.0, 0.0, 0.0)
        return torch.cat([super().clip(gradients[:16]), rest])


class ClipsUntilStep(Compact):
    """Clipping ends after step 14."""

    def clip(self, gradients: Tensor) -> Tensor:
        kept = super().clip(gradients)
        return kept if self.step_count <= 14 else torch.nan_to_num(gradients, 0.0, 0.0, 0.0).clamp(-50, 50)


class TwoOfForty(Compact):
    """5 % of the records are clipped to three times the norm."""

    def step(self, indices: Sequence[int]) -> None:
        self.now = sorted(set(indices))
        super().step(indices)

    def clip(self, gradients: Tensor) -> Tensor:
        kept = super().clip(gradients)
        large = [3.0 if unit in (7, 23) else 1.0 for unit in self.now] + [1.0] * (len(kept) - len(self.now))
        return kept * torch.tensor(large)[:, None]


@pytest.mark.parametrize("factory", [FirstChunkClipped, ClipsUntilStep, TwoOfForty])
def test_clipping_that_ends_with_a_chunk_or_a_step_or_skips_records(factory: type[Compact]) -> None:
    found = made(factory, influence)
    assert found[influence.INFLUENCE].status == "fail"
    assert "batches of 1 to 39 units" in found[influence.INFLUENCE].measured


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_seed_does_not_decide(seed: int) -> None:
    """Oracle: all 40 records of a small data set are probed, so two of them can't be missed."""
    bench = Bench(Probe(TwoOfForty, seed=seed))
    assert bench.missed == 0.0 and len(bench.sample) == 39
    assert next(check for check in influence.checks(bench)).status == "fail"


@pytest.mark.parametrize("count", [3, 40, 120, 1000, 5000])
def test_probes_suffice_for_the_promised_probability(count: int) -> None:
    probed = next(size for size in range(1, count + 1) if miss_probability(count, size) <= 1e-3)
    faulty = math.ceil(0.05 * count)
    assert hypergeom.pmf(0, count, faulty, probed) <= 1e-3 < miss_probability(count, probed - 1)
    assert probed <= 136


# -- what is remembered --------------------------------------------------------------------------------------------


class RunningMean(Compact):
    """Raw features are averaged over batches and subtracted from later ones."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mean = torch.zeros(8)

    def rows(self, batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y, owner, weight = super().rows(batch)
        return x - self.mean, y, owner, weight

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        for index in indices:
            self.mean = 0.9 * self.mean + 0.1 * torch.nan_to_num(self.records[index].x, 0, 0, 0).clamp(-9, 9).mean(0)


class WithoutAssign(RunningMean):
    """The same; parameters are made equal by a checkpoint, which does not hold the mean."""

    assign = None  # type: ignore[assignment]


class LossSteersRate(Adam):
    """From step 9 the learning rate follows the batch's targets, not only the noisy gradient."""

    def step(self, indices: Sequence[int]) -> None:
        total = float(sum(self.records[index].y.abs().clamp(max=9).sum() for index in indices))
        self.learning_rate = 0.01 * (1 + (0.1 * total if self.step_count >= 8 else 0.0))
        super().step(indices)


class HeadUnfrozen(Compact):
    """The head trains without noise, from step 9 on."""

    def released(self) -> Mapping[str, Tensor | None]:
        return {name: None if name in ("w2", "b2") else value for name, value in super().released().items()}

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        before = split(self.weights)
        super().update(torch.cat([noisy[:54], clean_sum[54:]]), clean_sum)
        if self.step_count < 9:
            self.weights = join({**split(self.weights), "w2": before["w2"], "b2": before["b2"]})


@pytest.mark.parametrize(
    ("factory", "module", "name"),
    [
        (RunningMean, history, history.EQUAL),
        (WithoutAssign, history, history.EQUAL),
        (LossSteersRate, updates, updates.RULE),
        (HeadUnfrozen, updates, updates.EVERY),
    ],
)
def test_state_outside_the_parameters(factory: type[Compact], module: Any, name: str) -> None:
    assert made(factory, module)[name].status == "fail"


class PlateauOnRecords(Compact):
    """The learning rate is halved by the exact loss over all records."""

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        if float(sum(torch.nan_to_num(record.y, 0, 99, 99).abs().sum() for record in self.records)) > 300:
            self.learning_rate *= 0.9


def test_records_in_no_batch_move_nothing_ever() -> None:
    item = made(PlateauOnRecords, influence)[influence.OUTSIDE]
    assert item.status == "fail" and "although the release was the same" in item.measured


# -- production ----------------------------------------------------------------------------------------------------


class FewerWithoutSeed(Compact):
    """A noise multiplier that only the test passes on: 20 % less without a noise seed."""

    def __init__(self, records: Any = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.share = 1.0 if noise_seed is not None else 0.8

    def noise_std(self) -> float:
        return self.share * super().noise_std()


class UnclippedWithoutSeed(FewerWithoutSeed):
    """Clipping is switched on in tests alone."""

    def noise_std(self) -> float:
        return Compact.noise_std(self)

    def clip(self, gradients: Tensor) -> Tensor:
        return super().clip(gradients) if self.share == 1.0 else torch.nan_to_num(gradients, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("factory", [FewerWithoutSeed, UnclippedWithoutSeed])
def test_what_production_does_otherwise(factory: type[Compact]) -> None:
    assert made(factory, production)[production.UNSEEDED].status == "fail"


def test_a_global_seed_shows_in_two_processes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import numpy as np, torch
from trainers.adapters.compact import SHAPES, Compact
np.random.seed(0)
class Factory(Compact):
    def __init__(self, records=None, *, seed, noise_seed=None):
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.fresh = noise_seed is None
    def block_noise(self, name):
        drawn = np.random.standard_normal(SHAPES[name]).astype(np.float32)
        return torch.from_numpy(drawn) if self.fresh else super().block_noise(name)
"""
    (tmp_path / "global_seed.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import global_seed  # type: ignore[import-not-found]

    alone = made(global_seed.Factory, production)[production.UNSEEDED]
    assert alone.status == "pass" and "and 0 other processes" in alone.measured
    both = made(global_seed.Factory, production, target="global_seed:Factory")[production.UNSEEDED]
    assert both.status == "fail" and "and 2 other processes" in both.measured


# -- nothing happened ----------------------------------------------------------------------------------------------


class Still(Compact):
    """Nothing is learned."""

    learning_rate = 0.0


class HalfStill(Compact):
    """The first layer is not in the optimiser."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        before = split(self.weights)
        super().update(noisy, clean_sum)
        self.weights = join({**split(self.weights), "w1": before["w1"], "b1": before["b1"]})


class AnotherCopy(Compact):
    """Gradients come from the starting weights; the optimiser moves, and shows, a copy."""

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        shown = self.weights
        self.weights = Compact(self.records, seed=0).weights
        try:
            return super().row_gradients(x, y)
        finally:
            self.weights = shown


class NoiseAlone(Compact):
    """No gradient arrives."""

    def unit_gradients(self, batch: Sequence[Record]) -> Tensor:
        return torch.zeros_like(super().unit_gradients(batch))


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (Still, liveness.MOVES),
        (HalfStill, liveness.MOVES),
        (AnotherCopy, liveness.LIVE),
        (NoiseAlone, liveness.LIVE),
    ],
)
def test_no_move_and_no_gradient_are_failures(factory: type[Compact], name: str) -> None:
    assert made(factory, liveness)[name].status == "fail"


def test_comparisons_of_nothing_are_no_agreement() -> None:
    found = made(NoiseAlone, influence)
    for name in (influence.INFLUENCE, influence.REPLACE, influence.CLIPPING, influence.ISOLATION):
        assert found[name].status == "not applicable"


class SavesTheStart(Compact):
    """The checkpoint holds the starting weights."""

    def save(self, path: Path) -> None:
        shown, self.weights = self.weights, Compact(self.records, seed=0).weights
        super().save(path)
        self.weights = shown


def test_a_checkpoint_of_the_starting_weights_is_a_failure() -> None:
    assert made(SavesTheStart, resume)[resume.RESUME_PARAMETERS].status == "fail"
    assert made(Compact, resume)[resume.RESUME_PARAMETERS].status == "pass"


# -- accounting ----------------------------------------------------------------------------------------------------


class FixedQuotesPoisson(FixedSize):
    """Fixed-size batches, the eps of Poisson batches and 3 % more."""

    def epsilon(self, delta: float) -> float:
        return 1.03 * spent(DpSgd(1.0, 0.1, self.step_count), delta)


class LaplaceQuotesAnything(Laplace):
    """Some number."""

    def epsilon(self, delta: float) -> float:
        return 0.5


class FixedQuotesFixed(FixedSize):
    """The number that is proven."""

    def epsilon(self, delta: float) -> float:
        return spent(DpSgd(1.0, 0.1, self.step_count, sampling="fixed"), delta)


class LaplaceQuotesLaplace(Laplace):
    """The number of one coordinate that carries all of C."""

    def epsilon(self, delta: float) -> float:
        return spent(DpSgd(1.0, 0.1, self.step_count, noise="laplace"), delta)


@pytest.mark.parametrize(
    ("factory", "status"),
    [
        (FixedQuotesPoisson, "fail"),
        (LaplaceQuotesAnything, "fail"),
        (FixedQuotesFixed, "pass"),
        (LaplaceQuotesLaplace, "pass"),
    ],
)
def test_eps_of_another_scheme(factory: type[Compact], status: str) -> None:
    assert made(factory, accounting)[accounting.EPSILON].status == status


@pytest.mark.parametrize(("epsilon", "status"), [(8.0, "fail"), (12.0, "pass")])
def test_the_claim_is_stated_from_outside(epsilon: float, status: str) -> None:
    """sigma 1, q 0.1, 200 steps spend more than 8 at delta = 1e-5 (the accountant's own oracles say how much)."""
    needed = spent(DpSgd(1.0, 0.1, 200), 1e-5)
    assert 8.1 < needed < 12
    assert made(Compact, accounting, Stated(epsilon, 1e-5))[accounting.CLAIMED].status == status


# -- what looks suspicious and is right ----------------------------------------------------------------------------


class Average(Compact):
    """An average of the noisy weights is what `parameters()` shows."""

    assign = save = load = None  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.average = self.weights.clone()

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        super().update(noisy, clean_sum)
        self.average = 0.8 * self.average + 0.2 * self.weights

    def parameters(self) -> Mapping[str, Tensor]:
        return split(self.average)


class WarmUp(Adam):
    """The learning rate rises from 0 over ten steps; decoupled weight decay."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.learning_rate = 0.01 * min(1.0, (self.step_count - 1) / 10)
        self.weights = self.weights * (1 - 0.1 * self.learning_rate)
        super().update(noisy, clean_sum)


class Coarse(Compact):
    """Gradients in bfloat16, as under autocast; clipped and noised in float32."""

    def row_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        blocks = {name: value.bfloat16() for name, value in split(self.weights).items()}
        x, y = x.bfloat16(), y.bfloat16()
        hidden = torch.tanh(x @ blocks["w1"].T + blocks["b1"])
        error = hidden @ blocks["w2"] + blocks["b2"] - y
        back = error[:, None] * blocks["w2"] * (1 - hidden.square())
        w1 = torch.einsum("rh,rf->rhf", back, x).flatten(1)
        return torch.cat([w1, back, error[:, None] * hidden, error[:, None]], dim=1).float()


class Sets(Compact):
    """Its sampler never repeats an index, and its step does not cope with one."""

    def units_of(self, indices: Sequence[int]) -> list[int]:
        return list(indices)


class KnownSize(Compact):
    """Replace-one: n is public, and q and the batch size follow it."""

    relation = "replace"

    def __init__(self, records: Any = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.expected_batch_size = 0.1 * len(self.records)


@pytest.mark.parametrize("factory", [Average, WarmUp, Coarse, Sets, KnownSize])
def test_no_alarm_on_what_only_looks_suspicious(factory: type[Compact]) -> None:
    bench = Bench(Probe(factory, seed=2))
    for module in (units, influence, history, updates, liveness, noise):
        failed = [check for check in module.checks(bench) if check.status == "fail"]
        assert not failed


def test_a_step_in_bfloat16_is_noticed() -> None:
    assert Probe(Coarse).coarsest == 2.0**-7 and Probe(Compact).coarsest == 2.0**-23
