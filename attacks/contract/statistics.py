"""The tests behind the statistical checks. Each p-value is exact, or an upper bound with a proof.

A check that makes k tests compares the smallest p with ALPHA / k (Bonferroni), so that it alarms on correct code with
probability at most ALPHA = 1e-7, an order below the promised 1e-6.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, logsumexp
from scipy.stats import binom, chi2, gamma, kstest, norm, t

Vector = npt.NDArray[np.float64]

ALPHA = 1e-7


def two_sided(below: float, above: float) -> float:
    """p-value from both tails of a continuous law."""
    return min(1.0, 2.0 * min(below, above))


def variance_p(squares: float, freedom: int) -> float:
    """p of a sum of squares of `freedom` independent standard normals (chi-square, exact)."""
    return two_sided(float(chi2.cdf(squares, freedom)), float(chi2.sf(squares, freedom)))


def std_interval(squares: float, freedom: int, alpha: float) -> tuple[float, float]:
    """Exact interval for (true std / claimed std) from a sum of squares in claimed units."""
    high = squares / max(float(chi2.ppf(alpha / 2, freedom)), 1e-300)
    return math.sqrt(squares / float(chi2.isf(alpha / 2, freedom))), math.sqrt(high)


def laplace_scale_p(total: float, count: int) -> float:
    """p of a sum of |x| / scale over `count` independent Laplace values (Gamma(count), exact)."""
    return two_sided(float(gamma.cdf(total, count)), float(gamma.sf(total, count)))


def laplace_interval(total: float, count: int, alpha: float) -> tuple[float, float]:
    """Exact interval for (true scale / claimed scale)."""
    low = total / float(gamma.isf(alpha / 2, count))
    return low, total / max(float(gamma.ppf(alpha / 2, count)), 1e-300)


NEAR = 2.0**-8  # of the largest value: what bfloat16 can tell apart; equal numbers stay equal, neighbours may not
ON_A_GRID, GRID_NEEDS = 1000, 2000  # fewer distinct values than this among so many: a grid coarser than bfloat16's


def law_p(values: Vector, law: str, *, body: Vector | None = None) -> tuple[float, str]:
    """(p, by which test) of independent values against the standard 'norm' or 'laplace'.

    Kolmogorov-Smirnov (exact for a continuous law) sees the body. It hardly sees noise that was clamped, so the largest
    absolute value M of n is judged too: P[M <= m] = F(m)^n exactly; and, given M, the others that lie within NEAR of it
    are binomial. Noise on a grid is told by its few distinct values. The smallest of three p-values, times 3.
    body: those of the values that the first and the last test look at, where there are very many; None = all.
    """
    size = np.abs(values)
    largest, count = float(size.max()), size.size
    above, near = _beyond(largest, law), _beyond(largest * (1 - NEAR), law)
    ties = int(np.count_nonzero(size >= largest * (1 - NEAR))) - 1
    tied = float(binom.sf(ties - 1, count - 1, (near - above) / (1 - above))) if ties and above < 1 else 1.0
    cut = count * math.log1p(-above) if above < 1 else -math.inf
    body = values if body is None else body
    tests = {
        "Kolmogorov-Smirnov": float(kstest(body, law).pvalue),
        f"none of {count} values above {largest:.3g} standard deviations": math.exp(cut),
        f"{ties + 1} values at the largest, {largest:.3g}": tied,
    }
    distinct = np.unique(np.round(body, 4)).size
    if body.size >= GRID_NEEDS and distinct < min(ON_A_GRID, body.size / 8):
        tests[f"{distinct} distinct values among {body.size}"] = 0.0
    which = min(tests, key=lambda name: tests[name])
    return min(1.0, 3 * tests[which]), which


def _beyond(size: float, law: str) -> float:
    """P[|X| > size]."""
    return 2 * float(norm.sf(size)) if law == "norm" else math.exp(-size)


EQUAL = 5e-7  # relative: what rounding in float32 does to equal numbers
MOST_EQUAL_AMONG = 20_000


def repeats_p(values: Vector) -> tuple[float, int]:
    """(p, K) of K absolute values that equal another one, among independent normal or Laplace numbers.

    Sorted by size, K neighbours lie within EQUAL of each other. They are edges of a forest over the numbers: given all
    numbers but its own, each edge has a chance of at most 2 EQUAL sup x f(x) <= 0.97 EQUAL (f: density of |X|). So
    P[K >= k] <= C(M, k) (0.97 EQUAL)^k <= (0.97 EQUAL M)^k / k!, with M pairs of numbers. Zeros are left out.
    """
    size = np.sort(np.abs(values[values != 0]))
    found = int(np.count_nonzero(np.diff(size) <= EQUAL * size[1:]))
    expected = 0.97 * EQUAL * size.size * (size.size - 1) / 2
    if found <= expected:
        return 1.0, found
    return min(1.0, math.exp(found * math.log(expected) - float(gammaln(found + 1)))), found


def correlation(x: Vector, y: Vector) -> tuple[float, float]:
    """(r, p) about zero of paired values, exact for independent normals: r sqrt((n-2)/(1-r^2)) ~ t(n-2).

    About zero, i.e. without subtracting means: x is held fixed and y is isotropic, which needs no more. Coordinates
    without noise in one of the two (a block that was not chosen) are zeros: they say nothing and are left out.
    """
    both = (x != 0) & (y != 0)
    x, y = x[both], y[both]
    n = x.size
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    if n < 3 or scale == 0:
        return 0.0, 1.0
    r = float(np.clip(x @ y / scale, -1.0, 1.0))
    # y isotropic in n dimensions: its angle with the fixed x has r sqrt((n-1)/(1-r^2)) ~ t(n-1).
    if abs(r) >= 1.0 - 1e-12:
        return r, 0.0
    return r, float(2 * t.sf(abs(r) * math.sqrt((n - 1) / (1 - r * r)), n - 1))


def symmetric_correlation(x: Vector, y: Vector) -> tuple[float, float]:
    """The same for independent symmetric values of any law: given sizes the signs are fair coins (Hoeffding bound)."""
    r, _ = correlation(x, y)
    products = x * y
    spread = float((products**2).sum())
    return r, min(1.0, 2 * math.exp(-(float(products.sum()) ** 2) / (2 * spread))) if spread > 0 else 1.0


FEWEST = 3  # values of a correlation


def most_correlated(rows: Vector, *, symmetric: bool) -> tuple[float, float, tuple[int, int], int]:
    """(r, p corrected for the number of pairs, which two, pairs) of the most correlated pair of rows.

    Rows (k, n) of independent normals; `symmetric`: of any symmetric law. Zeros are left out of a pair (`correlation`).
    """
    count = len(rows)
    pairs = count * (count - 1) // 2
    if (rows == 0).any():
        test = symmetric_correlation if symmetric else correlation
        found = [(*test(rows[a], rows[b]), (a, b)) for b in range(count) for a in range(b)]
        r, p, where = min(found, key=lambda item: item[1])
        return r, min(1.0, p * pairs), where, pairs
    products = rows @ rows.T
    spread = (rows**2) @ (rows**2).T if symmetric else np.outer(np.diag(products), np.diag(products))
    upper = np.triu_indices(count, 1)
    place = int(np.argmax(products[upper] ** 2 / spread[upper]))
    a, b = int(upper[0][place]), int(upper[1][place])
    r, p = (symmetric_correlation if symmetric else correlation)(rows[a], rows[b])
    return r, min(1.0, p * pairs), (a, b), pairs


def count_p(count: int, trials: int, rate: float) -> float:
    """Two-sided p of a binomial count (twice the smaller tail, at most 1): valid, a little conservative."""
    return min(1.0, 2 * min(float(binom.cdf(count, trials, rate)), float(binom.sf(count - 1, trials, rate))))


def spread_p(sizes: Vector, units: int, rate: float) -> float:
    """Upper bound on the p-value of sum (size - n q)^2 over independent Binomial(n, q) batch sizes, both tails.

    Chernoff: P[S <= s] <= inf_l exp(l s) E[exp(-l X)]^k with X = (B - n q)^2, its transform computed exactly from the
    binomial law. Valid for every number of draws; no normal approximation.
    """
    support = np.arange(units + 1)
    log_mass = binom.logpmf(support, units, rate)
    squares = (support - units * rate) ** 2
    observed = float(((sizes - units * rate) ** 2).sum())

    def log_bound(log_l: float, sign: float) -> float:
        tilt = sign * math.exp(log_l)
        return -tilt * observed + sizes.size * float(logsumexp(log_mass + tilt * squares))

    variance = max(units * rate * (1 - rate), 1e-12)
    tails = []
    for sign in (-1.0, 1.0):
        centre = -math.log(variance)
        found = minimize_scalar(log_bound, bounds=(centre - 12, centre + 6), args=(sign,), method="bounded")
        tails.append(min(0.0, float(found.fun)))
    return min(1.0, 2.0 * math.exp(min(tails)))


def extremes_p(sizes: Vector, units: int, rate: float) -> float:
    """Exact p-value (by Bonferroni's inequality over four tails) of the largest and the smallest of independent
    Binomial(n, q) batch sizes: a cap, or batches that are never empty."""
    largest, smallest, draws = int(sizes.max()), int(sizes.min()), sizes.size
    tails = (
        draws * float(binom.logcdf(largest, units, rate)),
        math.log(max(5e-324, -math.expm1(draws * float(binom.logcdf(largest - 1, units, rate))))),
        draws * float(binom.logsf(smallest - 1, units, rate)),
        math.log(max(5e-324, -math.expm1(draws * float(binom.logsf(smallest, units, rate))))),
    )
    return min(1.0, 4.0 * math.exp(min(tails)))


def gaussian_leak(hits_in: int, hits_out: int, runs: int, alpha: float) -> float:
    """Lower bound on mu from an event seen `hits_in` of `runs` times with a unit and `hits_out` without (GDP).

    Any event of a mu-GDP release satisfies Phi^-1(P_in) - Phi^-1(P_out) <= mu; both probabilities are bounded by
    Clopper-Pearson at alpha / 2 each (Nasr et al. 2023).
    """
    from scipy.special import ndtri
    from scipy.stats import beta

    low = 0.0 if hits_in == 0 else float(beta.ppf(alpha / 2, hits_in, runs - hits_in + 1))
    high = 1.0 if hits_out == runs else float(beta.isf(alpha / 2, hits_out + 1, runs - hits_out))
    return max(0.0, float(ndtri(low) - ndtri(high))) if low > 0 and high < 1 else 0.0
