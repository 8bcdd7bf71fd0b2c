"""The blind baseline: can someone who sees the records but never the model tell members from non-members?

If so, membership was not decided by fair coins alone, every membership score may be measuring that difference, and the
game is invalid. With fair coins nobody can: given the number of heads in each kind of record, all arrangements of the
coins are equally likely whatever the features. The test draws such arrangements and compares one statistic of the
coins with that of the arrangements, so its level is exact at every sample size. The statistic is the best of three,
with fixed shares of the level; all three see within-kind ranks, so an outlier counts no more than any largest value:

- one column: the largest Mann-Whitney deviation of a column (van Elteren 1960 with several kinds);
- all columns: the quadratic form of a ridge classifier, which adds up small shifts of many columns;
- interactions: the largest deviation of a product of two columns, or of a square, among few columns.

The shares steer power only. The tails that put the three on one scale are approximate; the arrangements make the
combination exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, log_ndtr, ndtri, ndtri_exp

from dpaudit.bounds.ranks import mid_ranks
from dpaudit.bounds.roc import auc_interval
from dpaudit.bounds.roots import largest_below
from dpaudit.documents import Check

LEVEL = 0.001  # a guard, one-sided, outside the error budget of the bounds
LEAST = 20  # records
MOST = 20_000  # records; a random part of more is enough for a guard
ARRANGEMENTS = 9999  # with the coins themselves 10,000, so the level is one of the p-values
ENOUGH = 50  # arrangements at least as good as the coins, after which p is known well enough (Besag and Clifford 1991)
SHARES = {"one column": 0.85, "all columns": 0.10, "interactions": 0.05}
RIDGE = 0.1  # added to the diagonal of the columns' correlations, besides columns / records
CROSSED = 20  # columns, or principal components where there are more, whose products are looked at
POWER = 0.8
PLANTED = 200  # columns with a planted shift: the control of the stated power
# Fewer planted shifts found than this happen with probability below 1e-6 if the power is 0.8.
FEWEST_FOUND = 131
_BATCH = 512
_TIE = 1e-3  # in log p: single precision must not separate equal arrangements

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Groups = list[npt.NDArray[np.intp]]


@dataclass(frozen=True)
class Blind:
    """What the test found, and what it could have found.

    auc: of the ridge classifier, every record predicted without its own coin, with a descriptive interval. strongest:
    largest AUC of a column, in either direction. p_value: one-sided for "better than chance", by arrangements. least:
    smallest AUC of one column without ties that is found with probability 0.8, None where not even 1 is, or where the
    control failed. found: of PLANTED columns with a shift of that AUC, those found.
    """

    auc: float
    low: float
    high: float
    strongest: float
    p_value: float
    n: int
    columns: int
    least: float | None
    found: int

    @property
    def beats_chance(self) -> bool:
        return self.p_value <= LEVEL

    def check(self) -> Check:
        """The entry of the audit's validity: a test that could not have failed is not applicable."""
        able = self.least is not None
        if self.beats_chance:
            why = "A classifier that never saw the model tells members from others: fair coins alone did not decide."
        elif able:
            why = "A classifier that never saw the model is no better than chance, as it must be with fair coins."
        else:
            why = (
                "There are too few records for so many columns to find a shift of one column, so passing means nothing."
            )
        return Check(
            name="blind baseline",
            status="fail" if self.beats_chance else "pass" if able else "not applicable",
            measured=f"AUC {self.auc:.3f} ({self.low:.3f} to {self.high:.3f}) from all columns, {self.strongest:.3f} "
            f"from the strongest, p = {self.p_value:.2g}; n = {self.n}, {self.columns} columns; {self.sees()}",
            allowed=f"p > {LEVEL:g} one-sided for better than chance",
            explanation=why,
        )

    def sees(self) -> str:
        """What the test could have seen, with the control that shows it."""
        if self.least is None:
            return "no shift in one column is found with 80 % power"
        return (
            f"finds AUC {self.least:.3f} in one column with 80 % power (control: {self.found} of {PLANTED} planted "
            "shifts of that size found)"
        )


