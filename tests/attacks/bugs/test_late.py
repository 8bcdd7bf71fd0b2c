"""Faults that are late or large are really there, and not where the first step, a small batch, would show them."""

import numpy as np
import pytest
import torch

from attacks.bugs import bases_opacus, late_clipping, late_noise, physical_batches
from tests.attacks.bugs.measure import (
    WEIGHTS,
    Factory,
    correlation,
    moved,
    noise_ratio,
    noises,
    noisy_sum,
    played,
)
from trainers.adapters.compact import Compact

TEN = [[0, 1, 2, 3]] * 10
PROBED = (2, 5, 21, 30, 36)


def quiet(steps: int) -> list[list[int]]:
    """Empty batches only: what is released is noise."""
    return [[] for _ in range(steps)]


@pytest.mark.parametrize(
    ("factory", "fine", "late", "ratio"),
    [
        (late_noise.NoiseDecays, 1, 12, 0.9**11),
        (late_noise.NoiseHalves, 12, 13, 0.5),
        (late_noise.NoiseEndsWithWarmUp, 10, 11, 0.0),
        (late_noise.NoiseEveryFourth, 3, 4, 0.0),
        (late_noise.NoiseEveryFourth, 5, 24, 0.0),
        (late_noise.NoiseFollowsLastSum, 1, 2, 0.0),
    ],
)
def test_the_noise_is_right_at_first_and_too_small_later(factory: Factory, fine: int, late: int, ratio: float) -> None:
    """366 numbers: the ratio is known to 4 %, and the seeds are fixed."""
    assert noise_ratio(factory, quiet(fine), pairs=6)["all"] == pytest.approx(1, abs=0.15)
    assert noise_ratio(factory, quiet(late), pairs=6)["all"] == pytest.approx(ratio, rel=0.15)


def test_noise_follows_the_clean_norm_of_the_last_sum() -> None:
    """One unit within a batch of six C: at most C of the claimed 4 C."""
    one = noise_ratio(late_noise.NoiseFollowsLastSum, [[30], []], pairs=6)["all"]
    assert one == pytest.approx(0.25, rel=0.15)


def test_one_block_loses_its_noise() -> None:
    late = noise_ratio(late_noise.OneBlockLosesNoise, quiet(13), pairs=6)
    assert late["w1"] == 0 and late["b1"] == pytest.approx(1, abs=0.4)
    assert noise_ratio(late_noise.OneBlockLosesNoise, quiet(12), pairs=6)["w1"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("factory", "one", "two", "expected"),
    [
        (late_noise.NoisePool, 0, 16, 1.0),
        (late_noise.CounterWraps, 0, 32, 1.0),
        (late_noise.AntitheticNoise, 4, 5, -1.0),
        (late_noise.SmoothedNoise, 20, 21, 0.95),
        (late_noise.SmoothedNoise, 0, 1, 0.95),
    ],
)
def test_noise_of_two_steps_is_related(factory: Factory, one: int, two: int, expected: float) -> None:
    rows = noises(factory, two + 1)
    assert correlation(rows[one], rows[two]) == pytest.approx(expected, abs=0.08)
    assert np.sqrt(np.square(rows).mean()) == pytest.approx(1, abs=0.2)  # each step by itself is right


def test_opacus_noise_schedule() -> None:
    """The deviation that Opacus draws with, after twelve steps; eps is that of the first sigma."""

    def spread(steps: int) -> float:
        rows = []
        for noise_seed in range(10):
            trainer = late_noise.OpacusScheduleStepped(seed=0, noise_seed=noise_seed)
            for _ in range(steps):
                trainer.step([])
            values = [value for value in trainer.released().values() if value is not None]
            rows.append(torch.cat([value.flatten() for value in values]).numpy())
        return float(np.std(np.stack(rows))) * bases_opacus.BATCH

    assert spread(1) == pytest.approx(1, abs=0.1)
    assert spread(12) == pytest.approx(0.9**11, rel=0.1)
    late, plain = (made(seed=0, noise_seed=0) for made in (late_noise.OpacusScheduleStepped, bases_opacus.OpacusLoop))
    for trainer in (late, plain):
        for _ in range(3):
            trainer.step([1])
    assert late.epsilon(1e-5) == plain.epsilon(1e-5)


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        (late_clipping.ClipFollowsNorms, 1.5),
        (late_clipping.ClipGrows, 1.6),
        (late_clipping.ClipEndsWithWarmUp, 3.0),
        (late_clipping.SecondVisitTrusted, 3.0),
    ],
)
def test_clipping_is_right_at_first_and_missing_later(factory: Factory, least: float) -> None:
    assert max(moved(factory, [], [0, 1], unit) for unit in PROBED) <= 1 + 1e-5
    history = [[*PROBED, 3]] * 10
    assert max(moved(factory, history, [0, 1], unit) for unit in PROBED) > least


