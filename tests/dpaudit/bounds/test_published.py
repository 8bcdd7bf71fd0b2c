"""Values that papers, other programs or closed forms give: references/auditing.md 2 and 7, to 4 decimals."""

import math

import pytest
from scipy.stats import norm

from dpaudit.bounds import bayes, clopper_pearson, dp_sgd, gdp, mahloujifar, order_statistic
from dpaudit.bounds.clopper_pearson import Counts

# canaries, guesses, errors, eps at delta 1e-5 with 95 % (Xiang et al. 2025, Gaussian)
ORDERED = [
    (1000, 100, 26, 1.1926),
    (1000, 1000, 401, 1.4140),
    (1000, 250, 36, 3.6327),
    (1000, 500, 103, 3.7557),
    (10000, 2500, 364, 4.1371),
    (10000, 5000, 202, 9.6526),
    (1000, 1000, 159, 9.0038),
]
# (Xiang et al. 2025, sub-sampled Gaussian, one step): + sample rate
SAMPLED = [(1000, 500, 176, 0.5, 2.2774), (10000, 2500, 870, 0.2, 6.1668)]
# mu: eps at delta 1e-6, 1e-5, 1e-3
CONVERSIONS = {
    0.1: (0.3969, 0.3407, 0.1975),
    0.25: (1.0607, 0.9263, 0.5920),
    0.5: (2.2541, 1.9931, 1.3523),
    1.0: (4.8866, 4.3772, 3.1387),
    1.5: (7.8066, 7.0514, 5.2227),
    2.0: (10.9972, 9.9973, 7.5813),
    3.0: (18.1634, 16.6755, 13.0882),
    4.0: (26.3570, 24.3816, 19.6241),
    6.0: (45.7859, 42.8360, 35.7377),
}
# counts, delta: Bayes, Clopper-Pearson at 95 %
RUNS = [
    (Counts(500, 0, 0, 500), 6.513, 4.906),
    (Counts(450, 50, 50, 450), 2.0726, 1.9035),
    (Counts(100, 900, 1, 999), 3.2326, 2.6925),
    (Counts(20, 980, 0, 1000), 2.3087, 1.2019),
]


@pytest.mark.parametrize(("n", "r", "u", "value"), ORDERED)
def test_order_statistic(n: int, r: int, u: int, value: float) -> None:
    got = order_statistic.epsilon_lower(canaries=n, guesses=r, errors=u, delta=1e-5, confidence=0.95)
    assert got == pytest.approx(value, abs=6e-5)


@pytest.mark.parametrize(("n", "r", "u", "q", "value"), SAMPLED)
def test_order_statistic_sampled(n: int, r: int, u: int, q: float, value: float) -> None:
    got = dp_sgd.epsilon_lower(q, 1, dp_sgd.Ordered(n, r, u), delta=1e-5, confidence=0.95)
    assert got == pytest.approx(value, abs=6e-5)


@pytest.mark.parametrize("mu", CONVERSIONS)
def test_gaussian_conversion(mu: float) -> None:
    for delta, value in zip((1e-6, 1e-5, 1e-3), CONVERSIONS[mu], strict=True):
        eps = gdp.epsilon_from_mu(mu, delta)
        assert eps == pytest.approx(value, abs=6e-5)
        closed = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
        assert closed == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(("counts", "credible", "exact"), RUNS)
def test_independent_runs(counts: Counts, credible: float, exact: float) -> None:
    assert bayes.epsilon_lower(counts, delta=1e-5, confidence=0.95) == pytest.approx(credible, abs=2e-3)
    assert clopper_pearson.epsilon_lower(counts, delta=1e-5, confidence=0.95) == pytest.approx(exact, abs=2e-3)


def test_perfect_runs() -> None:
    perfect = Counts(500, 0, 0, 500)
    assert clopper_pearson.ceiling(perfect, delta=0.0, confidence=0.95) == pytest.approx(4.906, abs=6e-4)
    assert clopper_pearson.ceiling(Counts(1, 99, 99, 1), delta=0.0, confidence=0.95) == pytest.approx(3.281, abs=6e-4)
    assert gdp.mu_lower(perfect, confidence=0.95) == pytest.approx(4.879, abs=6e-4)
    assert gdp.epsilon_lower(perfect, delta=1e-5, confidence=0.95) == pytest.approx(32.0, abs=0.01)
    # At the null the posterior is two-sided: a tiny positive value, not 0.
    null = bayes.epsilon_lower(Counts(250, 250, 250, 250), delta=1e-5, confidence=0.95)
    assert null == pytest.approx(0.004, abs=5e-4)


def test_f_dp_recursion() -> None:
    got = mahloujifar.epsilon_lower(canaries=1000, guesses=200, correct=190, delta=1e-5, confidence=0.95)
    assert got == pytest.approx(3.9161, abs=6e-5)


def test_family_bound_on_a_stranger_is_above_the_truth() -> None:
    """Randomised response with eps 1 (delta 0) read as a Gaussian: why the output must say `assumes: gaussian`."""
    share = 1 / (1 + math.e)
    counts = Counts(round(10000 * (1 - share)), round(10000 * share), round(10000 * share), round(10000 * (1 - share)))
    assert gdp.epsilon_lower(counts, delta=1e-5, confidence=0.95) > 4.0
    assert clopper_pearson.epsilon_lower(counts, delta=1e-5, confidence=0.95) < 1.0
