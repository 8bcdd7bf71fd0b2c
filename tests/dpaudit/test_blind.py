"""dpaudit.blind: exact under fair coins, finds what it says that it finds, and agrees with brute force and scipy."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from dpaudit import blind
from dpaudit.blind import baseline, critical_deviation, least_auc

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def coins(n: int, seed: int) -> Bools:
    return np.random.default_rng(seed).random(n) < 0.5


def shift(auc: float) -> float:
    return float(np.sqrt(2) * stats.norm.ppf(auc))


def found(rows: Floats, members: Bools, seed: int = 0, kinds: npt.ArrayLike | None = None) -> blind.Blind:
    return baseline(rows, members, rng=np.random.default_rng(seed), kinds=kinds)


def heavy_tails(rng: np.random.Generator) -> tuple[Floats, Bools, npt.NDArray[np.intp]]:
    """40 records of three kinds with coins of different rates; Cauchy, tied, rare and constant columns."""
    kinds = np.repeat([0, 1, 2], [20, 14, 6])
    members = rng.random(40) < np.array([0.5, 0.8, 0.3])[kinds]
    rows = np.column_stack([rng.standard_cauchy((40, 3)), rng.integers(0, 3, (40, 2)), rng.random((40, 2)) < 0.05])
    return np.column_stack([rows + 10 * kinds[:, None], np.ones(40)]), members, kinds


def gaussian(rng: np.random.Generator) -> tuple[Floats, Bools, npt.NDArray[np.intp]]:
    return rng.normal(size=(60, 90)), rng.random(60) < 0.5, np.zeros(60, dtype=np.intp)


@pytest.mark.parametrize("draw", [heavy_tails, gaussian])
def test_false_alarms_are_as_rare_as_stated(draw) -> None:
    """300 null games: p-values at most uniform, not merely conservative. Binomial limits of 1e-7, fixed seeds."""
    p = []
    for seed in range(300):
        rng = np.random.default_rng([seed, 17])
        rows, members, kinds = draw(rng)
        p.append(baseline(rows, members, rng=rng, kinds=kinds).p_value)
    for level in (0.5, 0.1, 0.01, blind.LEVEL):
        hits = sum(value <= level for value in p)
        assert stats.binomtest(hits, len(p), level, alternative="greater").pvalue > 1e-7
    assert stats.binomtest(sum(value <= 0.5 for value in p), len(p), 0.5, alternative="less").pvalue > 1e-7


def test_a_shift_of_one_column_in_200_is_found() -> None:
    """AUC .60 at n = 1,000 (power: benchmarks/results/blind_power.csv); 3 of 12 or fewer: 6e-5 at power 0.8."""
    hits = 0
    for seed in range(12):
        members, rng = coins(1000, seed), np.random.default_rng([seed, 3])
        rows = rng.normal(size=(1000, 200))
        rows[:, 77] += shift(0.60) * members
        hits += found(rows, members, seed).beats_chance
    assert hits > 3


@pytest.mark.parametrize("columns", [10, 100])
def test_small_shifts_of_all_columns_are_found(columns: int) -> None:
    members = coins(1000, 1)
    rows = (
        np.random.default_rng(2).normal(size=(1000, columns))
        + shift(0.56 if columns == 10 else 0.54) * members[:, None]
    )
    result = found(rows, members)
    assert result.beats_chance and result.auc > 0.58 and result.check().status == "fail"


def test_an_interaction_and_a_spread_are_found_that_no_column_shows() -> None:
    members, rng = coins(600, 4), np.random.default_rng(5)
    crossed = rng.normal(size=(600, 8))
    crossed[:, 0] = np.abs(crossed[:, 0]) * np.sign(crossed[:, 1]) * np.where(members, 1, -1)
    wider = rng.normal(size=(600, 8)) * np.where(members, 2, 1)[:, None]
    for rows in (crossed, wider):
        assert found(rows, members).beats_chance
        assert found(rows, coins(600, 6)).p_value > 0.01


def test_one_outlier_neither_hides_a_shift_nor_makes_one() -> None:
    members, rng = coins(500, 7), np.random.default_rng(8)
    rows = rng.normal(size=(500, 20))
    rows[int(np.flatnonzero(members)[0]), 3] = 1e30
    assert found(rows, members).p_value > 0.01
    rows[:, 3] += shift(0.68) * members
    assert found(rows, members).beats_chance


def test_unequal_kinds_are_no_signal_but_a_shift_within_them_is() -> None:
    rng = np.random.default_rng(9)
    kinds = np.repeat(["a", "b"], 200)
    members = rng.random(400) < np.where(kinds == "a", 0.9, 0.2)
    rows = rng.normal(size=(400, 5)) + 5 * (kinds == "a")[:, None]
    assert found(rows, members, kinds=kinds).p_value > 0.01
    assert found(rows, members).beats_chance  # taken for one kind, the rates tell
    rows[:, 0] += 1.2 * members
    assert found(rows, members, kinds=kinds).beats_chance


def test_deviations_have_unit_variance_over_all_arrangements() -> None:
    """Brute force over every arrangement of two kinds (C(6, 3) C(4, 1) = 80)."""
    rows = np.random.default_rng(10).integers(0, 4, size=(10, 3)).astype(np.float64)
    groups = [np.arange(6), np.arange(6, 10)]
    labels = np.zeros(10, dtype=bool)
    labels[[0, 1, 2, 6]] = True
    variance = blind._coin_variance(labels, groups)
    unit = blind._unit(blind._ranked(rows, groups), variance)
    every = []
    for three in combinations(range(6), 3):
        for one in range(6, 10):
            every.append(np.isin(np.arange(10), [*three, one]))
    deviations = np.array(every, dtype=np.float64) @ unit
    np.testing.assert_allclose(deviations.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(deviations.var(axis=0), 1, rtol=1e-5)
    # The quadratic form's mean and variance (normal approximation) come from the same covariance.
    statistic = blind._Statistic.of(blind._ranked(rows, groups), variance, groups)
    form = ((deviations @ statistic.root.T) ** 2).sum(axis=1)
    assert form.mean() == pytest.approx(statistic.scale * statistic.freedom, rel=1e-4)


def test_arrangements_are_uniform_within_kinds() -> None:
    groups, labels = [np.array([0, 2, 4, 6]), np.array([1, 3, 5])], np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    drawn = blind._arrangements(6000, labels, groups, np.random.default_rng(11))
    assert (drawn[:, groups[0]].sum(axis=1) == 2).all() and (drawn[:, groups[1]].sum(axis=1) == 1).all()
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 18 and stats.chisquare(counts).pvalue > 1e-6


def test_columns_and_classifier_against_second_implementations() -> None:
    members, rng = coins(80, 12), np.random.default_rng(13)
    rows = rng.normal(size=(80, 6)).round(1) + 0.5 * members[:, None]
    result = found(rows, members)
    areas = [stats.mannwhitneyu(column[members], column[~members]).statistic for column in rows.T]
    areas = np.array(areas) / (members.sum() * (~members).sum())
    assert result.strongest == pytest.approx(0.5 + np.abs(areas - 0.5).max(), abs=1e-6)
    # The classifier, fitted again for every record without its coin.
    ranks = stats.rankdata(rows, axis=0)
    ranks = (ranks - ranks.mean(axis=0)) / ranks.std(axis=0)
    weights = np.linalg.inv(np.corrcoef(ranks.T) + (blind.RIDGE + 6 / 80) * np.eye(6))
    signs = members - members.mean()
    others = ~np.eye(80, dtype=bool)
    guesses = [ranks[i] @ weights @ (ranks[others[i]].T @ signs[others[i]]) for i in range(80)]
    above = stats.mannwhitneyu(np.array(guesses)[members], np.array(guesses)[~members]).statistic
    assert result.auc == pytest.approx(above / (members.sum() * (~members).sum()), abs=1e-3)


def test_the_classifier_without_own_coin_is_at_chance_on_null_games() -> None:
    areas = [found(np.random.default_rng([s, 1]).normal(size=(60, 90)), coins(60, s), s).auc for s in range(150)]
    assert abs(np.mean(areas) - 0.5) < 5.5 * np.std(areas) / np.sqrt(150)


@pytest.mark.parametrize(("n", "columns"), [(30, 2), (100, 5), (300, 50), (1000, 200)])
def test_the_stated_shift_is_found_with_the_stated_power(n: int, columns: int) -> None:
    """4,000 Mann-Whitney tests of one column against the simulated quantile of the largest of `columns` null ones."""
    least = least_auc(columns, n // 2, n // 2)
    assert least is not None
    rng = np.random.default_rng([n, 14])
    members = np.arange(n) < n // 2
    planted = rng.normal(size=(n, 4000)) + shift(least) * members[:, None]
    assert 0.76 < (_deviations(planted, members) >= critical_deviation(columns, n // 2, n // 2)).mean() < 0.86


def _deviations(rows: Floats, members: Bools) -> Floats:
    """(columns,) standardised Mann-Whitney statistics."""
    m, n = int(members.sum()), int((~members).sum())
    above = stats.rankdata(rows, axis=0)[members].sum(axis=0) - m * (m + 1) / 2
    return np.asarray((above - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))


def mann_whitney_tail(m: int, n: int, least: float) -> float:
    """P[U >= least] by Mann and Whitney's recursion, as the coefficients of the Gaussian binomial."""
    counts = np.zeros(m * n + 1)
    counts[0] = 1.0
    for k in range(1, m + 1):
        for at in range(m * n, n + k - 1, -1):  # times (1 - q^(n + k))
            counts[at] -= counts[at - n - k]
        for at in range(k, m * n + 1):  # divided by (1 - q^k)
            counts[at] += counts[at - k]
    return float(counts[int(np.ceil(least)) :].sum() / counts.sum())


