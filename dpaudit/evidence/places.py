"""Evidence from every place of the noise: each step, each block, each coordinate, and directions that can be predicted.

`dpaudit.evidence.noise` pools all steps and directions, so noise that is missing in one step, in one block or in some
coordinates can hide behind a little more noise elsewhere. r[t, i] is what the release of step t shows in coordinate i
once everything that is known beforehand (the records, the canaries it took) is subtracted, over sigma C. Looked at are

- the sum of r^2 of each step, along the spare directions, over all coordinates and over each block;
- the sum of r^2 over all steps, of each block and of each coordinate;
- of each step what lies outside the span of all earlier steps, along the spare directions: noise that fills a subspace
  only shows less and less there; and the second half of the steps along the spare combinations that showed least in the
  first half.

**Validity.** Let F_t be everything before the noise of step t: earlier releases, batches, gradients, coins. If the
mechanism adds noise with a covariance of at least sigma^2 C^2 I, drawn anew at step t, then given F_t

    r[t] = s + N(0, I) + more, independent of the N(0, I),

with s fixed by F_t: what was not subtracted, or too much of it. For a projection P of rank d that is a function of
F_t, |P r[t]|^2 is therefore given F_t a mixture of non-central chi-square laws with d degrees of freedom, and each of
them is stochastically at least the central one (Anderson 1955: a ball has its largest normal mass around its centre).
By the conditional quantile transform there is on a larger space a chi-square variable X_t <= |P r[t]|^2 with d degrees
of freedom, independent of F_t and of X_1, …, X_(t-1), so that sum_t |P r[t]|^2 >= sum_t X_t, a chi-square variable with
T d degrees of freedom. Hence P[chi2 <= S], the lower tail, is a p-value whatever the signals are, however they depend
on the past, and however much more noise there is. Members of each family, and the families, are joined by Bonferroni's
inequality, which needs no independence. Directions of the last family are functions of the first half of the steps,
hence of F_t in the second; their number is fixed.

A block that a step does not release counts as infinite: no evidence. A single coordinate is looked at so closely that
rounding of the release can matter (a release in bfloat16 keeps 8 bits): |r| is taken larger by 2^-8 of what was
released, which only moves the p-value up.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

MOST_COORDINATES = 200_000  # looked at one by one; of a larger model a fixed random subset, every block in it
LEAST_DEGREES = 32  # of a sum that is not made safe against rounding
ROUNDING = 2.0**-8  # of what was released: bfloat16, and as much again for what was subtracted
LEAST_WIDTH = 16  # spare directions from which some are predicted
KURTOSIS, ERRORS, LEAST_VALUES = 0.1, 8.0, 2000  # of `law`: excess, in standard errors, of at least so many values


@dataclass(frozen=True)
class Found:
    """p_value by the most unusual of all places, in words: which one, and the noise level there over the claimed."""

    p_value: float
    seen: str


@dataclass(frozen=True)
class _Family:
    """squares: sums of squares of the members. degrees: of freedom, of each. name: of a member, by its number."""

    squares: Floats
    degrees: Floats
    name: Callable[[int], str]

    def found(self) -> Found:
        p = np.asarray(chi2.cdf(self.squares, self.degrees))
        at = int(np.argmin(p))
        level = float(np.sqrt(self.squares[at] / self.degrees[at]))
        return Found(min(1.0, p.size * float(p[at])), f"{self.name(at)}: {level:.3g} times the claimed noise")


class PlacedNoise:
    """Sums of squares over the steps, as the steps come. kept: (N,) positions of the coordinates that are looked at
    among all of them, block by block in the order of `blocks`."""

    def __init__(self, blocks: Sequence[tuple[str, int]], rng: np.random.Generator) -> None:
        """blocks: name and number of coordinates of each, in their order. rng: draws a subset."""
        self.names = [name for name, _ in blocks]
        sizes = np.array([size for _, size in blocks])
        self.firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        picked = [
            first + _some(size, share, rng)
            for first, size, share in zip(self.firsts, sizes, _shares(sizes), strict=True)
        ]
        self.kept: Places = np.concatenate(picked).astype(np.int64)
        self.widths = np.array([part.size for part in picked])
        self.starts = np.concatenate([[0], np.cumsum(self.widths)[:-1]])
        self.steps = 0
        self._coordinates = np.zeros(self.kept.size)
        self._blocks: list[Floats] = []
        self._fourth = np.zeros(len(self.names))

    def add(self, left: Floats, released: Floats, absent: Collection[str] = ()) -> None:
        """One step. left: (N,) of the kept coordinates after subtraction; released: (N,) before it, both over sigma C.
        absent: blocks that were not released, whose values say nothing."""
        left = np.nan_to_num(left, nan=np.inf, posinf=np.inf, neginf=np.inf)
        for name in set(absent) & set(self.names):
            block = self.names.index(name)
            left[self.starts[block] : self.starts[block] + self.widths[block]] = np.inf
        squares = np.square(left)
        self.steps += 1
        self._blocks.append(np.add.reduceat(squares, self.starts))
        self._fourth += np.add.reduceat(np.square(squares), self.starts)
        self._coordinates += np.square(np.abs(left) + ROUNDING * np.abs(released))

    def judged(self, spare: Floats) -> Found:
        """The p-value of all places together. spare: (T, K) of the spare directions, over sigma C; K may be 0."""
        families = [
            family for family in (*self._of_steps(), *self._over_steps(), *_of_spare(spare)) if family.squares.size
        ]
        found = [family.found() for family in families]
        least = min(found, key=lambda item: item.p_value)
        return Found(min(1.0, len(found) * least.p_value), least.seen)

    def _of_steps(self) -> list[_Family]:
        """Each step: over all kept coordinates, and over each block."""
        shown = np.stack(self._blocks)
        wide = np.flatnonzero(self.widths >= LEAST_DEGREES)
        degrees = np.tile(self.widths[wide], self.steps).astype(float)

        def part(at: int) -> str:
            return f"step {at // wide.size + 1}, block {self.names[wide[at % wide.size]]}"

        parts = _Family(shown[:, wide].ravel(), degrees, part)
        if self.kept.size < LEAST_DEGREES:
            return [parts]
        every = np.full(self.steps, float(self.kept.size))
        return [_Family(shown.sum(axis=1), every, lambda at: f"step {at + 1}, all blocks"), parts]

    def _over_steps(self) -> list[_Family]:
        """All steps: each block, and each coordinate."""
        degrees = self.widths.astype(float) * self.steps
        wide = np.flatnonzero(degrees >= LEAST_DEGREES)
        totals = np.stack(self._blocks).sum(axis=0)
        every = np.full(self.kept.size, float(self.steps))
        return [
            _Family(totals[wide], degrees[wide], lambda at: f"block {self.names[wide[at]]}, all steps"),
            _Family(self._coordinates, every, self._coordinate),
        ]

    def _coordinate(self, at: int) -> str:
        block = int(np.searchsorted(self.starts, at, side="right")) - 1
        return f"coordinate {self.kept[at] - self.firsts[block]} of {self.names[block]}, all steps"

    def law(self) -> Found | None:
        """Whether coordinates have the kurtosis of normal noise, by the block that is furthest from it; None where no
        block has enough finite values. p_value: 0 or 1, whether the excess is beyond KURTOSIS and ERRORS standard
        errors; the level of the noise does not enter."""
        counts = self.widths.astype(float) * self.steps
        second = np.stack(self._blocks).sum(axis=0)
        good = np.flatnonzero((counts >= LEAST_VALUES) & np.isfinite(self._fourth) & (second > 0))
        if not good.size:
            return None
        excess = self._fourth[good] * counts[good] / np.square(second[good]) - 3
        limits = np.maximum(KURTOSIS, ERRORS * np.sqrt(24 / counts[good]))
        at = int(np.argmax(np.abs(excess) / limits))
        text = f"excess kurtosis {excess[at]:.3f} in block {self.names[good[at]]}"
        return Found(0.0 if abs(excess[at]) > limits[at] else 1.0, text)


def _of_spare(shown: Floats) -> list[_Family]:
    """Each step along the spare directions, and the second half of the steps along predicted ones. shown: (T, K)."""
    steps, width = shown.shape
    if width < LEAST_WIDTH or not np.isfinite(shown).all():
        return []
    every = np.full(steps, float(width))
    families = [_Family(np.square(shown).sum(axis=1), every, lambda at: f"step {at + 1}, directions without canaries")]
    half = steps // 2
    if not half:
        return families
    first, second = shown[:half], shown[half:]
    directions = np.linalg.eigh(first.T @ first)[1]  # those that the first half did not reach come first
    counts = (width // 2, width // 8)
    squares = [float(np.square(second @ directions[:, :count]).sum()) for count in counts]
    degrees = [count * len(second) for count in counts]
    names = [f"{count} directions predicted from the first {half} steps, in the later ones" for count in counts]
    # Gram-Schmidt: the diagonal of R holds what each step shows outside the span of those before it.
    outside = np.diag(np.linalg.qr(shown[:width].T, mode="r"))[1:]
    squares.append(float(np.square(outside).sum()))
    degrees.append(sum(range(width - outside.size, width)))
    names.append("outside the span of earlier steps, all steps")
    return [*families, _Family(np.array(squares), np.array(degrees, dtype=float), lambda at: names[at])]


def _shares(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many coordinates of each block are kept: half of the places by size, half in equal parts."""
    total = int(sizes.sum())
    if total <= MOST_COORDINATES:
        return sizes
    half = MOST_COORDINATES // 2
    return np.minimum(sizes, half * sizes // total + max(1, half // sizes.size))


def _some(size: int, share: int, rng: np.random.Generator) -> Places:
    """(share,) of `size` coordinates in ascending order."""
    if share >= size:
        return np.arange(size)
    return np.sort(rng.choice(size, size=share, replace=False, shuffle=False))
