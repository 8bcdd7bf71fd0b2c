"""Evidence over the steps: fixed combinations are orthonormal, dependence is found, white noise is left alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from dpaudit.evidence.noise import NoiseLevel
from dpaudit.evidence.steps import LEVEL, dependence, levels, log_e

Floats = np.ndarray


def white(steps: int, width: int, seed: int, level: float = 1.0) -> Floats:
    return level * np.random.default_rng([seed, 41]).normal(size=(steps, width))


@given(steps=st.integers(2, 40), width=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_combinations_are_unit_vectors_over_the_steps(steps: int, width: int, seed: int) -> None:
    """Cosines: an orthonormal basis, so the squares add up. Sums and differences of one pairing: likewise."""
    shown = white(steps, width, seed)
    found = levels(shown)
    total = float(np.square(shown).sum())
    assert sum(level.squares for level in found[:steps]) == pytest.approx(total)
    assert all(level.count == width for level in found[:steps])
    even = shown[: steps - steps % 2]
    assert found[steps].squares + found[steps + 1].squares == pytest.approx(float(np.square(even).sum()))
    assert found[steps].count == found[steps + 1].count == width * (steps // 2)


def test_every_level_is_chi_square_under_the_claim() -> None:
    """Kolmogorov-Smirnov over 400 games at 1e-8 each for some of the combinations."""
    drawn = [levels(white(9, 20, seed)) for seed in range(400)]
    for place in (0, 3, 8, 9, 10, 11, 12):
        values = [game[place].p_value for game in drawn]
        assert kstest(values, "uniform").pvalue > 1e-8


def test_the_e_value_is_an_average_of_e_values() -> None:
    shown = white(7, 30, 5, level=0.8)
    each = [level.log_e for level in levels(shown)]
    assert log_e(shown) == pytest.approx(math.log(np.exp(each).mean()))
    assert isinstance(levels(shown)[0], NoiseLevel)
    assert log_e(shown[:1]) == 0.0


DEPENDENT = {
    "repeated": lambda e: np.repeat(e[::2], 2, axis=0),
    "taken back": lambda e: np.stack([e[::2], -e[::2]], axis=1).reshape(-1, e.shape[1]),
    "differences": lambda e: (e[1:] - e[:-1]) / math.sqrt(2),
    "moving sums": lambda e: (e[1:] + e[:-1]) / math.sqrt(2),
    "a pool of four": lambda e: e[np.arange(len(e)) % 4],
    "autoregressive, 0.5": lambda e: autoregressive(e, 0.5),
    "autoregressive, -0.5": lambda e: autoregressive(e, -0.5),
    "the same in every step": lambda e: np.repeat(e[:1], len(e), axis=0),
}


def autoregressive(e: Floats, rho: float) -> Floats:
    made = [e[0]]
    for row in e[1:]:
        made.append(rho * made[-1] + math.sqrt(1 - rho**2) * row)
    return np.stack(made)


@pytest.mark.parametrize("name", DEPENDENT)
def test_noise_with_the_law_of_the_claim_in_every_step_and_a_memory_is_refuted(name: str) -> None:
    shown = DEPENDENT[name](white(40, 256, 3))
    assert abs(np.square(shown).mean() - 1) < 0.25
    found = dependence(shown)
    assert found is not None and found.found
    assert log_e(shown) > math.log(1e6)


def test_one_old_draw_is_found_and_named() -> None:
    shown = white(60, 256, 8)
    shown[50] = shown[11]
    found = dependence(shown)
    assert found is not None and found.found and "steps 12 and 51" in found.seen


def test_white_noise_of_any_level_is_left_alone() -> None:
    """False alarm at most 300 x 1e-6 by the level; none is expected, and the seeds are fixed."""
    for seed in range(300):
        found = dependence(white(25, 64, seed, level=1 + seed % 3))
        assert found is not None and found.p_value > LEVEL
    assert dependence(white(1, 64, 0)) is None


def test_a_step_without_anything_is_named() -> None:
    shown = white(6, 32, 1)
    shown[4] = 0
    found = dependence(shown)
    assert found is not None and found.found and found.seen == "nothing at all in step 5"


def test_many_steps_are_thinned_and_lags_still_seen() -> None:
    shown = autoregressive(white(3000, 16, 2), 0.3)
    found = dependence(shown)
    assert found is not None and found.found and "1 apart" in found.seen
