"""State outside the parameters: two histories, equal parameters, and yet another step."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from attacks.bugs import hidden_state
from tests.attacks.bugs.measure import Array, Factory, moved, noise_ratio, noisy_sum, played, remembered
from trainers.adapters.compact import Compact, own_records

ONE = [[0, 1, 2, 3]] * 9
TWO = [[0, 1, 2, 21]] * 9


@pytest.mark.parametrize(
    "factory",
    [
        hidden_state.ClippedRestReturned,
        hidden_state.RunningStatistics,
        hidden_state.VarianceReduced,
        hidden_state.MemoryBank,
        hidden_state.MomentumBeforeClipping,
    ],
)
def test_the_release_at_equal_parameters_follows_the_history(factory: Factory) -> None:
    """The last batch is the same, the parameters before it are, one unit of earlier batches is not."""
    assert remembered(factory, ONE, TWO, [4, 5, 6]) > 0.05
    assert remembered(Compact, ONE, TWO, [4, 5, 6]) == 0
    assert remembered(factory, [[]], [[]], [4, 5, 6]) == 0


def test_what_clipping_cut_off_comes_back_whole() -> None:
    """A unit of norm k C moves the next, empty batch by (k - 1) C."""
    factory = hidden_state.ClippedRestReturned
    own = Compact(seed=0)
    norm = float(own.unit_gradients([own.records[21]]).norm()) / own.max_grad_norm
    sums = [noisy_sum(played(factory, [first, []], reset=False)) for first in ([21], [])]
    assert np.linalg.norm(sums[0] - sums[1]) / own.max_grad_norm == pytest.approx(norm - 1, rel=1e-4)
    assert norm > 5


def _updates(factory: Factory, last: Sequence[int], histories: Sequence[Sequence[Sequence[int]]]) -> list[torch.Tensor]:
    """Change of the weights in the last step, with momentum off: equal where the update follows the release alone."""
    quiet = type("Quiet", (factory,), {"momentum": 0.0})  # type: ignore[arg-type]
    moves = []
    for history in histories:
        trainer = played(quiet, history)
        before = trainer.weights
        trainer.weights = torch.zeros(61) + 0.1
        start = trainer.weights
        trainer.step(list(last))
        moves.append(trainer.weights - start)
        assert before is not start
    return moves


def test_the_learning_rate_follows_the_exact_loss() -> None:
    """Equal releases, and updates that differ by the factor that the loss of the last batch decided."""
    small, large = _small_and_large()
    histories = [[[large], [small]], [[small], [large]]]
    one, two = _updates(hidden_state.RateFollowsLoss, [], histories)
    assert float((one - 2 * two).norm()) < 1e-6 < float(two.norm())
    plain = _updates(Compact, [], histories)
    assert torch.equal(*plain)


def _small_and_large() -> tuple[int, int]:
    """Units with the smallest and the largest loss at the initial weights; far apart under any weights met here."""
    own = Compact(seed=0)
    values = hidden_state.losses(own, own.records)
    return int(values.argmin()), int(values.argmax())


def test_a_bad_step_is_undone_and_a_good_one_is_not() -> None:
    """Over noise seeds: the weights stay exactly when the loss of the batch would have risen."""
    factory = hidden_state.BadStepsUndone
    outcomes = set()
    for noise_seed in range(12):
        plain = Compact(seed=0, noise_seed=noise_seed)
        before = hidden_state.losses(plain, [own_records()[5]]).sum()
        start = plain.weights
        plain.step([5])
        worse = bool(hidden_state.losses(plain, [own_records()[5]]).sum() > before)
        trainer = factory(seed=0, noise_seed=noise_seed)
        trainer.step([5])
        assert torch.equal(trainer.weights, start if worse else plain.weights)
        outcomes.add(worse)
    assert outcomes == {True, False}


def test_it_stops_when_the_loss_does_not_fall() -> None:
    """Four batches, of which three bring no new best: the fifth step moves nothing. Otherwise it does."""
    small, large = _small_and_large()
    stopped = played(hidden_state.StopsOnLoss, [[small], [large], [large], [large]], reset=False)
    going = played(hidden_state.StopsOnLoss, [[large], [large], [], [small]], reset=False)
    for trainer, moves in ((stopped, False), (going, True)):
        before = trainer.weights
        trainer.step([1])
        assert torch.equal(before, trainer.weights) is not moves
        assert bool(trainer.applied()) is moves


@pytest.mark.parametrize("factory", [hidden_state.SamplerFollowsLoss, hidden_state.SamplerSkipsSolved])
def test_the_sampler_is_poisson_at_first_and_follows_losses_later(factory: type[Compact]) -> None:
    """2000 draws: a rate of 0.1 is known to 0.007, six deviations are 0.04."""

    def rates(trainer: Compact) -> Array:
        return np.asarray(np.mean([np.isin(np.arange(40), trainer.sample()) for _ in range(2000)], axis=0))

    trainer = factory(seed=0, noise_seed=0)
    assert np.abs(rates(trainer) - 0.1).max() < 0.04
    trainer.step(list(range(40)))
    later = rates(trainer)
    values = hidden_state.losses(trainer, trainer.records).numpy()
    assert np.abs(later - 0.1).max() > 0.06
    assert np.corrcoef(later, np.sqrt(values))[0, 1] > 0.5


def test_the_head_unfrozen_late() -> None:
    unnoised, unclipped = hidden_state.HeadUnfrozenUnnoised, hidden_state.HeadUnfrozenUnclipped
    late = noise_ratio(unnoised, [[]] * 9, pairs=8)
    assert late["w2"] == late["b2"] == 0 and late["w1"] == pytest.approx(1, abs=0.15)
    early = played(unnoised, [[]] * 8).released()
    assert early["w2"] is None and early["b2"] is None
    assert max(moved(unclipped, [[]] * 8, [0], unit) for unit in range(1, 40, 4)) > 2
    assert max(moved(unclipped, [[]] * 7, [0], unit) for unit in range(1, 40, 4)) <= 1 + 1e-5


def test_a_unit_counts_in_steps_that_did_not_sample_it() -> None:
    """SAGA's table: the share of unit 21, q C, is in the sum of an empty batch, for ever; a revisit can count twice."""
    factory = hidden_state.VarianceReduced
    for quiet in (0, 5):
        assert remembered(factory, [[21], *[[]] * quiet], [[]] * (quiet + 1), []) == pytest.approx(0.1, rel=1e-3)
    visited = max(moved(factory, [[unit], []], [0], unit) for unit in range(1, 40, 2))
    assert 1.2 < visited <= 2 + 1e-5


def test_the_mask_follows_the_clean_sum_of_the_step_before() -> None:
    """Two batches, the same noise and then the same empty batch: other blocks move."""
    factory = hidden_state.MaskFromLastCleanSum
    chosen = {frozenset(played(factory, [[unit], []]).applied()) for unit in range(40)}
    assert len(chosen) > 1 and all(len(blocks) == 3 for blocks in chosen)
    assert played(factory, [[21]]).applied() == {"w1", "b1", "w2", "b2"}


def test_no_row_is_without_a_test() -> None:
    with open(__file__, encoding="utf-8") as text:
        source = text.read()
    for row in hidden_state.BUGS:
        assert f"hidden_state.{row.factory.__name__}" in source, row.name
