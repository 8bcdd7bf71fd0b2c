"""Exact match and cluster intervals, against closed forms and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from reports.metrics import by_kind, cluster_metric, commonest, constant_answers, exact_match, normalise


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("Seven", "seven", 1.0),
        ("  a\tred \n circle ", "A red circle", 1.0),
        ("STRASSE", "straße", 1.0),
        ("ﬁve", "five", 1.0),
        ("seven.", "seven", 0.0),
        ("7", "seven", 0.0),
        ("", "seven", 0.0),
    ],
)
def test_exact_match_ignores_case_and_space_only(answer: str, target: str, expected: float) -> None:
    assert exact_match(answer, target) == expected


@given(st.text())
def test_normalising_adds_nothing_the_second_time_for_plain_text(text: str) -> None:
    once = normalise(text)
    assert once == " ".join(once.split())
    assert exact_match(text, f" {text}\n") == 1.0


def test_interval_of_single_questions_is_the_binomial_one() -> None:
    """With one question a cluster the bootstrap law of the share is Binomial(n, share) / n exactly."""
    n, right = 400, 300
    metric = cluster_metric([1.0] * right + [0.0] * (n - right), [f"p{i}" for i in range(n)])
    assert metric.value == 0.75 and metric.n == n and metric.pictures == n
    assert metric.low is not None and metric.high is not None
    # 2,000 resamples put the quantile's own level within 0.025 +- 0.0175 (5 standard errors): false alarm < 1e-6
    for limit, level in ((metric.low, 0.025), (metric.high, 0.975)):
        assert binom.ppf(level - 0.0175, n, 0.75) <= limit * n <= binom.ppf(level + 0.0175, n, 0.75)


def test_copies_of_a_question_do_not_narrow_the_interval() -> None:
    generator = np.random.default_rng(1)
    right = generator.integers(0, 2, 120).astype(float)
    single = cluster_metric(right, [f"p{i}" for i in range(120)])
    copied = cluster_metric(np.repeat(right, 5), [f"p{i}" for i in range(120) for _ in range(5)])
    assert (copied.value, copied.low, copied.high) == pytest.approx((single.value, single.low, single.high), abs=1e-12)
    naive = cluster_metric(np.repeat(right, 5), [f"q{i}" for i in range(600)])
    assert naive.high is not None and naive.low is not None and copied.high is not None and copied.low is not None
    assert (copied.high - copied.low) > 1.8 * (naive.high - naive.low)  # sqrt(5) = 2.24 in expectation


def test_coverage_under_strong_dependence_within_pictures() -> None:
    """120 pictures with 5 questions, success rates drawn per picture: at least 90 % of nominal 95 % intervals cover."""
    generator = np.random.default_rng(5)
    trials, covered = 300, 0
    clusters = [f"p{i}" for i in range(120) for _ in range(5)]
    for trial in range(trials):
        rates = generator.beta(0.7, 0.3, 120)  # mean 0.7
        right = (generator.random((120, 5)) < rates[:, None]).astype(float).ravel()
        metric = cluster_metric(right, clusters, seed=trial)
        assert metric.low is not None and metric.high is not None
        covered += metric.low <= 0.7 <= metric.high
    # P(Binomial(300, 0.945) < 262) < 1e-6; intervals that ignored clusters would cover about two thirds
    assert covered >= 262


def test_all_right_and_all_wrong_have_exact_limits() -> None:
    clusters = [f"p{i // 2}" for i in range(80)]
    right, wrong = cluster_metric(np.ones(80), clusters), cluster_metric(np.zeros(80), clusters)
    assert right.high == 1.0 and right.low == pytest.approx(beta.ppf(0.025, 40, 1)) == pytest.approx(0.025 ** (1 / 40))
    assert wrong.low == 0.0 and wrong.high == pytest.approx(1 - 0.025 ** (1 / 40))


def test_one_cluster_has_no_interval_and_bad_shapes_are_errors() -> None:
    metric = cluster_metric([1.0, 0.0], ["p", "p"])
    assert metric.value == 0.5 and metric.low is None and metric.high is None and metric.pictures == 1
    with pytest.raises(ValueError, match="0 questions"):
        cluster_metric([], [])
    with pytest.raises(ValueError, match="2 questions"):
        cluster_metric([1.0], ["p", "q"])


def test_kinds_add_up() -> None:
    kinds = ["b", "a", "a", "b", "b"]
    metrics = by_kind([1.0, 0.0, 1.0, 1.0, 0.0], kinds, ["p", "p", "q", "q", "r"])
    assert list(metrics) == ["exact_match", "exact_match/a", "exact_match/b"]
    parts = [metrics["exact_match/a"], metrics["exact_match/b"]]
    assert sum(part.n for part in parts) == metrics["exact_match"].n == 5
    assert sum(part.n * part.value for part in parts) == pytest.approx(5 * metrics["exact_match"].value)


def test_commonest_answers_and_their_score() -> None:
    pairs = [("k", "Yes"), ("k", "yes "), ("k", "no"), ("m", "b"), ("m", "a")]
    assert commonest(pairs) == {"k": "yes", "m": "a"}
    assert constant_answers(["YES", "no", "a"], ["k", "k", "x"], commonest(pairs)) == [1.0, 0.0, 0.0]
