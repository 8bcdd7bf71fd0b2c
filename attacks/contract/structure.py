"""Structure that correlations of pairs can't see: subspaces, missing directions, sums, norms, windows of steps, ties.

Each test is a sum of squares that is chi-square with a known number of degrees of freedom under the claim, so they are
judged like a level. Directions are predicted from one half of the noise and tested on the other half, which is
independent of it; blocks that were not noised in some step are left out, since what is noised may follow earlier noise.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import chdtr, chdtrc, gammainc, gammaincc, gammaln, ndtri
from scipy.stats import kstest

from attacks.contract import statistics as stats
from attacks.contract.probe import Vector

Squares = dict[str, tuple[float, int]]  # label -> sum of squares of standard normals, degrees of freedom

MOST_DIRECTIONS = 256  # dimensions of which all directions are ranked; of more, those of the first half are taken
MOST_VALUES = 4_000_000  # of a table that is split into halves
LEAST_ROWS = 6


def worst_of(squares: Squares) -> tuple[float, str]:
    """(p corrected for their number, a phrase that names the worst); p = 1 of none."""
    if not squares:
        return 1.0, ""
    name = min(squares, key=lambda label: stats.variance_p(*squares[label]))
    total, freedom = squares[name]
    p = min(1.0, stats.variance_p(total, freedom) * len(squares))
    return p, f"{name}: {total / freedom:.3g} x the claimed variance, p = {p:.2g} over {len(squares)} tests"


def directions(rows: Vector, label: str, seed: int, *, tested: int | None = None) -> Squares:
    """Directions in which the first half of (n, d) rows has least noise, and those that it spans, in the second half
    (the last `tested` rows).

    Given the first half, the second one's parts along m orthonormal directions are n2 m independent standard normals.
    Noise of a subspace is missing in the former and too large in the latter.
    """
    count, width = rows.shape
    most = max(4 * LEAST_ROWS, MOST_VALUES // max(1, width))
    if width < 2 or count < LEAST_ROWS:
        return {}
    rows = rows[np.random.default_rng([seed, 41]).permutation(count)[:most]]
    place = len(rows) // 2 if tested is None else len(rows) - tested
    first, second = rows[:place], rows[place:]
    if width > MOST_DIRECTIONS:
        return {f"{label}, directions of other draws": spanned(first, second)}
    found: Squares = {}
    basis = np.linalg.eigh(first.T @ first)[1]  # ascending
    for size in sorted({1, max(1, width // 8), max(1, width // 2)}):
        what = f"{label}, {size} directions of least noise"
        found[what] = float(((second @ basis[:, :size]) ** 2).sum()), len(second) * size
    if len(first) < width:
        found[f"{label}, directions of other draws"] = spanned(first, second)
    return found


def spanned(first: Vector, second: Vector) -> tuple[float, int]:
    """What (..., n2, d) rows have in the span of (..., n1, d) others, of which at most d / 2 are taken."""
    size = max(1, min(first.shape[-2], first.shape[-1] // 2))
    basis = np.linalg.qr(np.swapaxes(first[..., :size, :], -1, -2))[0]
    along = second @ basis
    return float((along**2).sum()), along.size


def each_step(table: Vector, label: str) -> Squares:
    """(seeds, steps, d): what half of the seeds have along the noise of the others, in each step."""
    seeds, _, width = table.shape
    if width < 4 or seeds < 4:
        return {}
    by_step = table.transpose(1, 0, 2)
    statistic = spanned(by_step[:, : seeds // 2], by_step[:, seeds // 2 :])
    return {f"{label}, directions of other seeds in the same step": statistic}


def sums(rows: Vector, shape: Sequence[int], label: str) -> Squares:
    """Normalised sums of (n, d) rows of a block of this shape: all of it, and along each of its axes."""
    count, width = rows.shape
    if width < 2 or math.prod(shape) != width:
        return {}
    found = {f"sum of {label}": (float((rows.sum(axis=1) ** 2).sum()) / width, count)}
    if len(shape) > 1:
        shaped = rows.reshape(count, *shape)
        for axis, size in enumerate(shape, 1):
            if 2 <= size < width:
                along = shaped.sum(axis=axis)
                found[f"sums of {label} along axis {axis - 1}"] = float((along**2).sum()) / size, along.size
    return found


def norms(sizes: Vector, width: int, *, laplace: bool = False) -> list[tuple[float, str]]:
    """(p, what) of norms of n rows of d = `width` numbers, whose law is exact: their squares' sum is chi-square, or, of
    Laplace noise, that of absolute values Gamma(d). sizes: (n,) such sums. Made normal, they must vary as they should
    (chi-square of their squares), and follow their law (Kolmogorov-Smirnov)."""
    if width < 2:
        return []
    size, shape = (sizes, float(width)) if laplace else (sizes / 2, width / 2)
    below = gammainc(shape, size)
    smaller = np.maximum(np.minimum(below, gammaincc(shape, size)), 1e-300)
    spread = float((ndtri(smaller) ** 2).sum())
    return [
        (stats.variance_p(spread, sizes.size), f"{spread / sizes.size:.3g} x the variance that they have by chance"),
        (float(kstest(below, "uniform").pvalue), "another law than by chance (Kolmogorov-Smirnov)"),
    ]


MOST_WIDE = 256  # coordinates whose sums over windows are looked at


def windows(rows: Vector, label: str, seed: int) -> tuple[float, str]:
    """(p, which) of sums of (steps, d) noise over all windows of steps, and over all rows of adjacent equal windows.

    |sum over L steps|^2 / L is chi-square with d degrees of freedom. All windows have the same law, so that only the
    smallest and the largest count; of windows of one length that don't overlap, the squares add up.
    """
    steps, width = rows.shape
    chosen = np.random.default_rng([seed, 43]).permutation(width)[:MOST_WIDE]
    prefix = np.concatenate([np.zeros((1, chosen.size)), np.cumsum(rows[:, chosen], axis=0)])
    gram = prefix @ prefix.T
    length = np.maximum(1, np.arange(steps + 1)[None] - np.arange(steps + 1)[:, None])
    square = np.maximum(0.0, np.diag(gram)[None] + np.diag(gram)[:, None] - 2 * gram) / length
    start, end = np.triu_indices(steps + 1, 2)
    values = square[start, end]
    starts, lengths = [], []
    for size in range(2, steps // 3 + 1):
        starts += list(range(min(size, steps - 2 * size + 1)))
        lengths += [size] * min(size, steps - 2 * size + 1)
    totals = np.array([square.diagonal(size)[first::size].sum() for first, size in zip(starts, lengths, strict=True)])
    counts = np.array([(steps - first) // size for first, size in zip(starts, lengths, strict=True)])
    tests = len(values) + len(totals)
    p_rows = 2 * np.minimum(chdtr(counts * chosen.size, totals), chdtrc(counts * chosen.size, totals))
    place = int(p_rows.argmin())
    extremes = {int(values.argmin()), int(values.argmax())}
    p_one, one = min((stats.variance_p(float(values[at]), chosen.size), at) for at in extremes)
    if p_rows[place] < p_one:
        first, size = starts[place], lengths[place]
        scale = totals[place] / counts[place] / chosen.size
        which = f"sums of {label} over each {size} steps from step {first + 1}: {scale:.3g} x the claimed variance"
    else:
        scale = values[one] / chosen.size
        which = f"sum of {label} over steps {start[one] + 1} to {end[one]}: {scale:.3g} x the claimed variance"
    p = min(1.0, tests * min(float(p_rows[place]), p_one))
    return p, f"{which}, p = {p:.2g} over {tests} windows"


def ties(rows: Vector) -> tuple[float, int, int]:
    """(p, equal, numbers): absolute values of (n, d) rows of noise that equal another one of their own row.

    The bound of `statistics.repeats_p`, with the pairs of every row in place of all pairs: the neighbours are edges of
    a forest in each row. For numbers of float32 or finer.
    """
    size = np.sort(np.abs(rows), axis=1)
    equal = (np.diff(size, axis=1) <= stats.EQUAL * size[:, 1:]) & (size[:, :-1] > 0)
    found, width = int(equal.sum()), rows.shape[1]
    expected = 0.97 * stats.EQUAL * len(rows) * width * (width - 1) / 2
    if found <= expected or expected == 0:
        return 1.0, found, rows.size
    return min(1.0, math.exp(found * math.log(expected) - float(gammaln(found + 1)))), found, rows.size
