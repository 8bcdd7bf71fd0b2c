"""Guesses by rank: counts, ties, invariances."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpaudit.bounds.guesses import count_correct, distance_guesses, rank_guesses
from dpaudit.errors import UsageError


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.data(), st.integers(0, 2**32))
def test_numbers_and_order(values: list[int], data: st.DataObject, seed: int) -> None:
    scores = np.array(values, float)
    top = data.draw(st.integers(0, scores.size))
    bottom = data.draw(st.integers(0, scores.size - top))
    guesses = rank_guesses(scores, top, bottom, rng=np.random.default_rng(seed))
    assert guesses.dtype == np.int8
    assert (guesses == 1).sum() == top and (guesses == -1).sum() == bottom
    if top and top < scores.size:
        assert scores[guesses == 1].min() >= scores[guesses != 1].max()
    if bottom and bottom < scores.size:
        assert scores[guesses == -1].max() <= scores[guesses != -1].min()
    # A strictly increasing transformation and the same generator give the same guesses.
    again = rank_guesses(np.exp(scores) * 3 - 7, top, bottom, rng=np.random.default_rng(seed))
    assert np.array_equal(guesses, again)


def test_ties_do_not_follow_the_file() -> None:
    """All scores tied, members first in the file: correct guesses must be hypergeometric-like, not all."""
    members = np.arange(1000) < 500
    rng = np.random.default_rng(5)
    right = [count_correct(rank_guesses(np.zeros(1000), 100, 100, rng=rng), members) for _ in range(200)]
    # Each audit: mean 100, sd below 7.1; the mean of 200 audits leaves 100 +- 3 with probability < 1e-8.
    assert abs(np.mean(right) - 100) < 3
    assert max(right) < 150


def test_distance_from_a_centre() -> None:
    scores = np.array([-3.0, -1.0, 0.5, 2.0, 10.0])
    guesses = distance_guesses(scores, 0.0, 3, rng=np.random.default_rng(0))
    assert guesses.tolist() == [-1, 0, 0, 1, 1]
    tied = distance_guesses(np.zeros(4000), 0.0, 4000, rng=np.random.default_rng(1))
    assert abs(int(tied.sum())) < 320  # five sd of a fair coin


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([np.inf]), np.array([]), np.zeros((2, 2))])
def test_bad_scores(bad: npt.NDArray[np.float64]) -> None:
    with pytest.raises(UsageError, match="scores"):
        rank_guesses(bad, 0, 0, rng=np.random.default_rng(0))


def test_bad_counts_and_members() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="bottom"):
        rank_guesses(np.arange(5.0), 3, 3, rng=rng)
    with pytest.raises(UsageError, match="members"):
        count_correct(np.array([1, -1]), np.array([True]))
    with pytest.raises(UsageError, match="members"):
        count_correct(np.array([1, -1]), np.array([2, 0]))
