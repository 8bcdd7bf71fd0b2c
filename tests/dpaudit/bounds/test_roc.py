"""The descriptive summary: AUC against scipy and brute force, ties, resolvable FPR, interval coverage, histograms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpaudit.bounds import roc
from dpaudit.errors import UsageError

scored = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=80).filter(
    lambda rows: len({member for _, member in rows}) == 2
)


@given(scored)
def test_auc_is_mann_whitney(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], float)
    members = np.array([member for _, member in rows])
    wins = np.sign(scores[members][:, None] - scores[~members][None, :])
    fpr, tpr = roc.curve(scores, members)
    assert roc.auc(fpr, tpr) == pytest.approx(0.5 + 0.5 * wins.mean(), abs=1e-12)
    summary = roc.summarise("any", scores, members)
    assert summary.auc_low is not None and summary.auc_high is not None
    assert 0 <= summary.auc_low <= summary.auc + 1e-12 and summary.auc <= summary.auc_high + 1e-12 <= 1 + 1e-9
    assert sum(summary.counts_in) == members.sum() and sum(summary.counts_out) == (~members).sum()
    for point in summary.roc:
        assert point.tpr_low is not None and point.tpr_high is not None
        assert point.tpr_low <= point.tpr <= point.tpr_high


def test_ties_never_exceed_the_fpr_asked() -> None:
    """Half of all scores saturate at the top: no threshold has an FPR between 0 and 1/2, so TPR at 1 % is 0."""
    scores = np.repeat([1.0, 0.0], 5000)
    members = np.tile([True, False], 5000)
    summary = roc.summarise("saturated", scores, members)
    point = summary.tpr_at_fpr["0.01"]
    assert point is not None and point.fpr == 0.0 and point.tpr == 0.0
    assert summary.auc == pytest.approx(0.5)


def test_small_fpr_is_not_resolvable() -> None:
    rng = np.random.default_rng(3)
    members = np.arange(400) < 200
    summary = roc.summarise("small", rng.normal(size=400), members)
    assert summary.tpr_at_fpr["0.1"] is not None
    assert summary.tpr_at_fpr["0.01"] is None and summary.tpr_at_fpr["0.001"] is None


def test_clopper_pearson_is_scipys() -> None:
    for k, n in [(0, 10), (10, 10), (3, 17), (500, 1000)]:
        exact = stats.binomtest(k, n).proportion_ci(0.9, method="exact")
        assert roc.clopper_pearson_interval(k, n, 0.9) == pytest.approx((exact.low, exact.high), abs=1e-10)


def test_auc_interval_covers() -> None:
    """Gaussian scores, true AUC 0.76: at least 92 % of 2,000 intervals cover (false alarm < 1e-8 at 95 %)."""
    rng = np.random.default_rng(11)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    members = np.arange(200) < 100
    covered = 0
    for _ in range(2000):
        fpr, tpr = roc.curve(rng.normal(size=200) + members, members)
        low, high = roc.auc_interval(roc.auc(fpr, tpr), 100, 100)
        covered += low <= truth <= high
    assert covered >= 0.92 * 2000


def test_interval_has_width_at_the_ends() -> None:
    low, high = roc.auc_interval(1.0, 20, 20)
    assert high == 1.0 and 0.8 < low < 0.99
    assert roc.auc_interval(0.0, 20, 20) == pytest.approx((0.0, 1 - low), abs=1e-9)


@settings(max_examples=60)
@given(st.lists(st.floats(-1e12, 1e12), min_size=2, max_size=50))
def test_histogram_counts_everything(values: list[float]) -> None:
    edges = roc.histogram_edges(np.array(values))
    assert np.all(np.diff(edges) > 0)
    assert sum(roc.histogram_counts(values, edges)) == len(values)


def test_histogram_survives_an_outlier() -> None:
    rng = np.random.default_rng(0)
    edges = roc.histogram_edges(np.r_[rng.normal(size=5000), 1e30])
    assert 20 <= edges.size - 1 <= 50 and edges[-1] < 10


def test_one_class_is_an_error() -> None:
    with pytest.raises(UsageError, match="one class only"):
        roc.summarise("x", [1.0, 2.0], [True, True])
