"""Faults of few records, trainings in which nothing happens, and eps of another scheme: each does what it says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.bugs import accounting as planted
from attacks.bugs import dead, probes
from attacks.bugs.correct import TiedHead
from dpaudit import accounting
from tests.attacks.bugs.measure import Factory, moved, noise_ratio, noisy_sum, played
from trainers.adapters.compact import Compact, join, own_records

DELTA = 1e-5

# -- few records -----------------------------------------------------------------------------------------------------


def over(factory: Factory, seed: int) -> list[int]:
    """Units that move the sum by more than C at the initial weights of `seed`."""
    empty = noisy_sum(played(factory, [[]], seed=seed, reset=False))
    sums = [noisy_sum(played(factory, [[unit]], seed=seed, reset=False)) - empty for unit in range(40)]
    return [unit for unit, value in enumerate(sums) if np.linalg.norm(value) > 1.5 * (1 + 1e-4)]


@pytest.mark.parametrize(
    ("factory", "least", "most"),
    [
        (probes.NormWithoutCrossTerm, 15, 25),
        (probes.NormOfSketch, 10, 30),
        (probes.RareClassWeighted, 4, 4),
        (probes.LongRecordsInParts, 4, 5),
        (probes.OutliersClippedLooser, 2, 8),
        (probes.SmallestNotClipped, 1, 4),
        (probes.TwoExempt, 2, 2),
        (probes.HalfOfTheCoordinates, 8, 16),
    ],
)
def test_some_units_exceed_c_and_others_do_not(factory: Factory, least: int, most: int) -> None:
    for seed in range(3):
        assert least <= len(over(factory, seed)) <= most


def test_the_units_are_those_named() -> None:
    assert over(probes.TwoExempt, 0) == list(probes.TwoExempt.exempt)
    rare = [unit for unit, record in enumerate(own_records()) if float(record.y.max()) > 4.5]
    assert over(probes.RareClassWeighted, 1) == rare and len(rare) == 4
    long = [unit for unit in range(40) if probes.LongRecordsInParts(seed=0).long(own_records()[unit])]
    assert set(over(probes.LongRecordsInParts, 0)) <= set(long) and len(long) == 5
    assert not over(Compact, 0) and not over(TiedHead, 0)


def test_the_ghost_norm_is_the_root_of_the_squares_of_the_uses() -> None:
    """The factor that the bug applies, against both uses' gradients of a unit with one question by autograd."""
    own = own_records()
    unit = next(place for place, record in enumerate(own) if len(record.y) == 1)
    trainer = probes.NormWithoutCrossTerm(seed=0, noise_seed=0)
    weights = trainer.weights.double()
    uses = torch.cat([weights, weights[48:54]]).requires_grad_()
    w1, bias, own_head, b2, tied_head = torch.split(uses, [48, 6, 6, 1, 6])
    x, y = own[unit].x[0].double(), own[unit].y[0].double()
    out = torch.tanh(w1.reshape(6, 8) @ x + bias) @ (tied_head + own_head) + b2
    (0.5 * (out - y).square()).sum().backward()  # type: ignore[no-untyped-call]
    assert uses.grad is not None
    trainer.unit_gradients([own[unit]])
    assert float(trainer.norms[0]) == pytest.approx(float(uses.grad.norm()), rel=1e-5)
    true = float(join(trainer.gradient(own[unit])).norm())
    assert abs(true - float(trainer.norms[0])) > 1e-3 * true


def test_twins_reach_each_other_and_nobody_else() -> None:
    alone = [noisy_sum(played(probes.TwinsMixed, [batch])) for batch in ([5], [], [5, 9], [9])]
    assert np.linalg.norm((alone[0] - alone[1]) - (alone[2] - alone[3])) > 0.05 * 1.5
    assert moved(probes.TwinsMixed, [], [5, 9], 21) > 1.05
    assert moved(probes.TwinsMixed, [], [1, 2, 9], 3) <= 1 + 1e-5


# -- nothing happened ------------------------------------------------------------------------------------------------


