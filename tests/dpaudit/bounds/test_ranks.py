"""Mid-ranks against scipy's, and what is imported for them."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import rankdata

from dpaudit.bounds.ranks import mid_ranks

NUMBERS = st.floats(allow_nan=False, width=32) | st.integers(-3, 3).map(float)  # with ties


@given(arrays.arrays(np.float64, st.integers(1, 30), elements=NUMBERS))
def test_ranks_of_a_vector_are_scipys(values: np.ndarray) -> None:
    assert np.array_equal(mid_ranks(values), rankdata(values))


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(0, 4)), elements=NUMBERS))
def test_ranks_of_columns_are_scipys(values: np.ndarray) -> None:
    expected = np.empty(values.shape)
    for column in range(values.shape[1]):
        expected[:, column] = rankdata(values[:, column])
    assert np.array_equal(mid_ranks(values), expected)


def test_scores_without_a_claim_load_neither_scipy_stats_nor_the_accountant() -> None:
    """Each of them takes longer to import than a file of scores takes to be read and bounded."""
    code = "import sys, dpaudit.analysis.scores; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"scipy.stats", "scipy.optimize", "dpaudit.accounting", "dp_accounting"} & set(done.stdout.split())
