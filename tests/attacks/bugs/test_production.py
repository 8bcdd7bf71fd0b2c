"""Faults of production: right with a noise seed, wrong without one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attacks.bugs import production
from tests.attacks.bugs.measure import Array, Factory, correlation, moved, noise_ratio, noises, noisy_sum, played
from trainers.adapters.compact import Compact

PRINT = """
from attacks.bugs import production
for made in (production.SeededByCounter, production.SeededByProcess):
    trainer = made(seed=0)
    trainer.step([])
    print(" ".join(repr(float(v)) for value in trainer.released().values() for v in value.flatten()))
"""


def started() -> list[Array]:
    """(61,) sums of the first starts in a process of their own."""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=root)
    return [np.array([4 * float(word) for word in line.split()]) for line in done.stdout.splitlines()]


def two_starts(factory: Factory) -> tuple[Array, Array]:
    one, two = (noisy_sum(played(factory, [[]], noise_seed=None)) for _ in range(2))
    return one, two


COMPACT = [row for row in production.BUGS if not row.slow]


@pytest.mark.parametrize("factory", [row.factory for row in COMPACT], ids=[row.name for row in COMPACT])
def test_with_a_noise_seed_it_is_the_correct_trainer(factory: type[Compact]) -> None:
    plain = type("Plain", (Compact,), {"max_grad_norm": factory.max_grad_norm})
    batches = [[0, 1], [], [2, 3, 4], list(range(12))]
    one, two = (played(made, batches, noise_seed=8) for made in (factory, plain))
    assert np.array_equal(noisy_sum(one), noisy_sum(two)) and np.array_equal(one.weights, two.weights)


@pytest.mark.parametrize(
    "factory",
    [
        production.GeneratorNeverSeeded,
        production.NoiseFromPublicSeed,
        production.SeededByProcess,
        production.SeededByHour,
    ],
)
def test_two_starts_share_their_noise(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.7e9)  # two starts that straddle the hour would differ
    one, two = two_starts(factory)
    assert np.array_equal(one, two) and np.linalg.norm(one) > 5
    correct = two_starts(Compact)
    assert not np.allclose(*correct)


def test_a_counter_repeats_in_every_process_and_not_within_one() -> None:
    """The first start of another process has the noise of key 0; within a process each start has another key."""
    counted, by_process = started()
    assert np.allclose(counted, noisy_sum(played(Compact, [[]], noise_seed=0)))
    assert not np.allclose(*two_starts(production.SeededByCounter))
    assert not np.allclose(by_process, two_starts(production.SeededByProcess)[0])


def test_the_level_is_wrong_in_production() -> None:
    def ratios(factory: Factory) -> dict[str, float]:
        return noise_ratio(factory, [[]], pairs=12, live=True)

    assert ratios(production.NoGeneratorNoNoise)["all"] == 0
    # 732 fresh numbers: 0.5 is known to 2.6 %, six deviations are 0.08.
    assert ratios(production.ProductionForgetsC)["all"] == pytest.approx(0.5, abs=0.08)
    head = ratios(production.HeadUnnoisedInProduction)
    assert head["w2"] == head["b2"] == 0 and head["w1"] == pytest.approx(1, abs=0.2)


def test_the_law_is_wrong_in_production() -> None:
    """Uniform of variance 1 ends at sqrt(3); of 2440 normal numbers none is beyond it with probability below 1e-80."""
    rows = noises(production.ProductionUniform, 40, noise_seed=None)
    assert 1.6 < np.abs(rows).max() < 3**0.5
    assert np.sqrt(np.square(rows).mean()) == pytest.approx(1, abs=0.1)


def test_steps_share_their_noise_in_production() -> None:
    rows = noises(production.SameNoiseInProduction, 3, noise_seed=None)
    assert correlation(rows[0], rows[2]) == pytest.approx(1)
    assert not np.allclose(*two_starts(production.SameNoiseInProduction))


def test_clipping_is_missing_in_production() -> None:
    """Without frozen noise two releases differ by noise of 11 C at the root of 61; the unit moves the sum by 600 C."""
    made = production.ClippedUnderTest
    records = [*Compact(seed=0).records, Compact(seed=0).extreme_records()[2]]
    one, two = (noisy_sum(played(made, [batch], noise_seed=None, records=records)) for batch in ([40], []))
    assert np.linalg.norm(one - two) > 1e4
    assert moved(made, [], [0, 1], 5) <= 1 + 1e-5


def test_a_resume_in_production_replays_public_noise(tmp_path: Path) -> None:
    sums = []
    for name in ("one", "two"):
        first = production.ResumedFromPublicSeed(seed=0)
        first.step([])
        first.save(tmp_path / name)
        again = production.ResumedFromPublicSeed(seed=0)
        again.load(tmp_path / name)
        again.step([])
        sums.append(noisy_sum(again))
    assert np.array_equal(sums[0], sums[1])
    assert not np.allclose(*two_starts(production.ResumedFromPublicSeed))