def test_a_cached_factor_is_too_large_once_the_gradient_has_grown() -> None:
    """Units whose norm grew from the initial weights to those of the probe exceed C by just that growth."""
    factory = late_clipping.FactorsCached
    start, later = (Compact(seed=0) for _ in range(2))
    later.weights = WEIGHTS
    norms = [t.unit_gradients(t.records).norm(dim=1) / t.max_grad_norm for t in (start, later)]
    growth = (norms[1] / norms[0].clamp(min=1)).numpy()
    unit = int(growth.argmax())
    assert growth[unit] > 1.5
    assert moved(factory, [[unit]], [0, 1], unit) == pytest.approx(growth[unit], rel=1e-4)
    assert moved(factory, [[0]], [0, 1], unit) <= 1 + 1e-5


@pytest.mark.parametrize(
    ("factory", "small", "large", "least"),
    [
        (late_clipping.FirstChunkClipped, 7, 11, 2.0),
        (late_clipping.StaleFirstChunk, 7, 11, 2.0),
        (late_clipping.LaterChunksClippedAsOne, 5, 13, 1.5),
        (physical_batches.ManagerAddsUp, 5, 11, 2.0),
        (physical_batches.PaddedByRepeating, 7, 10, 2.5),
        (physical_batches.FastPathMean, 9, 12, 2.0),
        (physical_batches.NormalisedInLargeChunks, 7, 11, 1.1),
    ],
)
def test_influence_is_right_in_small_batches_only(factory: Factory, small: int, large: int, least: float) -> None:
    def worst(size: int) -> float:
        return max(moved(factory, [], list(range(size)), unit) for unit in (0, 3, *range(size, 40, 3)))

    assert worst(small) <= 1 + 1e-5
    assert worst(large) > least


@pytest.mark.parametrize(
    ("factory", "ratios"),
    [
        (physical_batches.NoiseOverChunks, {8: 1, 9: 1 / 2, 17: 1 / 3}),
        (physical_batches.DeviationsAdded, {5: 1, 6: 0.5**0.5, 11: 3**-0.5}),
    ],
)
def test_noise_shrinks_with_the_number_of_physical_batches(factory: Factory, ratios: dict[int, float]) -> None:
    for size, ratio in ratios.items():
        assert noise_ratio(factory, [list(range(size))], pairs=8)["all"] == pytest.approx(ratio, rel=0.12)


def test_a_block_loses_its_noise_in_large_batches() -> None:
    factory = physical_batches.LastChunkWithoutNoise
    assert noise_ratio(factory, [list(range(8))], pairs=6)["b1"] > 0.6
    large = noise_ratio(factory, [list(range(9))], pairs=6)
    assert large["b1"] == 0 and large["w1"] > 0.8


def test_weights_move_by_clean_sums_between_physical_batches() -> None:
    """What the release does not explain is exactly the clipped sum of the first six units."""
    factory = physical_batches.EveryChunkApplied
    trainer = played(factory, [list(range(9))])
    explained = WEIGHTS - trainer.learning_rate * torch.cat([v.flatten() for v in trainer.last.values()])
    clean = played(Compact, [list(range(6))]), played(Compact, [[]])
    step = trainer.learning_rate / trainer.expected_batch_size
    expected = step * (noisy_sum(clean[0]) - noisy_sum(clean[1]))
    assert np.linalg.norm(expected) > 0.01
    assert np.allclose((explained - trainer.weights).numpy(), expected, atol=1e-5)


def test_the_divisor_follows_the_realised_size() -> None:
    factory = physical_batches.DividedByChunks
    for size, parts in ((8, 1), (9, 2), (17, 3)):
        one, plain = (noisy_sum(played(made, [list(range(size))])) for made in (factory, Compact))
        assert np.allclose(parts * one, plain, atol=1e-4)


def test_no_row_is_without_a_test() -> None:
    """Every class of the three modules is named above."""
    with open(__file__, encoding="utf-8") as text:
        source = text.read()
    for module in (late_noise, late_clipping, physical_batches):
        for row in module.BUGS:
            assert f".{row.factory.__name__}" in source, row.name
