"""The update rule of every step of a training, learned from pure noise and tested on data.

On empty batches nothing private is there, so whatever the parameters do is a function of what was released: the rule is
learned there, over noise seeds, a step at a time. A rule that predicts the moves of all noise seeds must predict those
of a training on data from its releases. Two families are known: affine in the release, the last move and the present
value (SGD, momentum, weight decay, schedules), and Adam's with any of the usual decay rates and with weight decay.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from attacks.contract.bench import Bench
from attacks.contract.probe import AGREEMENT, Vector
from attacks.contract.series import Series
from attacks.contract.training import STEPS

FIRST_DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
SECOND_DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)
# What a prediction may be off by, in units of what the rule may be off where it was learned, and of what it was.
MARGIN, MAGNIFIED = 3.0, 10.0

DISTINCT = 1e-4  # relative singular value from which two inputs of a rule are told apart
LATE = 12  # a step up to which the update must have been judged
CLIPPED = (math.inf, 1.0, 1e-6)  # norms to which an optimiser may clip the whole noisy mean; the last one normalises it

Run = tuple[Vector, Vector, Vector]
Runs = list[Run]
Rule = Callable[[Vector, Vector, Vector], Vector]  # releases, moves and values before each step, each (STEPS, d)


class Miss(NamedTuple):
    """How far off the moves of one block were in one history: in units of what is allowed, where, and the last step
    that was judged."""

    gap: float
    where: str
    last: int


def misses(bench: Bench) -> Iterator[Miss]:
    """For each block whose rule could be learned: two histories with a seed, and two without."""
    learn = bench.series.noises
    judge = [bench.series.of(course) for course in (bench.training.first, bench.training.second, *bench.live)]
    for name in sorted(bench.series.ruled):
        if any(name not in series.release for series in (*learn, *judge)):
            continue
        start = bench.probe.start[name][bench.series.ruled[name]]
        found = _learned(bench, name, start)
        if found is None:
            continue
        scaled, rule, allowed = found
        for number, series in enumerate(judge):
            releases, moves, values = scaled(series)
            if not np.isfinite(releases).all():
                continue
            gaps = np.abs(rule(releases, moves, values) - moves) / allowed[:, None]
            known = ~np.isnan(gaps)
            gaps = np.where(known, gaps, 0.0)
            step, _ = np.unravel_index(int(np.argmax(gaps)), gaps.shape)
            where = f"{name}, step {step + 1} of history {number % 2 + 1}{' without a noise seed' * (number > 1)}"
            yield Miss(float(gaps.max()), where, int(np.flatnonzero(known.any(axis=1)).max(initial=-1)) + 1)


def _learned(bench: Bench, name: str, start: Vector) -> tuple[Callable[[Series], Run], Rule, Vector] | None:
    """(what the rule sees of a training, the rule, what it may be off by in each step) of one block.

    The rule may see the release as it is, or clipped as a whole once more (`max_grad_norm` of a Trainer).
    """
    batch = bench.probe.claim.expected_batch_size
    for most in CLIPPED:

        def scaled(series: Series, most: float = most) -> Run:
            releases, moves, values = _run(series, name, start)
            if most < math.inf:
                norms = _norms(bench, series) / batch
                releases = releases * np.minimum(1.0, most / np.maximum(norms, 1e-300))[:, None]
            return releases, moves, values

        runs = [scaled(series) for series in bench.series.noises]
        if np.isnan(runs[0][0]).any() and most < math.inf:
            return None
        tolerance = 10 * AGREEMENT * np.max([np.abs(run[1]).max(axis=1) for run in runs], axis=0)
        tolerance = tolerance + 4e-7 * float(np.abs(start).max(initial=0.0)) + 1e-300
        rule = _affine(runs, tolerance) or _adam(runs, tolerance, batch)
        if rule is not None:
            return scaled, rule, _allowed(bench, rule, runs, tolerance)
    return None


def _norms(bench: Bench, series: Series) -> Vector:
    """(STEPS,) of the whole releases, NaN where only a part of their coordinates is kept."""
    whole = all(bench.series.kept[name].size == size for name, size in bench.series.sizes.items())
    squares = sum(np.nansum(rows[:STEPS].astype(np.float64) ** 2, axis=1) for rows in series.noise.values())
    return np.sqrt(squares) if whole else np.full(STEPS, np.nan)


def _allowed(bench: Bench, rule: Rule, runs: Runs, tolerance: Vector) -> Vector:
    """(STEPS,) what a prediction may be off by: rounding and a little of the move, and more where the rule is off
    on what it was learned on, up to MARGIN times what was allowed there."""
    off = np.max([np.nan_to_num(np.abs(rule(*run) - run[1])).max(axis=1) for run in runs], axis=0)
    size = np.max([np.abs(run[1]).max(axis=1) for run in runs], axis=0)
    rounding = tolerance - 10 * AGREEMENT * size
    least = MARGIN * (bench.probe.agreement * size + rounding)
    return np.asarray(np.minimum(MARGIN * tolerance, np.maximum(least, MAGNIFIED * off)))


def _run(series: Series, name: str, start: Vector) -> Run:
    """(releases, moves, values before the step) of the first STEPS steps, each (STEPS, d)."""
    moves = series.moved[name][:STEPS]
    values = start + np.concatenate([np.zeros((1, start.size)), np.cumsum(moves, axis=0)[:-1]])
    return series.release[name][:STEPS], moves, values


def _inputs(run: Run, step: int) -> Vector:
    """(p, d): the release, then what a linear optimiser can remember by: the last move and the present value."""
    releases, moves, values = run
    rows = [releases[step]]
    if step >= 1:
        rows.append(moves[step - 1])
    if step >= 2:
        rows.append(values[step] - values[0])
    return np.stack(rows)


def _affine(runs: Runs, tolerance: Vector) -> Rule | None:
    """Per step and coordinate: move = a + b . inputs; None if that does not fit what it was learned on."""
    if any(not np.isfinite(part).all() for run in runs for part in run):
        return None
    fits = []
    for step in range(STEPS):
        inputs = np.stack([_inputs(run, step) for run in runs])  # (K, p, d)
        moves = np.stack([run[1][step] for run in runs])
        centre, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-300
        design = ((inputs - centre) / scale).transpose(2, 0, 1)
        design = np.concatenate([np.ones((*design.shape[:2], 1)), design], axis=2)  # (d, K, 1 + p)
        weights = np.linalg.pinv(design, rcond=1e-5) @ moves.T[:, :, None]
        residual = np.abs((design @ weights)[:, :, 0].T - moves).max()
        if residual > tolerance[step]:
            return None
        known = np.linalg.matrix_rank(design, tol=1e-4) == design.shape[2]
        fits.append((centre, scale, weights[:, :, 0], known, inputs[:, 0].min(axis=0), inputs[:, 0].max(axis=0)))

    def predict(releases: Vector, moves: Vector, values: Vector) -> Vector:
        out = np.full(moves.shape, np.nan)
        for step, (centre, scale, weights, known, low, high) in enumerate(fits):
            inputs = _inputs((releases, moves, values), step)
            value = weights[:, 0] + ((inputs - centre) / scale * weights[:, 1:].T).sum(axis=0)
            # No release beyond those that it was learned on: a rule that looks affine may bend there (clamped moves).
            inside = (releases[step] >= low) & (releases[step] <= high) & known
            out[step] = np.where(inside, value, np.nan)
        return out

    return predict


def _adam(runs: Runs, tolerance: Vector, batch: float) -> Rule | None:
    """Adam or AdamW: the decay rates that fit best, and a learning rate and weight decay for each step."""
    if any(not np.isfinite(part).all() for run in runs for part in run):
        return None
    values = np.stack([run[2] for run in runs], axis=1)
    moves = np.stack([run[1] for run in runs], axis=1)  # (STEPS, K, d)
    best: tuple[float, tuple[float, float], Vector, Vector] | None = None
    for decays in itertools.product(FIRST_DECAYS, SECOND_DECAYS):
        directions = np.stack([_direction(run[0] / batch, *decays) for run in runs], axis=1)
        rates, known, off = np.zeros((STEPS, 2)), np.zeros(STEPS, dtype=bool), 0.0
        for step in reversed(range(STEPS)):  # late steps tell decay rates apart
            rates[step], known[step] = _rates(directions[step], values[step], moves[step])
            fitted = rates[step, 0] * directions[step] + rates[step, 1] * values[step]
            off = max(off, float(np.abs(fitted - moves[step]).max() / tolerance[step]))
            if off > 1:
                break
        if off <= 1 and (best is None or off < best[0]):
            best = off, decays, rates, known
    if best is None:
        return None
    _, decays, rates, known = best

    def predict(releases: Vector, moves: Vector, values: Vector) -> Vector:
        value = rates[:, :1] * _direction(releases / batch, *decays) + rates[:, 1:] * values
        return np.where(known[:, None], value, np.nan)

    return predict


def _direction(releases: Vector, first: float, second: float) -> Vector:
    """Adam's bias-corrected step for each of the releases (STEPS, d), without the learning rate."""
    mean, square = np.zeros(releases.shape[1]), np.zeros(releases.shape[1])
    out = np.empty_like(releases)
    for step, release in enumerate(releases):
        mean = first * mean + (1 - first) * release
        square = second * square + (1 - second) * release**2
        corrected = np.sqrt(square / (1 - second ** (step + 1))) + 1e-8
        out[step] = mean / (1 - first ** (step + 1)) / corrected
    return out


def _rates(direction: Vector, values: Vector, moves: Vector) -> tuple[Vector, bool]:
    """((2,), known): least squares of a step's moves on Adam's direction and the present values, and whether the two
    can be told apart. In the first step the direction is a sign: a block of one number whose noise has one sign under
    all seeds shows the learning rate and the weight decay together, and predicts nothing for the other sign.
    """
    design = np.stack([direction.reshape(-1), values.reshape(-1)], axis=1)
    scale = np.linalg.norm(design, axis=0)
    used = scale > 0
    scale = np.where(used, scale, 1.0)
    found, _, rank, _ = np.linalg.lstsq(design / scale, moves.reshape(-1), rcond=DISTINCT)
    return np.asarray(found / scale), int(rank) == int(used.sum())
