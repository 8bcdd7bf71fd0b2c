"""Is every number of noise drawn anew: over the steps, over the blocks, within a block?

Empty batches release noise and nothing else, so whole trainings on them are compared. A correlation about zero of
independent normals has an exact law; independence says more, so sizes without their signs are compared too.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from attacks.contract import statistics as stats
from attacks.contract.noise_table import Tables
from attacks.contract.probe import AGREEMENT, Probe, Vector
from attacks.contract.result import judged, skipped
from attacks.contract.seeds import Draws, block_of
from attacks.contract.training import NOISE_STEPS
from dpaudit.documents import Check

MOST_PAIRED = 20_000  # values of a pair of blocks


def checks(draws: Draws, *, tables: Tables | None) -> Iterator[Check]:
    """All checks of this module. tables: noise that has the claimed size; None = it is not known to."""
    yield over_steps(draws, tables=tables)
    yield over_parameters(draws, tables=tables)
    yield within_parameters(draws, tables=tables)


OVER_STEPS = "noise over steps"
OVER_STEPS_WHY = (
    "The noise of one step must be independent of that of every other; the same noise twice cancels in a difference. "
    "Usually a generator that is seeded anew in every step, or a pool of draws that is used in turn."
)


def over_steps(draws: Draws, *, tables: Tables | None) -> Check:
    """Empty batches release pure noise whatever the parameters; all pairs of steps are compared."""
    bench, probe = draws.bench, draws.probe
    if bench.empty_problem is not None:
        return skipped(OVER_STEPS, f"needs an empty batch: {bench.empty_problem}", OVER_STEPS_WHY)
    if draws.unknown:
        return skipped(OVER_STEPS, "correlated noise by claim, and no mixing() to judge it by", OVER_STEPS_WHY)
    symmetric = probe.mechanism == "laplace"
    compared = _tables(draws, signless=tables is not None and not symmetric)
    tests = {what: stats.most_correlated(rows, symmetric=symmetric) for what, rows in compared.items()}
    what = min(tests, key=lambda name: tests[name][1])
    r, p, where, pairs = tests[what]
    structured = tables.over_steps() if tables is not None else NOTHING
    p = min(1.0, p * (len(tests) + 2))
    again, equal = repeated(probe, np.stack([seen.vector for seen in bench.training.noise]))
    if draws.mixing is None and (again := min(1.0, again * (len(tests) + 2))) < p and again <= stats.ALPHA:
        said = f"{equal} numbers of noise are those of another place or step, p = {again:.2g}"
        return judged(OVER_STEPS, False, said, f"new numbers: p above {stats.ALPHA:g}", OVER_STEPS_WHY)
    measured = (
        f"largest correlation {r:.3g} ({what}, steps {where[0] + 1} and {where[1] + 1}), p = {p:.2g} over {pairs} pairs"
        f" in each of {len(tests)} comparisons of steps 1 to {len(bench.training.noise)}"
    )
    return correlation_check(OVER_STEPS, p, measured, structured, OVER_STEPS_WHY, share=1 / (len(tests) + 2))


def repeated(probe: Probe, noise: Vector) -> tuple[float, int]:
    """`statistics.repeats_p` of some coordinates of (steps, n) noise; p = 1 where a step computes in half precision,
    whose numbers are few."""
    if probe.agreement > AGREEMENT:
        return 1.0, 0
    width = max(1, stats.MOST_EQUAL_AMONG // max(1, len(noise)))
    chosen = np.random.default_rng([probe.seed, 37]).permutation(noise.shape[1])[:width]
    return stats.repeats_p(np.nan_to_num(noise[:, chosen]).reshape(-1))


def _tables(draws: Draws, *, signless: bool) -> dict[str, Vector]:
    """(steps, n) noise by name: all blocks, each block, one longer training; also its sizes without signs."""
    series, training = draws.bench.series, draws.bench.training
    parts = {name: _by_step(draws.white(name)) for name in series.blocks}
    found = {"all blocks": np.concatenate(list(parts.values()), axis=1)}
    if len(parts) > 1:
        found |= parts
    if draws.mixing is None and len(training.noise) > NOISE_STEPS:  # a pool of draws that is longer than those above
        found["one training"] = np.stack([seen.vector for seen in training.noise])
    if signless:
        found |= {f"sizes of {name}": _sizes(rows / draws.probe.std) for name, rows in found.items()}
    return {name: rows for name, rows in found.items() if rows.shape[1] >= stats.FEWEST}


def _by_step(values: Vector) -> Vector:
    """(seeds, steps, d) -> (steps, seeds d); 0 where a block was not noised, which says nothing."""
    return np.nan_to_num(values.transpose(1, 0, 2).reshape(values.shape[1], -1))


def _sizes(noise: Vector) -> Vector:
    """Normal again, of the absolute values alone: Phi^-1(2 Phi(|z|) - 1). 0, where there was no noise, stays 0."""
    level = np.clip(2 * ndtr(np.abs(noise)) - 1, 1e-16, 1 - 1e-16)
    return np.where(noise == 0, 0.0, ndtri(level))


Pair = tuple[str, Vector, Vector]


def worst_pair(probe: Probe, pairs: Sequence[Pair]) -> tuple[float, float, str, int]:
    """(p corrected for the number of pairs, correlation, which, pairs)."""
    test = stats.symmetric_correlation if probe.mechanism == "laplace" else stats.correlation
    best = (1.0, 0.0, "")
    for what, x, y in pairs:
        r, p = test(x, y)
        if p < best[0]:
            best = (p, r, what)
    return min(1.0, best[0] * len(pairs)), best[1], best[2], len(pairs)


Structured = tuple[float, str]  # p and what it is of, of structure beyond correlations
NOTHING: Structured = (1.0, "")


def correlation_check(
    name: str, p: float, measured: str, structured: Structured, why: str, *, share: float = 0.5
) -> Check:
    """Neither a correlation (p is corrected already) nor structure, which has this share of the check's level."""
    hidden = min(1.0, structured[0] / share)
    if hidden < p and hidden <= stats.ALPHA:
        return judged(name, False, structured[1], f"independent noise: p above {stats.ALPHA * share:.2g}", why)
    if structured[1]:
        measured += f"; sums, windows and directions: p = {hidden:.2g}"
    return judged(name, p > stats.ALPHA, measured, f"no correlation: p above {stats.ALPHA:g}", why)


