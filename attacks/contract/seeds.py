"""Repeated releases under different noise seeds: what several checks of the noise look at."""

import math

import numpy as np

from attacks.contract.bench import Bench
from attacks.contract.probe import Observation, Probe, Vector

MOST_SEEDS, LEAST_SEEDS, VALUES_WANTED = 200, 24, 400
FEW_SEEDS = 10  # where the factory is slow
WHITENED_STEPS = 24  # of correlated noise


class Draws:
    """Repeated releases under different noise seeds, asked once and used by several checks."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.probe = bench, bench.probe
        self.empty = bench.empty_problem is None
        first = self.probe.observe(self.batch)
        self.blocks = sorted(first.noised)
        smallest = min((first.released[name].size for name in self.blocks), default=1)  # type: ignore[union-attr]
        wanted = 0 if self.empty else 2 * math.ceil(VALUES_WANTED / smallest / 2)
        few = FEW_SEEDS if self.probe.slow else LEAST_SEEDS
        self.seeds = min(MOST_SEEDS, max(few, wanted))
        self.mixing = None if self.probe.mechanism != "correlated" else mixing(self.probe, WHITENED_STEPS)

    @property
    def unknown(self) -> bool:
        """Whether the noise is correlated and the trainer does not say how."""
        return self.probe.mechanism == "correlated" and self.mixing is None

    @property
    def batch(self) -> list[int]:
        """Two ordinary units."""
        return [self.bench.picks.anchor, self.bench.picks.group[0]]

    def full(self, name: str) -> Vector:
        """(K, d) released block `name` on the batch in the first step, a row a noise seed."""
        rows = [block_of(self.probe.observe(self.batch, noise=k), name) for k in range(self.seeds)]
        kept = self.bench.series.kept.get(name)
        return np.stack(rows) if kept is None else np.stack(rows)[:, kept]

    def paired(self, name: str) -> Vector:
        """(K / 2, d) differences of disjoint pairs of seeds: the signal is gone, the noise has twice the variance."""
        values = self.full(name)
        even = len(values) // 2 * 2
        return np.asarray((values[0:even:2] - values[1:even:2]) / math.sqrt(2.0))

    def white(self, name: str) -> Vector:
        """(seeds, steps, d) noise of empty batches; correlated noise is made white by the trainer's own matrix."""
        table = self.bench.series.table(name)
        if self.mixing is None:
            return table
        return np.asarray(np.einsum("ts,ksd->ktd", np.linalg.inv(self.mixing), table[:, :WHITENED_STEPS]))

    def rows(self, name: str) -> Vector:
        """(n, d) independent rows of noise of a block: over seeds and steps, or over pairs of seeds."""
        if not self.empty or name not in self.bench.series.kept:  # or never noised on an empty batch
            return self.paired(name)
        white = self.white(name)
        flat = white.reshape(-1, white.shape[2])
        return np.asarray(flat[~np.isnan(flat).any(axis=1)])


def block_of(seen: Observation, name: str) -> Vector:
    """What was released of a block; zeros where it was not."""
    value = seen.released.get(name)
    size = seen.moved[name].size if name in seen.moved else 1
    return value if value is not None else np.zeros(size)


def mixing(probe: Probe, steps: int) -> Vector | None:
    """The trainer's own statement of how its correlated noise is made; None if it makes none."""
    if "mixing" not in probe.offered:
        return None
    matrix = probe.build().ask("mixing", steps)
    return np.asarray(matrix.detach().to("cpu").double().numpy(), dtype=np.float64)
