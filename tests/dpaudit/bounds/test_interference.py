"""Canaries that meet: which p-value survives what.

The f-DP theorem covers every mechanism that satisfies the claimed curve. The order-statistics tail assumes that
canaries don't share their fate, and the first test shows a mechanism that satisfies the curve and breaks it.
"""

import numpy as np
import numpy.typing as npt
import pytest

from dpaudit.analysis import simulate
from dpaudit.bounds import mahloujifar, order_statistic
from dpaudit.bounds.profile import GaussianProfile, Profile

AUDITS = 2000
MOST = 152  # P[Binomial(2000, 0.05) > 152] < 1e-6


def refuted(profile: Profile, right: npt.NDArray[np.intp], n: int, r: int) -> tuple[int, int]:
    """Audits with p <= 0.05 by (order statistics, f-DP theorem)."""
    ordered = {
        int(v): order_statistic.p_value(profile, canaries=n, guesses=r, errors=r - int(v)) <= 0.05 for v in set(right)
    }
    general = {int(v): mahloujifar.p_value(profile, canaries=n, guesses=r, correct=int(v)) <= 0.05 for v in set(right)}
    return sum(ordered[int(v)] for v in right), sum(general[int(v)] for v in right)


def test_common_fate_breaks_order_statistics_only() -> None:
    """A coarsened Gaussian: its most confident tenth and the rest, one die for all canaries.

    Each coin sees a garbling of the N(0,1) / N(1,1) channel, so the claim mu = 1 is true; a tenth of the audits shows
    every canary at the small error, which independent channels never would.
    """
    profile = GaussianProfile(1.0)
    tenth = float(profile.error_above(np.array([0.9]))[0]) / 0.1
    rest = (float(profile.error_above(np.zeros(1))[0]) - 0.1 * tenth) / 0.9
    rng = np.random.default_rng(3)
    scores, inside = simulate.common_fate(AUDITS, 400, [(0.1, tenth), (0.9, rest)], rng)
    right = simulate.right_guesses(scores, inside, 100, 100, rng)
    ordered, general = refuted(profile, right, 400, 200)
    assert ordered > 0.08 * AUDITS  # the tail is not a theorem here
    assert general <= MOST


@pytest.mark.parametrize(("dimension", "shared"), [(400, 0.0), (50, 0.0), (5, 0.0), (200, 0.3), (200, 0.9)])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_gaussian_sums_keep_the_level(dimension: int, shared: float, sigma: float) -> None:
    """Canary gradients that overlap in one noisy sum: no more false refutations than the level, by either p-value."""
    rng = np.random.default_rng([dimension, round(10 * shared), round(10 * sigma)])
    directions = simulate.unit_rows(200, dimension, shared, rng)
    scores, inside = simulate.meeting(AUDITS, directions, sigma, rng)
    right = simulate.right_guesses(scores, inside, 50, 50, rng)
    ordered, general = refuted(GaussianProfile(1 / sigma), right, 200, 100)
    assert ordered <= MOST and general <= MOST


def test_half_the_noise_is_found() -> None:
    rng = np.random.default_rng(9)
    scores, inside = simulate.gaussian(300, 1000, 2.0, rng)
    right = simulate.right_guesses(scores, inside, 250, 250, rng)
    ordered, _ = refuted(GaussianProfile(1.0), right, 1000, 500)
    assert ordered == 300
    right = simulate.right_guesses(scores, inside, 100, 100, rng)
    _, general = refuted(GaussianProfile(1.0), right, 1000, 200)
    assert general > 290