def walk(factory: Factory, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Weights shown before the first step and after each, as (61,) vectors."""
    trainer = factory(seed=seed, noise_seed=0)
    shown = [join(trainer.parameters()).clone()]
    for step in range(steps):
        trainer.step([step % 40, 3])
        shown.append(join(trainer.parameters()).clone())
    return shown


def test_weights_that_stand_still() -> None:
    for factory in (dead.WeightsNeverMove, dead.RateZero):
        shown = walk(factory, 5)
        assert all(torch.equal(shown[0], later) for later in shown)
    shown = walk(dead.HeadNeverMoves, 5)
    assert torch.equal(shown[0][54:], shown[5][54:]) and not torch.equal(shown[0][:54], shown[5][:54])
    trainer = played(dead.HeadNeverMoves, [[1]])
    assert trainer.applied() == {"w1", "b1", "w2", "b2"} and float(trainer.last["w2"].norm()) > 0
    shown = walk(dead.StopsMoving, 14)
    assert torch.equal(shown[12], shown[14]) and not torch.equal(shown[10], shown[11])


def test_a_copy_is_shown_while_gradients_stay() -> None:
    trainer = dead.CopyShown(seed=0, noise_seed=0)
    before = join(trainer.gradient(own_records()[4]))
    for _ in range(4):
        trainer.step([1, 2])
    assert not torch.equal(join(trainer.parameters()), trainer.weights)
    assert torch.equal(before, join(trainer.gradient(own_records()[4])))


@pytest.mark.parametrize(
    ("factory", "kept"), [(dead.StartSaved, 0), (dead.LoadForgetsHead, 54), (Compact, 61)], ids=["start", "head", "all"]
)
def test_what_a_checkpoint_gives_back(factory: Factory, kept: int, tmp_path: Path) -> None:
    """Into a trainer of another seed: the first `kept` weights are those that were saved."""
    first, again = factory(seed=0, noise_seed=0), factory(seed=1, noise_seed=0)
    start = first.weights
    for _ in range(3):
        first.step([1])
    first.save(tmp_path / "state")
    again.load(tmp_path / "state")
    assert torch.equal(again.weights == first.weights, torch.arange(61) < kept)
    assert kept or torch.equal(again.weights, start)


def test_gradients_that_are_zero_or_gone() -> None:
    masked = dead.LabelsMasked
    assert all(moved(masked, [], [0], unit) == 0 for unit in (1, 21))
    assert not torch.equal(*walk(masked, 1))
    trainer = dead.DeadAfterTen(seed=0, noise_seed=0)
    for _ in range(11):
        trainer.step([1])
    assert bool(torch.isnan(trainer.weights).all())
    assert float(trainer.clip(trainer.unit_gradients(trainer.records)).abs().max()) == 0


def test_one_batch_for_ever() -> None:
    trainer = dead.FirstBatchOnly(seed=0, noise_seed=0)
    assert len({tuple(trainer.sample()) for _ in range(20)}) == 1


# -- accounting ------------------------------------------------------------------------------------------------------


def spent(sigma: float, rate: float, steps: int) -> float:
    """eps of a Poisson-subsampled Gaussian, by PLD."""
    return accounting.epsilon(accounting.DpSgd(sigma, rate, steps), DELTA)


def laplace_spent(steps: int) -> float:
    """eps of Poisson-subsampled Laplace noise of scale 1, by PLD."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)), steps)
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize(
    ("factory", "steps", "truth"),
    [
        # a unit that takes a place of another moves the sum by 2 C where the others stand at -C: at least this is spent
        (planted.FixedQuotesPoisson, 10, lambda: spent(0.5, 0.1, 10)),
        (planted.ReplacedFixedQuotesPoisson, 10, lambda: spent(0.5, 0.1, 10)),
        (planted.LaplaceNotComposed, 60, lambda: laplace_spent(60)),
        (planted.LaplaceAdvanced, 60, lambda: laplace_spent(60)),
        (planted.EpochsInParallel, 200, lambda: accounting.gaussian_epsilon(math.sqrt(20), DELTA)),
        (planted.FullBatchAmplified, 20, lambda: accounting.gaussian_epsilon(math.sqrt(20), DELTA)),
        (planted.OtherDelta, 60, lambda: spent(1.0, 0.1, 60)),
        (planted.RenyiWithoutConversion, 60, lambda: spent(1.0, 0.1, 60)),
        (planted.WholeEpochsCounted, 9, lambda: spent(1.0, 0.1, 9)),
        (planted.HistoryOverwritten, 60, lambda: spent(1.0, 0.1, 60)),
        (planted.RateRoundedDown, 60, lambda: spent(1.0, 0.1, 60)),
        (planted.AverageNoiseQuoted, 20, lambda: spent(0.6, 0.1, 10)),
    ],
)
def test_less_is_quoted_than_is_spent(factory: Factory, steps: int, truth: object) -> None:
    trainer = factory(seed=0, noise_seed=0)
    trainer.step_count = steps
    assert 0 <= trainer.epsilon(DELTA) < 0.97 * truth()  # type: ignore[operator]


def test_the_noise_alternates() -> None:
    for steps, ratio in ((1, 1.4), (2, 0.6), (7, 1.4)):
        measured = noise_ratio(planted.AverageNoiseQuoted, [[]] * steps, pairs=8)["all"]
        assert measured == pytest.approx(ratio, rel=0.12)


def test_steps_after_a_resume_are_free(tmp_path: Path) -> None:
    trainer = planted.ResumeCountsOnce(seed=0, noise_seed=0)
    trainer.step_count = 10
    trainer.save(tmp_path / "state")
    again = planted.ResumeCountsOnce(seed=0, noise_seed=0)
    again.load(tmp_path / "state")
    assert again.epsilon(DELTA) == trainer.epsilon(DELTA)
    for _ in range(8):
        again.step([])
    assert again.epsilon(DELTA) == trainer.epsilon(DELTA) < 0.97 * spent(1.0, 0.1, 18)


def test_no_row_is_without_a_test() -> None:
    with open(__file__, encoding="utf-8") as text:
        source = text.read()
    for row in (*probes.BUGS, *dead.BUGS, *planted.BUGS):
        assert f".{row.factory.__name__}" in source, row.name