def baseline(
    features: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    rng: np.random.Generator,
    kinds: npt.ArrayLike | None = None,
) -> Blind:
    """features: (n, columns), finite; members: (n,) booleans; kinds: (n,), one coin rate a kind. Needs both classes."""
    rows, labels = np.asarray(features, dtype=np.float64), np.asarray(members, dtype=bool)
    kind = (
        np.zeros(labels.size, dtype=np.intp) if kinds is None else np.unique(np.asarray(kinds), return_inverse=True)[1]
    )
    chosen = rng.permutation(labels.size)[:MOST]
    rows, labels, kind = rows[chosen], labels[chosen], kind[chosen]
    groups = [mine for k in np.unique(kind) if 0 < labels[mine := np.flatnonzero(kind == k)].sum() < mine.size]
    columns = _ranked(rows, groups)
    if not groups or not columns.shape[1]:
        return Blind(0.5, 0.5, 0.5, 0.5, 1.0, labels.size, columns.shape[1], None, 0)
    variance = _coin_variance(labels, groups)
    statistic = _Statistic.of(columns, variance, groups)
    p_value = _p_value(statistic, labels, groups, rng)
    coins = _centred(labels, groups)
    strongest = float(np.abs(columns.T @ coins).max()) / _pairs(labels, groups)
    auc = statistic.auc_without_own_coin(coins, labels)
    low, high = auc_interval(auc, int(labels.sum()), int((~labels).sum()))
    least, found = _sensitivity(labels, groups, columns.shape[1], rng)
    return Blind(auc, low, high, 0.5 + strongest, p_value, labels.size, columns.shape[1], least, found)


def _ranked(rows: Floats, groups: Groups) -> Singles:
    """(n, columns that vary) mid-ranks within each group over its size + 1, centred; zero outside of the groups."""
    out = np.zeros(rows.shape, dtype=np.float32)
    for mine in groups:
        out[mine] = (mid_ranks(rows[mine]) - (mine.size + 1) / 2) / (mine.size + 1)
    return out[:, np.abs(out).max(axis=0, initial=0.0) > 0]


def _centred(labels: npt.NDArray[np.bool_], groups: Groups) -> Singles:
    """labels (n,) minus the share of heads of each group; zero outside of the groups."""
    out = np.zeros(labels.size, dtype=np.float32)
    for mine in groups:
        out[mine] = labels[mine] - labels[mine].mean()
    return out


def _coin_variance(labels: npt.NDArray[np.bool_], groups: Groups) -> Singles:
    """(n,) weight v such that sum v x^2 is the variance of sum coin x over arrangements, x centred in every group."""
    out = np.zeros(labels.size, dtype=np.float32)
    for mine in groups:
        share = labels[mine].mean()
        out[mine] = share * (1 - share) * mine.size / (mine.size - 1)
    return out


def _pairs(labels: npt.NDArray[np.bool_], groups: Groups) -> float:
    """Sum over groups of n_in n_out / (n + 1): what a column's deviation is divided by to be an AUC minus 1/2."""
    heads = np.array([labels[mine].sum() for mine in groups], dtype=np.float64)
    sizes = np.array([mine.size for mine in groups], dtype=np.float64)
    return float((heads * (sizes - heads) / (sizes + 1)).sum())


