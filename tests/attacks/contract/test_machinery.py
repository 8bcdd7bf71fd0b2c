"""How the contract goes about it: copies, slow factories, batches that are quick, trainers that take no empty one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.bugs import bases_opacus, dead
from attacks.contract import (
    FALSE_ALARMS,
    STATISTICAL,
    check,
    influence,
    liveness,
    noise,
    sampling,
)
from attacks.contract.bench import Bench
from attacks.contract.probe import Probe
from attacks.contract.training import PATTERN, STEPS
from tests.contract import made
from trainers.adapters.compact import SIZES, Compact, FixedSize

D = sum(SIZES.values())


def test_copies_of_an_opacus_trainer_go_on_like_the_original() -> None:
    """And copying leaves the classes of PyTorch and Opacus as they were."""
    probe = Probe(bases_opacus.OpacusLoop)
    assert probe.copyable
    one = probe.build()
    one.ask("step", [0, 1])
    two = one.twin()
    for subject in (two, one):
        subject.ask("step", [2])
    assert all(np.array_equal(value, two.parameters()[name]) for name, value in one.parameters().items())
    assert "__deepcopy__" not in vars(torch.optim.Optimizer)
    bases_opacus.OpacusLoop(seed=0).step([0])


def test_a_slow_factory_is_called_once_a_data_set_and_noise_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attacks.contract.probe.SLOW_BUILD", 0.0)
    probe = Probe(Compact)
    bench = Bench(probe)
    for module in (influence, noise):
        assert all(check.status != "fail" for check in module.checks(bench))
    assert probe.builds < 40 < probe.steps


def test_histories_hold_all_sizes_and_leave_one_unit_out() -> None:
    training = Bench(Probe(Compact)).training
    for batches in (training.batches, training.others):
        sizes = [len(batch) for batch in batches]
        assert len(batches) == STEPS and {0, 1, 2, 4, 5, 10, 39} <= set(sizes)
        assert training.outside not in {unit for batch in batches for unit in batch}
        assert all(len(set(batch)) == len(batch) for batch in batches)
    assert training.sizes == [1, 2, 4, 8, 16, 32, 39] and 0 in PATTERN


def test_few_records_are_repeated_up_to_the_expected_batch() -> None:
    class Large(Compact):
        expected_batch_size = 64.0

    training = Bench(Probe(Large)).training
    assert training.sizes[-1] == 192 and len(training.records.items) == 200 and training.reached


class SlowUnits(Compact):
    """An empty step takes no time, a unit takes a hundredth of a second."""

    expected_batch_size, sample_rate = 10.0, 0.25
    taken = 0

    def step(self, indices: Sequence[int]) -> None:
        type(self).taken += len(set(indices))
        time.sleep(0.01 * len(set(indices)))
        super().step(indices)


def test_a_trainer_is_quick_in_empty_steps_and_in_batches_each_for_itself() -> None:
    quick, slow = Bench(Probe(Compact)).training, Bench(Probe(SlowUnits))
    assert quick.quick and quick.quick_batches and len(quick.every_size) == quick.largest
    assert slow.training.quick and not slow.training.quick_batches and slow.training.every_size == []
    SlowUnits.taken = 0
    made = next(found for found in sampling.checks(slow) if found.name == sampling.TWICE)
    assert made.status == "pass" and "after 24 steps 0 of" in made.measured
    assert 24 * 3 < SlowUnits.taken < 24 * 20


def test_the_false_alarms_of_the_whole_contract_add_up() -> None:
    """Oracle: every name in the sum is a check with a p-value or a bound; the sum is what the docs promise."""
    assert len(STATISTICAL) == 18 and pytest.approx(1.8e-6) == FALSE_ALARMS < 1e-5
    text = (Path(__file__).parents[3] / "docs" / "step-contract.md").read_text()
    assert "18 x 1e-7 = 1.8e-6" in text


# -- trainers that can't be copied -----------------------------------------------------------------------------------


class Uncopyable(Compact):
    """Holds what can't be copied, as a training loop in a thread does."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopyable":
        raise TypeError("cannot copy a running loop")


class Remembering(Uncopyable):
    """Adds a tenth of the last clipped sum to the next one."""

    before = torch.zeros(D)

    def clip(self, gradients: Tensor) -> Tensor:
        clipped = super().clip(gradients)
        out, self.before = torch.cat([clipped, 0.1 * self.before[None]]), clipped.sum(dim=0)
        return out


class Tightening(Uncopyable):
    """Half of C from step 28 on, in a public schedule."""

    def clip(self, gradients: Tensor) -> Tensor:
        return super().clip(gradients) * (0.5 if self.step_count >= 28 else 1.0)