def test_the_critical_deviation_keeps_its_share_of_the_level() -> None:
    for n, columns in ((24, 1), (40, 3), (60, 10)):
        m = n // 2
        statistic = m * m / 2 + critical_deviation(columns, m, m) * np.sqrt(m * m * (n + 1) / 12)
        share = blind.SHARES["one column"] * blind.LEVEL / (2 * columns)
        assert mann_whitney_tail(m, m, statistic) == pytest.approx(share, rel=0.3)


def test_what_could_be_seen_is_printed_and_a_test_that_could_not_fail_does_not_pass() -> None:
    rng = np.random.default_rng(15)
    check = found(rng.normal(size=(400, 10)), coins(400, 16)).check()
    assert check.status == "pass"
    expected = least_auc(10, int(coins(400, 16).sum()), int((~coins(400, 16)).sum()))
    assert f"finds AUC {expected:.3f} in one column with 80 % power" in check.measured
    assert f"of {blind.PLANTED} planted shifts of that size found" in check.measured
    few = found(rng.normal(size=(12, 300)), np.arange(12) < 6)
    assert few.least is None and few.check().status == "not applicable"
    assert "no shift in one column" in few.check().measured
    constant = found(np.ones((100, 3)), coins(100, 1))
    assert constant.p_value == 1.0 and constant.check().status == "not applicable"
    assert found(rng.normal(size=(50, 2)), np.ones(50, dtype=bool)).check().status == "not applicable"


def test_more_columns_and_fewer_records_see_less() -> None:
    table = [[least_auc(d, n // 2, n // 2) or 2.0 for d in (1, 10, 1000)] for n in (60, 200, 5000)]
    assert (np.diff(table, axis=1) > 0).all() and (np.diff(table, axis=0) < 0).all()