@dataclass(frozen=True)
class _Statistic:
    """Coins (arrangements, n) to the largest of log(share / p) of the three parts.

    columns, crossed: (n, k), of unit variance over arrangements. root: (columns, columns), inverse of the Cholesky
    factor of correlations + ridge. scale, freedom: of the chi-square with the quadratic form's mean and variance.
    """

    columns: Singles
    crossed: Singles
    root: Singles
    scale: float
    freedom: float

    @classmethod
    def of(cls, columns: Singles, variance: Singles, groups: Groups) -> "_Statistic":
        unit = _unit(columns, variance)
        weighted = unit * np.sqrt(variance)[:, None]
        width = unit.shape[1]
        ridge = RIDGE + width / len(columns)
        correlations = (weighted.T @ weighted).astype(np.float64)
        factor = np.linalg.cholesky(correlations + ridge * np.eye(width))
        root = np.linalg.inv(factor)
        trace, squares = float((root**2).sum()), float(((root.T @ root) ** 2).sum())
        mean, half_variance = width - ridge * trace, width - 2 * ridge * trace + ridge**2 * squares
        crossed = _unit(_crossed(unit, weighted, groups), variance)
        return cls(unit, crossed, root.astype(np.float32), half_variance / mean, mean**2 / half_variance)

    def __call__(self, coins: Singles) -> Floats:
        shifts = coins @ self.columns
        form = ((shifts @ self.root.T) ** 2).sum(axis=1, dtype=np.float64)
        parts = {
            "one column": _log_largest(shifts),
            "all columns": _log(chdtrc(self.freedom, form / self.scale)),
            "interactions": _log_largest(coins @ self.crossed),
        }
        best: Floats = np.max([np.log(SHARES[name]) - part for name, part in parts.items()], axis=0)
        return best

    def auc_without_own_coin(self, coins: Singles, labels: npt.NDArray[np.bool_]) -> float:
        """AUC of the ridge classifier's predictions, each from the coins of all other records."""
        mapped = self.columns @ self.root.T
        predictions = mapped @ (coins @ mapped) - (mapped**2).sum(axis=1) * coins
        heads = int(labels.sum())
        above = mid_ranks(predictions)[labels].sum() - heads * (heads + 1) / 2
        return float(above / (heads * (labels.size - heads)))


def _log(p: Floats) -> Floats:
    """Logarithm; -inf of a p-value that underflows."""
    with np.errstate(divide="ignore"):
        found: Floats = np.log(p)
    return found


def _unit(columns: Singles, variance: Singles) -> Singles:
    spread = np.sqrt(variance @ columns**2)
    kept = spread > 1e-6 * spread.max(initial=0.0)
    scaled: Singles = columns[:, kept] / spread[kept]
    return scaled


def _log_largest(shifts: Singles) -> Floats:
    """Logarithm of the Bonferroni p-value of the largest of (arrangements, k) deviations; 0 where there are none."""
    count = shifts.shape[1]
    if not count:
        return np.zeros(len(shifts))
    logs: Floats = np.log(2 * count) + log_ndtr(-np.abs(shifts).max(axis=1).astype(np.float64))
    return logs


def _crossed(unit: Singles, weighted: Singles, groups: Groups) -> Singles:
    """(n, pairs) products of two columns and squares, centred in every group."""
    base = unit if unit.shape[1] <= CROSSED else _ranked(_components(unit, weighted).astype(np.float64), groups)
    base = base / np.abs(base).max(axis=0)
    one, two = np.triu_indices(base.shape[1])
    products: Singles = base[:, one] * base[:, two]
    for mine in groups:
        products[mine] -= products[mine].mean(axis=0)
    return products


def _components(unit: Singles, weighted: Singles) -> Singles:
    """(n, CROSSED) leading principal components, by subspace iteration from a fixed start."""
    basis = np.random.default_rng(0).normal(size=(unit.shape[1], CROSSED)).astype(np.float32)
    for _ in range(4):
        basis = np.linalg.qr(weighted.T @ (weighted @ basis))[0]
    scores: Singles = unit @ basis
    return scores


def _p_value(
    statistic: Callable[[Singles], Floats], labels: npt.NDArray[np.bool_], groups: Groups, rng: np.random.Generator
) -> float:
    """Sequential Monte Carlo p-value: exact whatever the statistic, and cheap where the coins are unremarkable.

    Besag and Clifford 1991: draws until ENOUGH arrangements are at least as good, then p = ENOUGH / draws; otherwise
    (1 + as good) / (1 + ARRANGEMENTS).
    """
    observed = float(statistic(labels[None].astype(np.float32))[0]) - _TIE
    drawn = good = 0
    while drawn < ARRANGEMENTS:
        batch = min(_BATCH if drawn else ENOUGH * 2, ARRANGEMENTS - drawn)
        hits = good + np.cumsum(statistic(_arrangements(batch, labels, groups, rng)) >= observed)
        if hits[-1] >= ENOUGH:
            return ENOUGH / (drawn + 1 + int(np.searchsorted(hits, ENOUGH)))
        drawn, good = drawn + batch, int(hits[-1])
    return (1 + good) / (1 + ARRANGEMENTS)