def pair_check(name: str, worst: tuple[float, float, str, int], structured: Structured, why: str) -> Check:
    """Of a most correlated pair."""
    p, r, what, pairs = worst
    p = min(1.0, 2 * p)
    measured = f"largest correlation {r:.3g} ({what or 'none'}), p = {p:.2g} over {pairs} pairs"
    return correlation_check(name, p, measured, structured, why)


OVER_PARAMETERS = "noise over parameters"
OVER_PARAMETERS_WHY = (
    "Blocks must not share noise: it cancels in differences between them. Usually a generator that is seeded anew for "
    "every parameter, or the same stream on every rank."
)


def over_parameters(draws: Draws, *, tables: Tables | None) -> Check:
    """Beginnings of all pairs of blocks, over seeds and steps."""
    if draws.probe.mechanism == "zeroth-order" or len(draws.blocks) < 2:
        return skipped(OVER_PARAMETERS, "only one noisy block (zeroth-order noise is one number)", OVER_PARAMETERS_WHY)
    if draws.unknown:
        return skipped(OVER_PARAMETERS, "correlated noise, and no mixing() to judge it by", OVER_PARAMETERS_WHY)
    values = {name: _all_rows(draws, name) for name in draws.blocks}
    pairs: list[Pair] = []
    for place, one in enumerate(draws.blocks):
        for two in draws.blocks[:place]:
            m = min(values[one].shape[1], values[two].shape[1])
            x, y = values[one][:, :m].reshape(-1), values[two][:, :m].reshape(-1)
            pairs.append((f"{two} and {one}", x[:MOST_PAIRED], y[:MOST_PAIRED]))
    structured = tables.over_parameters() if tables is not None else NOTHING
    return pair_check(OVER_PARAMETERS, worst_pair(draws.probe, pairs), structured, OVER_PARAMETERS_WHY)


def _all_rows(draws: Draws, name: str) -> Vector:
    """Rows in one order for all blocks; zeros where a block was not noised (they say nothing, and are left out)."""
    if not draws.empty:
        return draws.paired(name)
    white = draws.white(name)
    return np.nan_to_num(white.reshape(-1, white.shape[2]))


WITHIN = "noise within a parameter"
WITHIN_WHY = "Every coordinate needs its own noise. Usually one row of noise that is broadcast over a matrix."


def within_parameters(draws: Draws, *, tables: Tables | None) -> Check:
    """Disjoint pairs of neighbouring rows and of neighbouring coordinates of each block."""
    if draws.probe.mechanism == "zeroth-order":
        return skipped(WITHIN, "zeroth-order noise is one number", WITHIN_WHY)
    if draws.unknown:
        return skipped(WITHIN, "correlated noise, and no mixing() to judge it by", WITHIN_WHY)
    pairs: list[Pair] = []
    for name in draws.blocks:
        # Of a large block a part of the coordinates is kept; rows are then compared in the first step.
        values, shape = draws.rows(name), draws.probe.shapes[name]
        pairs += neighbours(name, values if values.shape[1] >= math.prod(shape) else _whole_rows(draws, name), shape)
    if not pairs:
        return skipped(WITHIN, "every block has a single coordinate", WITHIN_WHY)
    structured = tables.within() if tables is not None else NOTHING
    return pair_check(WITHIN, worst_pair(draws.probe, pairs), structured, WITHIN_WHY)


def neighbours(name: str, values: Vector, shape: Sequence[int]) -> list[Pair]:
    """Disjoint pairs of neighbouring coordinates and rows of a block; values: (n, d), zeros where it was not noised."""
    pairs: list[Pair] = []
    if values.shape[1] >= 2:
        even = values.shape[1] // 2 * 2
        pairs.append((f"coordinates of {name}", values[:, 0:even:2].reshape(-1), values[:, 1:even:2].reshape(-1)))
    if len(shape) > 1 and shape[0] >= 2 and values.shape[1] == math.prod(shape):
        rows = values.reshape(values.shape[0], shape[0], -1)[:, : shape[0] // 2 * 2]
        pairs.append((f"rows of {name}", rows[:, 0::2].reshape(-1), rows[:, 1::2].reshape(-1)))
    return pairs


def _whole_rows(draws: Draws, name: str) -> Vector:
    values = [block_of(draws.probe.observe(draws.batch, noise=k), name) for k in range(2)]
    return np.asarray((values[0] - values[1])[None] / math.sqrt(2.0))
