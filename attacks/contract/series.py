"""Trainings on empty batches under several noise seeds: pure noise, and what the optimiser makes of it.

Of a large model a random part of the coordinates is kept, the same in every training.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from attacks.contract.probe import Observation, Vector
from attacks.contract.training import NOISE_STEPS

if TYPE_CHECKING:
    from attacks.contract.bench import Bench

SEEDS = 8
MOST_KEPT = 200_000  # coordinates of the noise, over all blocks
MOST_RULED = 256  # coordinates of a block whose update rule is learned

Kept = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Series:
    """One training, arrays with a row a step. `noise`: rows of NaN where a block was not noised."""

    noise: dict[str, npt.NDArray[np.float32]]
    release: dict[str, Vector]
    moved: dict[str, Vector]


class Everything:
    """All series of a bench, asked once and used by several modules."""

    def __init__(self, bench: "Bench") -> None:
        self.bench, self.probe = bench, bench.probe

    @cached_property
    def blocks(self) -> list[str]:
        """Blocks that are noised at some step of the first training."""
        seen = self.bench.training.noise if self.bench.empty_problem is None else [self._first]
        return sorted(set().union(*(item.noised for item in seen)))

    @cached_property
    def _first(self) -> Observation:
        return self.probe.observe([self.bench.picks.anchor])

    @property
    def sizes(self) -> dict[str, int]:
        """Coordinates of each released block (a zeroth-order trainer releases numbers)."""
        seen = self.bench.training.noise if self.bench.empty_problem is None else [self._first]
        return {name: value.size for item in seen for name, value in item.released.items() if value is not None}

    @cached_property
    def kept(self) -> dict[str, Kept]:
        """Coordinates of each block whose noise is kept."""
        return self._part(max(200, MOST_KEPT // max(1, len(self.sizes))), self.sizes)

    @cached_property
    def ruled(self) -> dict[str, Kept]:
        """Coordinates of each parameter whose update rule is learned."""
        return self._part(MOST_RULED, {name: math.prod(shape) for name, shape in self.probe.shapes.items()})

    def _part(self, most: int, sizes: dict[str, int]) -> dict[str, Kept]:
        rng = np.random.default_rng([self.probe.seed, 29])
        return {
            name: np.sort(rng.choice(size, most, replace=False)) if size > most else np.arange(size)
            for name, size in sorted(sizes.items())
        }

    @cached_property
    def noises(self) -> list[Series]:
        """SEEDS trainings on NOISE_STEPS empty batches; only where an empty batch is a step."""
        first = self.of(self.bench.training.noise[:NOISE_STEPS])
        rest = [self.of(self.probe.course([[]] * NOISE_STEPS, noise=noise)) for noise in range(1, SEEDS)]
        return [first, *rest]

    def of(self, course: list[Observation]) -> Series:
        """The part of a training that is kept."""

        def rows(name: str, kept: Kept) -> Vector:
            lacking = np.full(kept.size, np.nan)
            values = [item.released.get(name) for item in course]
            return np.stack([lacking if value is None else value[kept] for value in values])

        return Series(
            {name: rows(name, kept).astype(np.float32) for name, kept in self.kept.items()},
            {name: rows(name, kept) for name, kept in self.ruled.items() if name in self.sizes},
            {name: np.stack([item.moved[name][kept] for item in course]) for name, kept in self.ruled.items()},
        )

    def table(self, name: str) -> Vector:
        """(SEEDS, NOISE_STEPS, d) noise of one block; NaN for one that no empty batch gives noise to."""
        if name not in self.kept:
            return np.full((SEEDS, NOISE_STEPS, 1), np.nan)
        return np.stack([series.noise[name] for series in self.noises]).astype(np.float64)
