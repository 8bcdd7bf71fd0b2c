"""The tests behind the checks: exact where they say exact, valid where they say bound, powerful where it matters."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, kstest, norm

from attacks.contract import statistics as stats


def test_correlation_p_is_uniform_for_independent_normals() -> None:
    rng = np.random.default_rng(0)
    p = np.array([stats.correlation(rng.standard_normal(9), rng.standard_normal(9))[1] for _ in range(4000)])
    assert kstest(p, "uniform").pvalue > 1e-6


def test_correlation_of_a_copy_is_certain() -> None:
    x = np.random.default_rng(1).standard_normal(8)
    assert stats.correlation(x, x) == (1.0, 0.0)
    r, p = stats.correlation(x, -3 * x)
    assert r == pytest.approx(-1.0) and p == 0.0
    assert stats.correlation(x, 0 * x) == (0.0, 1.0)


def test_symmetric_correlation_is_valid_for_laplace_and_finds_copies() -> None:
    rng = np.random.default_rng(2)
    p = np.array([stats.symmetric_correlation(rng.laplace(size=30), rng.laplace(size=30))[1] for _ in range(4000)])
    for level in (0.01, 0.05, 0.2):
        # the bound may be conservative, never anti-conservative: binomial quantile with false alarm below 1e-6
        assert int((p <= level).sum()) <= binom.ppf(1 - 1e-7, 4000, level)
    x = rng.laplace(size=400)
    assert stats.symmetric_correlation(x, x)[1] < stats.ALPHA


def test_std_interval_covers_and_matches_chi_square() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(2000):
        squares = float((1.3 * rng.standard_normal(20)) ** 2 @ np.ones(20))
        low, high = stats.std_interval(squares, 20, 0.1)
        missed += not low <= 1.3 <= high
    assert binom.ppf(1e-7, 2000, 0.1) <= missed <= binom.ppf(1 - 1e-7, 2000, 0.1)
    assert stats.variance_p(float(chi2.ppf(0.5, 7)), 7) == pytest.approx(1.0)
    assert stats.variance_p(float(chi2.ppf(0.001, 7)), 7) == pytest.approx(0.002)


def test_laplace_scale_is_exact() -> None:
    rng = np.random.default_rng(4)
    p = np.array([stats.laplace_scale_p(float(np.abs(rng.laplace(size=11)).sum()), 11) for _ in range(4000)])
    assert kstest(p, "uniform").pvalue > 1e-6


def test_spread_bound_dominates_the_true_tail() -> None:
    rng = np.random.default_rng(5)
    units, rate, draws = 40, 0.1, 60
    sizes = rng.binomial(units, rate, size=(3000, draws)).astype(float)
    p = np.array([stats.spread_p(row, units, rate) for row in sizes[:800]])
    for level in (0.02, 0.1, 0.3):
        assert int((p <= level).sum()) <= binom.ppf(1 - 1e-7, 800, level)
    # and it decides: constant sizes, and sizes of blocks of four
    assert stats.spread_p(np.full(400, 4.0), units, rate) < stats.ALPHA
    assert stats.spread_p(4.0 * rng.binomial(10, rate, size=400), units, rate) < stats.ALPHA


@pytest.mark.parametrize(("inside", "outside"), [(64, 0), (60, 3), (40, 20)])
def test_gaussian_leak_is_the_clopper_pearson_bound(inside: int, outside: int) -> None:
    alpha, runs = 1e-3, 64
    value = stats.gaussian_leak(inside, outside, runs, alpha)
    # brute force: the smallest P_in and largest P_out that the counts allow at alpha / 2 each
    grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
    low = grid[binom.sf(inside - 1, runs, grid) >= alpha / 2][0]
    high = grid[binom.cdf(outside, runs, grid) >= alpha / 2][-1]
    assert value == pytest.approx(max(0.0, float(norm.ppf(low) - norm.ppf(high))), abs=2e-3)


def test_gaussian_leak_is_valid() -> None:
    rng, mu, runs = np.random.default_rng(6), 0.8, 60
    p_in, p_out = float(norm.cdf(0.5 + mu)), float(norm.cdf(0.5))
    over = 0
    for _ in range(2000):
        bound = stats.gaussian_leak(int(rng.binomial(runs, p_in)), int(rng.binomial(runs, p_out)), runs, 0.05)
        over += bound > mu
    assert over <= binom.ppf(1 - 1e-7, 2000, 0.05)


def test_count_p_is_valid() -> None:
    counts = np.arange(31)
    p = np.array([stats.count_p(int(count), 30, 0.2) for count in counts])
    mass = binom.pmf(counts, 30, 0.2)
    for level in (0.001, 0.01, 0.1, 0.5):
        assert float(mass[p <= level].sum()) <= level


def test_law_tells_uniform_and_laplace_from_normal() -> None:
    rng = np.random.default_rng(7)
    n = 12_000
    assert stats.law_p(rng.standard_normal(n), "norm")[0] > 1e-6
    assert stats.law_p((rng.random(n) - 0.5) * math.sqrt(12), "norm")[0] < stats.ALPHA
    assert stats.law_p(rng.laplace(size=n) / math.sqrt(2), "norm")[0] < stats.ALPHA
    assert stats.law_p(rng.laplace(size=n), "laplace")[0] > 1e-6


def test_law_sees_tails_that_were_cut_ties_and_grids() -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal(22_000)
    for cut in (2.5, 3.0, 3.3):
        assert stats.law_p(np.clip(values, -cut, cut), "norm")[0] < stats.ALPHA
        kept = values[np.abs(values) < cut]  # drawn again instead of clamped: no ties, and no value beyond
        assert stats.law_p(kept, "norm")[0] < stats.ALPHA or cut == 3.3
    p, which = stats.law_p((10 * values).round() / 10, "norm")
    assert p == 0 and "distinct" in which


def test_numbers_that_are_used_twice_are_told_from_chance() -> None:
    """Never below 1e-6 in 300 sets of float32 noise; small where 1 % of the numbers are others again, or negated."""
    rng = np.random.default_rng(11)
    for _ in range(300):
        values = rng.standard_normal(6000).astype(np.float32).astype(np.float64)
        assert stats.repeats_p(values)[0] > 1e-6
    assert stats.repeats_p(rng.laplace(size=20_000))[0] > 1e-6
    values[:60] = -values[-60:] * (1 + 1e-7 * rng.standard_normal(60))
    p, found = stats.repeats_p(values)
    assert p < 1e-30 and found >= 60


def test_noise_in_bfloat16_is_no_other_law() -> None:
    """200 sets of 22,000: none below the level of a check."""
    rng = np.random.default_rng(10)
    for _ in range(200):
        values = torch.from_numpy(rng.standard_normal(22_000)).bfloat16().double().numpy()
        assert stats.law_p(values, "norm")[0] > stats.ALPHA


@pytest.mark.parametrize("law", ["norm", "laplace"])
def test_law_is_valid_for_float32_noise(law: str) -> None:
    """The smallest of 400 p-values and their distribution, false alarm below 1e-6 each (binomial, fixed seed)."""
    rng = np.random.default_rng(9)
    draw = rng.standard_normal if law == "norm" else rng.laplace
    p = np.array([stats.law_p(draw(size=3000).astype(np.float32).astype(np.float64), law)[0] for _ in range(400)])
    assert p.min() > 1e-7 and np.mean(p < 0.05) < 0.05 + 4.9 * math.sqrt(0.05 * 0.95 / 400)


def test_extremes_of_binomial_sizes_against_simulation_and_by_hand() -> None:
    """Uniform enough under the law (never below 1e-7 in 2,000 sets; expected 2e-4), and small for a cap and a floor."""
    rng = np.random.default_rng(6)
    sets = rng.binomial(60, 0.1, size=(2000, 400)).astype(float)
    values = np.array([stats.extremes_p(sizes, 60, 0.1) for sizes in sets])
    assert values.min() > 1e-7 and np.mean(values < 0.05) < 0.05 + 4.9 * math.sqrt(0.05 * 0.95 / 2000)
    assert stats.extremes_p(np.minimum(sets[0], 8), 60, 0.1) < 1e-12
    assert stats.extremes_p(np.maximum(sets[0], 3), 60, 0.1) < 1e-7
    one = stats.extremes_p(np.array([9.0]), 10, 0.1)  # one draw of 9 of 10: P[B >= 9] = 10 * 0.9 * 1e-9 + 1e-10
    assert one == pytest.approx(4 * (10 * 0.9 * 1e-9 + 1e-10), rel=1e-6)