def _arrangements(count: int, labels: npt.NDArray[np.bool_], groups: Groups, rng: np.random.Generator) -> Singles:
    """(count, n) zeros and ones: the heads of each group at places drawn without replacement, by random sort keys.

    Equal keys (32 bits) fall to a place in the order of the records, which `baseline` has drawn at random.
    """
    out = np.zeros((count, labels.size), dtype=np.float32)
    for mine in groups:
        heads = int(labels[mine].sum())
        keys = rng.integers(0, 2**32, size=(count, mine.size), dtype=np.uint32)
        out[np.arange(count)[:, None], mine[np.argpartition(keys, heads, axis=1)[:, :heads]]] = 1.0
    return out


def critical_deviation(columns: int, n_in: int, n_out: int) -> float:
    """Standardised Mann-Whitney deviation that one column out of so many needs (Bonferroni, two directions).

    Quantile of the normal law with the Cornish-Fisher term of the statistic's kurtosis, which matters for few records.
    """
    z = -float(ndtri_exp(math.log(SHARES["one column"] * LEVEL / (2 * columns))))
    kurtosis: float = -1.2 * (n_in**2 + n_out**2 + n_in * n_out + n_in + n_out) / (n_in * n_out * (n_in + n_out + 1))
    return z + kurtosis * (z**3 - 3 * z) / 24


def least_auc(columns: int, n_in: int, n_out: int, pairs: float | None = None) -> float | None:
    """Smallest AUC of one column without ties that the test finds with probability 0.8; None where not even 1 is.

    pairs: sum of n_in n_out / (n + 1) over kinds (one kind by default). The variance at an AUC other than 1/2 is
    Hanley and McNeil's (1982).
    """
    total = n_in * n_out / (n_in + n_out + 1) if pairs is None else pairs
    null = 1 / math.sqrt(12 * total)
    critical = critical_deviation(columns, n_in, n_out)
    size = 0.5 * (n_in + n_out) - 1.0

    def spread(a: float) -> float:
        at = a * (1 - a) * (1 + size * (1 - a) / (2 - a) + size * a / (1 + a))
        return null * math.sqrt(at / (0.25 * (1 + 2 * size / 3)))

    def surplus(a: float) -> float:
        return a - 0.5 - critical * null - float(ndtri(POWER)) * spread(a)

    if surplus(1.0) <= 0:
        return None
    return 0.5 + largest_below(lambda above: surplus(0.5 + above), 0.0, start=0.5, most=0.5)


def _sensitivity(
    labels: npt.NDArray[np.bool_], groups: Groups, columns: int, rng: np.random.Generator
) -> tuple[float | None, int]:
    """The smallest AUC found with 80 % power, and its control: planted normal shifts of it, under the game's own coins.

    None where the formula gives none or the control contradicts it.
    """
    inside = int(sum(labels[mine].sum() for mine in groups))
    size = sum(mine.size for mine in groups)
    pairs = _pairs(labels, groups)
    least = least_auc(columns, inside, size - inside, pairs)
    if least is None:
        return None, 0
    shift = np.sqrt(2) * float(ndtri(min(least, 1 - 1e-9)))
    planted = rng.normal(size=(labels.size, PLANTED)) + shift * labels[:, None]
    coins = _centred(labels, groups)
    deviations = (coins @ _ranked(planted, groups)) * math.sqrt(12 / pairs)
    found = int((deviations >= critical_deviation(columns, inside, size - inside)).sum())
    return (least if found >= FEWEST_FOUND else None), found
