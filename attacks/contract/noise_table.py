"""Tables of pure noise for the tests of `attacks.contract.structure`, in units of the claim.

Only blocks that are noised in every step that was looked at, and only where an empty batch is a step.
"""

import math
from functools import cached_property

import numpy as np

from attacks.contract import structure
from attacks.contract.probe import Vector
from attacks.contract.seeds import Draws, block_of
from attacks.contract.series import Kept
from attacks.contract.structure import Squares
from attacks.contract.training import NOISE_STEPS

MOST_BLOCKS = 24  # looked at one by one; a random part of more
MOST_SUMMED = 20_000_000  # numbers of one training; a random part of the coordinates of more
MOST_TOGETHER = 50_000  # coordinates of all blocks; a random part of more
BUILD = 0.005  # seconds; a factory that takes less is called once more for each of several hundred noise seeds
WIDEST, WIDEST_PAIR = 200, 100  # coordinates of one step and of two
BEYOND, TESTED = 48, 24  # draws more than there are coordinates; draws that directions of the others are tested on
COARSE = 1e-6  # precision of a released type whose rounding makes numbers equal
MOST_EQUAL = 100_000  # numbers among which equal ones are looked for


class Tables:
    """Made of the trainings that other checks have asked for, and of many first steps where these are quick."""

    def __init__(self, draws: Draws) -> None:
        self.draws, self.bench, self.probe = draws, draws.bench, draws.probe
        self.laplace = self.probe.mechanism == "laplace"

    @cached_property
    def blocks(self) -> list[str]:
        """Blocks that are noised in every step of every training on empty batches."""
        if not self.draws.empty or self.draws.unknown or self.probe.std == 0:
            return []
        course, series = self.bench.training.noise, self.bench.series
        names = [name for name in series.blocks if all(name in seen.noised for seen in course)]
        return [name for name in names if np.isfinite(series.table(name)).all()]

    @cached_property
    def some(self) -> list[str]:
        """Those that are looked at one by one."""
        order = np.random.default_rng([self.probe.seed, 47]).permutation(len(self.blocks))[:MOST_BLOCKS]
        return [self.blocks[index] for index in sorted(order)]

    def white(self, name: str) -> Vector:
        """(seeds, steps, d) kept coordinates."""
        return self.draws.white(name) / self.probe.std

    @cached_property
    def together(self) -> Vector:
        """(seeds, steps, d) of all blocks."""
        rng = np.random.default_rng([self.probe.seed, 59])
        parts, total = [], sum(self.white(name).shape[2] for name in self.blocks)
        for name in self.blocks:
            part = self.white(name)
            share = math.ceil(part.shape[2] * min(1.0, MOST_TOGETHER / total))
            parts.append(part[:, :, np.sort(rng.permutation(part.shape[2])[:share])])
        return np.concatenate(parts, axis=2)

    @property
    def longer(self) -> bool:
        """Whether one training has steps beyond those of all seeds."""
        return self.draws.mixing is None and len(self.bench.training.noise) > NOISE_STEPS

    def course(self, names: list[str]) -> Vector:
        """(steps, d) in the one long training; correlated noise: (seeds steps, d), as far as kept."""
        if self.draws.mixing is not None:
            return np.concatenate([_rows(self.white(name)) for name in names], axis=1)
        training = self.bench.training.noise
        width = sum(self.sizes[name] for name in names)
        most = max(2, MOST_SUMMED // len(training))
        chosen: slice | Kept = slice(None)
        if width > most:
            chosen = np.sort(np.random.default_rng([self.probe.seed, 61]).permutation(width)[:most])
        rows = (np.concatenate([block_of(seen, name) for name in names])[chosen] for seen in training)
        return np.stack(list(rows)) / self.probe.std

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Coordinates of each block that are looked at."""
        if self.draws.mixing is not None:
            return {name: self.white(name).shape[2] for name in self.blocks}
        return {name: block_of(self.bench.training.noise[0], name).size for name in self.blocks}

    def pooled(self, name: str | None) -> Vector:
        """(n, d) kept coordinates of a block, None = all, over seeds and steps, and over the rest of the long training
        where d is small."""
        short = _rows(self.together if name is None else self.white(name))
        if not self.longer or short.shape[1] > structure.MOST_DIRECTIONS:
            return short
        return np.concatenate([short, self.course(self.blocks if name is None else [name])[NOISE_STEPS:]])

    @cached_property
    def many(self) -> Vector:
        """(n, steps, d) noise of the first two steps (or the first) under more seeds than there are coordinates."""
        names, width = self.blocks, sum(self.sizes.values())
        build = self.probe.build_seconds / max(1, self.probe.builds)
        ready = self.draws.mixing is None and self.bench.training.quick and build < BUILD and not self.probe.slow
        if not ready or not 2 <= width <= WIDEST:
            return np.zeros((0, 1, width))
        steps = 2 if width <= WIDEST_PAIR else 1
        found = []
        for noise in range(steps * width + BEYOND):
            seen = self.probe.course([[]] * steps, noise=noise)
            found.append(np.stack([np.concatenate([block_of(item, name) for name in names]) for item in seen]))
        return np.stack(found) / self.probe.std

    # -- what each check looks at ----------------------------------------------------------------------------------

    def of_law(self) -> tuple[float, str]:
        """(p, phrase): norms of all blocks and of each."""
        sizes = {name: self._sizes(name) for name in self.blocks}
        if not sizes:
            return 1.0, ""
        tried = {"all blocks": (np.sum(list(sizes.values()), axis=0), sum(self.sizes.values()))}
        tried |= {name: (sizes[name], self.sizes[name]) for name in self.some}
        found = [
            (p, f"norms of the noise of {label}: {what}")
            for label, (values, width) in tried.items()
            for p, what in structure.norms(values, width, laplace=self.laplace)
        ]
        return least(found) if found else (1.0, "")

    def _sizes(self, name: str) -> Vector:
        """(n,) sums of squares, or of absolute values, of one block."""
        if self.draws.mixing is not None:
            values = list(_rows(self.white(name)))
        else:
            values = [block_of(seen, name) / self.probe.std for seen in self.bench.training.noise]
        return np.array([np.abs(row).sum() if self.laplace else float(row @ row) for row in values])

    def equal(self) -> tuple[float, str]:
        """(p, phrase) of numbers that equal another one of their own step, where what is released is fine enough to
        tell them apart and equal numbers are not those of a release that is rounded as a whole."""
        if not self.blocks or self.probe.precision > COARSE:
            return 1.0, ""
        p, found, count = structure.ties(self._part(self.together))
        if p >= 1.0:
            return 1.0, ""
        on_batches = np.stack([self.probe.observe(self.draws.batch, noise=k).vector for k in range(self.draws.seeds)])
        rounded = structure.ties(self._part(on_batches[:, None]))
        if 2 * rounded[1] / rounded[2] > found / count:  # the sum's numbers are as coarse
            return 1.0, ""
        return p, f"{found} of {count} values equal another one of their step: noise of a coarser type"

    def _part(self, table: Vector) -> Vector:
        """(n, d) of (seeds, steps, d): some coordinates."""
        width = max(2, MOST_EQUAL // (table.shape[0] * table.shape[1]))
        chosen = np.random.default_rng([self.probe.seed, 53]).permutation(table.shape[2])[:width]
        return _rows(table[:, :, chosen])

    def over_steps(self) -> tuple[float, str]:
        """(p, phrase): windows of steps, directions over steps, and those of the first two steps together."""
        if not self.blocks or self.laplace:
            return 1.0, ""
        seed, table = self.probe.seed, self.together
        by_step = table.transpose(1, 0, 2).reshape(table.shape[1], -1)
        squares = structure.directions(by_step.T, "a coordinate's steps", seed)
        found = [structure.windows(by_step, "noise under several seeds", seed)]
        if self.longer:
            course = self.course(self.blocks)
            found.append(structure.windows(course, "noise", seed))
            squares |= structure.directions(course.T, "a coordinate's steps in one training", seed)
            if len(self.blocks) > 1:
                found += [structure.windows(self.course([name]), f"noise of {name}", seed) for name in self.some]
        if self.many.shape[1] == 2 and len(self.many):
            squares |= structure.directions(self.many.reshape(len(self.many), -1), "two steps", seed, tested=TESTED)
        return least([*found, structure.worst_of(squares)])

    def over_parameters(self) -> tuple[float, str]:
        """(p, phrase): directions over all blocks."""
        if len(self.blocks) < 2 or self.laplace:
            return 1.0, ""
        seed = self.probe.seed
        squares = structure.directions(self.pooled(None), "all blocks", seed)
        squares |= structure.each_step(self.together, "all blocks") | self._late(self.blocks, "all blocks")
        if len(self.many):
            squares |= structure.directions(self.many[:, 0], "all blocks in step 1", seed, tested=TESTED)
        return structure.worst_of(squares)

    def within(self) -> tuple[float, str]:
        """(p, phrase): sums of a block and directions in it."""
        if self.laplace:
            return 1.0, ""
        squares: Squares = {}
        ends = dict(zip(self.blocks, np.cumsum([self.sizes[name] for name in self.blocks]).tolist(), strict=True))
        for name in self.some:
            shape, seed = self.probe.shapes.get(name, ()), self.probe.seed
            squares |= structure.sums(self.course([name]), shape, name)
            squares |= structure.directions(self.pooled(name), name, seed)
            squares |= structure.each_step(self.white(name), name) | self._late([name], name)
            if len(self.many):
                squares |= structure.directions(
                    self.many[:, 0, ends[name] - self.sizes[name] : ends[name]],
                    f"{name} in step 1",
                    seed,
                    tested=TESTED,
                )
        return structure.worst_of(squares)

    def _late(self, names: list[str], label: str) -> Squares:
        """Directions in the last two thirds of the one long training."""
        if not self.longer:
            return {}
        rows = self.course(names)[len(self.bench.training.noise) // 3 :]
        return structure.directions(rows, f"{label} late", self.probe.seed, tested=min(TESTED, len(rows) // 2))


def least(found: list[tuple[float, str]]) -> tuple[float, str]:
    """The smallest p, corrected for their number."""
    p, phrase = min(found, key=lambda item: item[0])
    return min(1.0, p * len(found)), phrase


def _rows(table: Vector) -> Vector:
    return np.asarray(table.reshape(-1, table.shape[2]))