@pytest.mark.parametrize(("factory", "set_back"), [(Uncopyable, True), (Remembering, False), (Tightening, False)])
def test_one_trainer_that_is_set_back_sees_what_many_trainers_see(
    factory: Any, set_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(Probe(factory))
    training, step = bench.training, 24
    assert not bench.probe.copyable
    batches = [sorted(training.pool[:size]) for size in (1, 2, 5, 9, 30)] + [training.pool[-1:]]
    assert len(training.noise) > step + len(batches)
    before = bench.probe.steps
    seen = training.releases(step, batches)
    taken = bench.probe.steps - before
    assert (taken < 2 * STEPS) is set_back
    for batch, found in zip(batches, seen, strict=True):
        alone = training.at(step, batch)
        assert bench.probe.size(found.vector - alone.vector) <= training.slack(step, found, alone)
    assert bench.probe.size(seen[-1].vector - seen[0].vector) > 100 * training.slack(step, *seen[:1])


@pytest.mark.parametrize("factory", [Uncopyable, Tightening])
def test_the_contract_passes_on_correct_trainers_that_cant_be_copied(factory: Any) -> None:
    assert [check.name for check in influence.checks(Bench(Probe(factory))) if check.status == "fail"] == []


# -- batches that are never empty -------------------------------------------------------------------------------------


def takes_no_empty_batch(base: type[Compact]) -> type[Compact]:
    class Taking(base):  # type: ignore[misc, valid-type]
        def step(self, indices: Sequence[int]) -> None:
            if not len(indices):
                raise RuntimeError("cannot reshape tensor of 0 elements")
            super().step(indices)

    return Taking


class LateHalf(FixedSize):
    """Half of the noise from step 10 on."""

    def noise(self) -> Tensor:
        return super().noise() * (0.5 if self.step_count >= 10 else 1.0)


class Half(FixedSize):
    """Half of the noise."""

    def noise(self) -> Tensor:
        return super().noise() * 0.5


@pytest.mark.parametrize(
    ("base", "verdict", "failed"),
    [
        (FixedSize, "inconclusive", []),
        (LateHalf, "inconclusive", []),
        (Half, "fail", ["noise level"]),
        (Compact, "fail", ["empty batch"]),
    ],
)
def test_a_trainer_that_takes_no_empty_batch(base: type[Compact], verdict: str, failed: list[str]) -> None:
    document = check(takes_no_empty_batch(base))
    assert (document.verdict, [item.name for item in document.checks if item.status == "fail"]) == (verdict, failed)
    level = {item.name: item for item in document.checks}["noise level"]
    assert level.status != "pass"


def test_a_copy_that_is_shown_fails_the_contract() -> None:
    """`assign` reaches the weights, `parameters()` shows the optimiser's copy: a verdict, not the end of the check."""
    document = check(dead.CopyShown)
    failed = {item.name: item.measured for item in document.checks if item.status == "fail"}
    assert document.verdict == "fail" and "shows other values for 'w1'" in failed["gradients follow the parameters"]


@pytest.mark.parametrize("known", [24, 25, 26, 28])
def test_as_many_batches_as_there_is_known_noise_for(known: int) -> None:
    bench = Bench(Probe(Uncopyable))
    training, step = bench.training, 24
    vars(training)["noise"] = training.noise[:known]
    batches = [sorted(training.pool[:size]) for size in (1, 2, 5, 9)]
    for batch, found in zip(batches, training.releases(step, batches), strict=True):
        alone = training.at(step, batch)
        assert bench.probe.size(found.vector - alone.vector) <= training.slack(step, found, alone)


@pytest.mark.parametrize("name", ["rate-zero", "stops-moving", "dead-after-ten"])
def test_a_training_that_moves_nothing_any_more_fails(name: str) -> None:
    (bug,) = [bug for bug in dead.BUGS if bug.name == name]
    check_ = made(bug.factory, liveness)["every released block moves"]
    assert check_.status == "fail" and "no parameter moved after step" in check_.measured


class Decays(Compact):
    """Beyond the 50 claimed steps the learning rate is so small that updates of the largest parameter round to nothing,
    and all others go on."""

    steps = 50

    def __init__(self, records: Any = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.weights[-1] = 64.0

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.learning_rate = 0.05 if self.step_count <= 55 else 1e-6
        super().update(noisy, clean_sum)


def test_a_block_that_rests_only_beyond_the_claimed_steps_is_no_failure() -> None:
    bench = Bench(Probe(Decays))
    check_ = liveness.moves(bench)
    assert check_.status == "pass", check_.measured
    tail = bench.training.noise[2 * len(bench.training.noise) // 3 :]
    resting = [{name for name, value in seen.moved.items() if not value.any()} for seen in tail]
    assert set.intersection(*resting) == {"b2"}  # what there was to be mistaken about


class StopsEarly(Decays):
    """The same after eight of ten claimed steps."""

    steps = 10

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.learning_rate = 0.05 if self.step_count <= 8 else 1e-6
        Compact.update(self, noisy, clean_sum)


def test_a_block_that_stops_within_a_short_claim_is_a_failure() -> None:
    check_ = liveness.moves(Bench(Probe(StopsEarly)))
    assert check_.status == "fail" and "moved no more: b2 after step" in check_.measured
