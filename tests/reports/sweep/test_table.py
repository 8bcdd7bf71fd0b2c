"""Intervals over seeds and pictures: simulated coverage, limits that are known, invariances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reports.metrics import cluster_metric
from reports.sweep.table import Answers, averaged, by_kind, crossed, difference


def answers(correct: np.ndarray[tuple[int], np.dtype[np.float64]], per: int = 1) -> Answers:
    clusters = tuple(f"c{index // per}" for index in range(len(correct)))
    return Answers(correct, clusters, ("k",) * len(correct), "s")


@pytest.mark.parametrize(
    ("seed_std", "picture_std", "noise_std"), [(0.02, 0.3, 0.3), (0.05, 0.02, 0.1), (0.0, 0.3, 0.05), (0.03, 0.1, 0.6)]
)
def test_the_interval_covers_the_truth_in_a_two_way_model(
    seed_std: float, picture_std: float, noise_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """95 % intervals of 3 seeds and 60 pictures: at least 0.95 minus a margin that chance crosses with p < 1e-6."""
    monkeypatch.setattr("reports.sweep.table.RESAMPLES", 200)  # enough for a variance
    rng = np.random.default_rng(7)
    repeats, covered = 600, 0
    for _ in range(repeats):
        values = (
            rng.normal(0, seed_std, (3, 1)) + rng.normal(0, picture_std, (1, 60)) + rng.normal(0, noise_std, (3, 60))
        )
        found = crossed(values, [str(index) for index in range(60)], low=-1e9, high=1e9)
        assert found.low is not None and found.high is not None and found.covers == "seeds and pictures"
        covered += found.low <= 0 <= found.high
    assert covered >= stats.binom.ppf(1e-6, repeats, 0.945)  # a bootstrap variance of 60 pictures is a little small


def test_seeds_without_variation_leave_the_picture_interval_and_one_seed_says_so() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random(400) < 0.7).astype(float)
    one = averaged([answers(correct, per=4)])
    metric = cluster_metric(correct, answers(correct, per=4).clusters)
    assert (one.low, one.high, one.covers, one.pictures, one.n) == (metric.low, metric.high, "pictures", 100, 400)
    three = averaged([answers(correct, per=4)] * 3)
    assert three.low == pytest.approx(metric.low, abs=0.01) and three.high == pytest.approx(metric.high, abs=0.01)


def test_seeds_that_disagree_widen_it_by_students_t() -> None:
    """Every picture alike: only the seed means vary, and the interval is the textbook's."""
    means = np.array([0.2, 0.5, 0.6])
    values = np.repeat(means[:, None], 50, axis=1)
    found = crossed(values, [str(i) for i in range(50)], low=-9.0, high=9.0)
    low, high = stats.t.interval(0.95, 2, loc=means.mean(), scale=means.std(ddof=1) / 3**0.5)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_perfect_and_hopeless_have_exact_limits() -> None:
    for value in (0.0, 1.0):
        found = averaged([answers(np.full(30, value))] * 3)
        assert found.value == value and found.low is not None and found.high is not None
        assert found.high - found.low == pytest.approx(1 - stats.beta.ppf(0.025, 30, 1))


def test_a_difference_is_paired() -> None:
    """Two methods that fail on the same pictures: the difference is known far better than either accuracy."""
    rng = np.random.default_rng(3)
    hard = (rng.random(300) < 0.5).astype(float)
    easy = [answers(np.maximum(hard, rng.random(300) < 0.1)) for _ in range(3)]
    plain = [answers(hard) for _ in range(3)]
    gap = difference(easy, plain)
    assert gap.low is not None and gap.high is not None and gap.low > 0
    wide = averaged(plain)
    assert wide.low is not None and wide.high is not None
    assert gap.high - gap.low < 0.5 * (wide.high - wide.low)
    same = difference(plain, plain)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_order_of_seeds_is_irrelevant_and_limits_hold(seeds: int, pictures: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [answers((rng.random(pictures * 2) < 0.6).astype(float), per=2) for _ in range(seeds)]
    one, other = averaged(parts), averaged(parts[::-1])
    assert one.value == pytest.approx(other.value) and one.low == pytest.approx(other.low)
    assert one.low is not None and one.high is not None and 0 <= one.low <= one.value <= one.high <= 1


def test_kinds_are_the_same_numbers_as_alone() -> None:
    rng = np.random.default_rng(5)
    correct = (rng.random(60) < 0.6).astype(float)
    part = Answers(correct, tuple(f"c{i // 2}" for i in range(60)), ("a", "b") * 30, "s")
    found = by_kind([part])
    assert list(found) == ["a", "b"] and found["a"].value == pytest.approx(correct[::2].mean())
    assert found["b"].n == 30 and found["b"].pictures == 30
