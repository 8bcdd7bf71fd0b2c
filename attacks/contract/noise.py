"""The noise itself: how much, which law, and independent of what.

Where an empty batch is a step, its release is noise and nothing else, so whole trainings on empty batches show the
noise of every step. Differences of noise seeds at equal parameters, records and batch cancel the signal exactly, so
selection of blocks or clipping can't bias them. All intervals and p-values are exact under the claim
(attacks.contract.statistics).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from attacks.contract import statistics as stats
from attacks.contract.bench import FROZEN, Bench
from attacks.contract.probe import AGREEMENT, Observation, Probe, Records, Vector
from attacks.contract.result import joined, judged, skipped
from attacks.contract.training import NOISE_STEPS, STAGES
from dpaudit.documents import Check

MOST_SEEDS, LEAST_SEEDS, VALUES_WANTED = 200, 24, 400
FEW_SEEDS = 10  # where the factory is slow
MOST_PAIRED = 20_000  # values of a pair of blocks
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
        rows = [_block(self.probe.observe(self.batch, noise=k), name) for k in range(self.seeds)]
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


def _block(seen: Observation, name: str) -> Vector:
    value = seen.released.get(name)
    size = seen.moved[name].size if name in seen.moved else 1
    return value if value is not None else np.zeros(size)


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    draws = Draws(bench)
    level_check = level(draws)
    yield level_check
    yield law(draws, right_level=level_check.status == "pass")
    yield over_steps(draws)
    yield over_parameters(draws)
    yield within_parameters(draws)
    yield of_data(draws)
    yield normalisation(draws)
    yield empty_batch(draws)


LEVEL = "noise level"
LEVEL_WHY = (
    "Noise on the sum must have standard deviation sigma * C in every block and in every step. Too little: sigma "
    "without C, C / B used for the sum, deviations added over micro-steps or workers, a multiplier read as 0, a "
    "schedule that lowers it. Too much costs accuracy."
)

Squares = dict[str, tuple[float, int]]  # label -> statistic in claimed units, degrees of freedom


def level(draws: Draws) -> Check:
    """Sums of squares over seeds and steps, chi-square exact: per block and third of the training, and per step."""
    probe = draws.probe
    if draws.unknown:
        return skipped(LEVEL, "correlated noise, and the trainer offers no mixing() to say how it is made", LEVEL_WHY)
    if probe.std == 0:
        return judged(LEVEL, False, "the claim itself says noise multiplier 0", "more than 0", LEVEL_WHY)
    if not draws.blocks:
        return judged(LEVEL, False, "no block received noise", f"std {probe.std:.4g} on the sum", LEVEL_WHY)
    if probe.mechanism == "laplace" and not draws.empty:
        return skipped(LEVEL, f"empty batch: {draws.bench.empty_problem}", LEVEL_WHY)
    sums = {} if probe.mechanism == "laplace" else _on_a_batch(draws)
    steps = 1
    if draws.empty:
        sums = _over_training(draws) | sums
        steps = len(draws.bench.training.noise) if draws.mixing is None else WHITENED_STEPS
    fine, measured = level_of(sums, laplace=probe.mechanism == "laplace")
    measured += f"; {draws.seeds} noise seeds on a batch, steps 1 to {steps} on empty ones, {len(draws.blocks)} blocks)"
    return judged(LEVEL, fine, measured, "an interval that holds 1 in every block and step", LEVEL_WHY)


def level_of(sums: Squares, *, laplace: bool, alpha: float = stats.ALPHA) -> tuple[bool, str]:
    """Whether all are as claimed at `alpha` in all, and the beginning of a line that names the worst."""
    share = alpha / len(sums)
    p_of = stats.laplace_scale_p if laplace else stats.variance_p
    interval = stats.laplace_interval if laplace else stats.std_interval
    worst = min(sums, key=lambda name: p_of(*sums[name]))
    low, high = interval(*sums[worst], share)
    total, freedom = sums[worst]
    scale = total / freedom if laplace else math.sqrt(total / freedom)
    measured = f"{scale:.3g} x the claimed noise in {worst!r} ({low:.3g} to {high:.3g}; {len(sums)} tests"
    return p_of(*sums[worst]) > share, measured


def mixing(probe: Probe, steps: int) -> Vector | None:
    """The trainer's own statement of how its correlated noise is made; None if it makes none."""
    if "mixing" not in probe.offered:
        return None
    matrix = probe.build().ask("mixing", steps)
    return np.asarray(matrix.detach().to("cpu").double().numpy(), dtype=np.float64)


def _on_a_batch(draws: Draws) -> Squares:
    """First step, two units: deviations from the mean over noise seeds."""
    std = draws.probe.std * (abs(float(draws.mixing[0, 0])) if draws.mixing is not None else 1.0)
    sums: Squares = {}
    for name in draws.blocks:
        values = draws.full(name) / std
        centred = values - values.mean(axis=0)
        sums[f"{name}, on a batch"] = float((centred**2).sum()), (values.shape[0] - 1) * values.shape[1]
    return sums


def squares(values: Vector, laplace: bool) -> tuple[float, int]:
    """Statistic and degrees of freedom of noise in claimed units; NaN = no noise was due."""
    values = values[~np.isnan(values)]
    return float(np.abs(values).sum() if laplace else (values**2).sum()), values.size


def _over_training(draws: Draws) -> Squares:
    """Empty batches: everything, each block over thirds of the training, and every step."""
    probe, laplace = draws.probe, draws.probe.mechanism == "laplace"
    white = {name: draws.white(name) / probe.std for name in draws.bench.series.blocks}
    steps = next(iter(white.values())).shape[1]
    everything = [squares(values, laplace) for values in white.values()]
    sums = {"all blocks": (sum(part[0] for part in everything), sum(part[1] for part in everything))}
    for name, values in white.items():
        for third in np.array_split(np.arange(steps), 3):
            label = f"{name}, steps {third[0] + 1} to {third[-1] + 1}"
            sums[label] = squares(values[:, third], laplace)
    for step in range(steps):
        sums[f"step {step + 1}"] = squares(
            np.concatenate([values[:, step].reshape(-1) for values in white.values()]), laplace
        )
    if draws.mixing is None:
        for step, seen in enumerate(draws.bench.training.noise[steps:], steps + 1):
            parts = [value for value in seen.released.values() if value is not None]
            if parts:
                sums[f"step {step}"] = squares(np.concatenate(parts) / probe.std, laplace)
    return {label: found for label, found in sums.items() if found[1] > 0}


LAW = "noise law"
LAW_WHY = (
    "The proof needs the claimed law and not only its variance: uniform or truncated noise of the right variance has "
    "no finite eps (rand for randn, clamped noise)."
)


def law(draws: Draws, *, right_level: bool) -> Check:
    """Kolmogorov-Smirnov of the pooled noise."""
    probe = draws.probe
    if not right_level:
        return skipped(LAW, "the noise level is not as claimed, so its law can't be compared", LAW_WHY)
    if probe.mechanism == "laplace" and not draws.empty:
        return skipped(LAW, f"empty batch: {draws.bench.empty_problem}", LAW_WHY)
    first = abs(float(draws.mixing[0, 0])) if draws.mixing is not None and not draws.empty else 1.0
    values = np.concatenate([draws.rows(name).reshape(-1) for name in draws.blocks]) / (probe.std * first)
    p, count = law_of(probe, values)
    measured = f"Kolmogorov-Smirnov p = {p:.2g} over {count} values"
    return judged(LAW, p > stats.ALPHA, measured, f"p above {stats.ALPHA:g}", LAW_WHY)


def law_of(probe: Probe, values: Vector) -> tuple[float, int]:
    """p of standardised noise under the claimed law, and over how many values."""
    if values.size > 100_000:
        values = np.random.default_rng(probe.seed).choice(values, 100_000, replace=False)
    return stats.law_p(values, "laplace" if probe.mechanism == "laplace" else "norm"), values.size


OVER_STEPS = "noise over steps"
OVER_STEPS_WHY = (
    "The noise of one step must be independent of that of every other; the same noise twice cancels in a difference. "
    "Usually a generator that is seeded anew in every step, or a pool of draws that is used in turn."
)


def over_steps(draws: Draws) -> Check:
    """Empty batches release pure noise whatever the parameters; all pairs of steps are compared."""
    bench, probe = draws.bench, draws.probe
    if bench.empty_problem is not None:
        return skipped(OVER_STEPS, f"needs an empty batch: {bench.empty_problem}", OVER_STEPS_WHY)
    if draws.unknown:
        return skipped(OVER_STEPS, "correlated noise by claim, and no mixing() to judge it by", OVER_STEPS_WHY)
    white = [draws.white(name) for name in bench.series.blocks]
    steps = np.concatenate([values.transpose(1, 0, 2).reshape(values.shape[1], -1) for values in white], axis=1)
    tests = [stats.most_correlated(np.nan_to_num(steps), symmetric=probe.mechanism == "laplace")]
    longest = len(bench.training.noise)
    if draws.mixing is None and longest > NOISE_STEPS:  # a pool of draws that is longer than the trainings above
        whole = np.stack([seen.vector for seen in bench.training.noise])
        if whole.shape[1] >= stats.FEWEST:
            tests.append(stats.most_correlated(whole, symmetric=probe.mechanism == "laplace"))
    r, p, where, pairs = min(tests, key=lambda test: test[1])
    p = min(1.0, p * len(tests))
    what = f"steps {where[0] + 1} and {where[1] + 1}"
    measured = f"largest correlation {r:.3g} ({what}), p = {p:.2g} over {pairs} pairs of steps 1 to {longest}"
    return judged(OVER_STEPS, p > stats.ALPHA, measured, f"no correlation: p above {stats.ALPHA:g}", OVER_STEPS_WHY)


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


def correlation_check(name: str, worst: tuple[float, float, str, int], why: str) -> Check:
    """No correlation at the level of one check."""
    p, r, what, pairs = worst
    measured = f"largest correlation {r:.3g} ({what or 'none'}), p = {p:.2g} over {pairs} pairs"
    return judged(name, p > stats.ALPHA, measured, f"no correlation: p above {stats.ALPHA:g}", why)


OVER_PARAMETERS = "noise over parameters"
OVER_PARAMETERS_WHY = (
    "Blocks must not share noise: it cancels in differences between them. Usually a generator that is seeded anew for "
    "every parameter, or the same stream on every rank."
)


def over_parameters(draws: Draws) -> Check:
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
    return correlation_check(OVER_PARAMETERS, worst_pair(draws.probe, pairs), OVER_PARAMETERS_WHY)


def _all_rows(draws: Draws, name: str) -> Vector:
    """Rows in one order for all blocks; zeros where a block was not noised (they say nothing, and are left out)."""
    if not draws.empty:
        return draws.paired(name)
    white = draws.white(name)
    return np.nan_to_num(white.reshape(-1, white.shape[2]))


WITHIN = "noise within a parameter"
WITHIN_WHY = "Every coordinate needs its own noise. Usually one row of noise that is broadcast over a matrix."


def within_parameters(draws: Draws) -> Check:
    """Disjoint pairs of neighbouring rows and of neighbouring coordinates of each block."""
    if draws.probe.mechanism == "zeroth-order":
        return skipped(WITHIN, "zeroth-order noise is one number", WITHIN_WHY)
    if draws.unknown:
        return skipped(WITHIN, "correlated noise, and no mixing() to judge it by", WITHIN_WHY)
    pairs: list[Pair] = []
    for name in draws.blocks:
        # Of a large block a part of the coordinates is kept; rows are then compared in the first step.
        values, shape = draws.rows(name), draws.probe.shapes[name]
        if values.shape[1] < math.prod(shape):
            values = _whole_rows(draws, name)
        if values.shape[1] >= 2:
            even = values.shape[1] // 2 * 2
            pairs.append((f"coordinates of {name}", values[:, 0:even:2].reshape(-1), values[:, 1:even:2].reshape(-1)))
        if len(shape) > 1 and shape[0] >= 2:
            rows = values.reshape(values.shape[0], shape[0], -1)[:, : shape[0] // 2 * 2]
            pairs.append((f"rows of {name}", rows[:, 0::2].reshape(-1), rows[:, 1::2].reshape(-1)))
    if not pairs:
        return skipped(WITHIN, "every block has a single coordinate", WITHIN_WHY)
    return correlation_check(WITHIN, worst_pair(draws.probe, pairs), WITHIN_WHY)


def _whole_rows(draws: Draws, name: str) -> Vector:
    values = [_block(draws.probe.observe(draws.batch, noise=k), name) for k in range(2)]
    return np.asarray((values[0] - values[1])[None] / math.sqrt(2.0))


OF_DATA = "noise independent of data"
OF_DATA_WHY = (
    "The noise of a noise seed must be the same whatever the records, in every step. If its size follows the data "
    "('local sensitivity', the largest norm seen) or it is drawn per record, the noise itself tells about them."
)


def of_data(draws: Draws) -> Check:
    """The difference of two noise seeds, on batches of one size with different units; nothing statistical."""
    bench, probe = draws.bench, draws.probe
    if not probe.deterministic:
        return skipped(OF_DATA, FROZEN, OF_DATA_WHY)
    reference = _noise_difference(probe, [bench.picks.anchor], None)
    others = [_noise_difference(probe, [unit], None) for unit in bench.picks.group]
    others += [_noise_difference(probe, [bench.picks.place], item.records) for item in bench.usable]
    size = float(np.linalg.norm(reference))
    if size == 0:
        return skipped(OF_DATA, "two noise seeds released the same, so there is no noise to compare", OF_DATA_WHY)
    late = _late_ratio(bench)
    ratio = max(float(np.linalg.norm(other - reference)) for other in others) / size
    ratio = max(ratio, late or 0.0)
    seen = [probe.observe([bench.picks.place], records=item.records) for item in bench.usable]
    allowed = AGREEMENT + 4 * probe.slack(probe.observe([bench.picks.anchor]), *seen) / size
    measured = f"the noise changed by {ratio:.2g} of its size over {len(others)} other units"
    if late is not None:
        measured += f", and on a batch in step {STAGES['late']}"
    return judged(OF_DATA, ratio <= allowed, measured, f"at most {allowed:.2g}", OF_DATA_WHY)


def _late_ratio(bench: Bench) -> float | None:
    """The same late in a training: two seeds at equal parameters on a batch, against both on empty batches."""
    probe, training, step = bench.probe, bench.training, STAGES["late"]
    if bench.empty_problem is not None or not bench.series.kept:
        return None
    path, seen = tuple(map(tuple, training.batches[: step - 1])), []
    for noise in (0, 1):
        subject = probe.grown(path, training.records, noise)
        if not subject.put(probe.start):
            return None
        seen.append(probe.watch(subject, training.pool[: training.largest]))
    if seen[0].noised != seen[1].noised:  # blocks chosen by earlier noise: the clipped sums differ, not the noise alone
        return None
    names = [name for name in bench.series.blocks if name in seen[0].noised]
    pure = [bench.series.noises[noise].noise for noise in (0, 1)]
    names = [name for name in names if not np.isnan(pure[0][name][step - 1]).any()]
    if not names or not all(np.isfinite(item.vector).all() for item in seen):
        return None
    kept = bench.series.kept
    batch = np.concatenate([_block(seen[0], name)[kept[name]] - _block(seen[1], name)[kept[name]] for name in names])
    empty = np.concatenate([(pure[0][name] - pure[1][name])[step - 1].astype(np.float64) for name in names])
    rounding = 4 * probe.slack(*seen) / max(float(np.linalg.norm(empty)), 1e-300)
    return max(0.0, float(np.linalg.norm(batch - empty)) / max(float(np.linalg.norm(empty)), 1e-300) - rounding)


def _noise_difference(probe: Probe, batch: list[int], records: Records | None) -> Vector:
    one = probe.observe(batch, records=records, noise=0).vector
    return one - probe.observe(batch, records=records, noise=1).vector


NORMALISATION = "normalisation"
NORMALISATION_WHY = (
    "The noisy sum is divided by a public number. Dividing by the realised Poisson batch size, by n q of the private "
    "n, or the noise by the number of micro-batches discloses how many there were and shrinks the noise (Opacus issues "
    "571, 819)."
)


def normalisation(draws: Draws) -> Check:
    """The noise of one seed on batches of different sizes, and in a smaller data set: its scale must not move."""
    bench, probe = draws.bench, draws.probe
    if not probe.deterministic:
        return skipped(NORMALISATION, FROZEN, NORMALISATION_WHY)
    picks, training = bench.picks, bench.training
    reference = _noise_difference(probe, [picks.anchor], None)
    batches: list[tuple[str, list[int], Records | None]] = [
        (f"a batch of {len(picks.group)}", list(picks.group), None),
        ("a batch of 2", draws.batch, None),
        (f"a batch of {training.largest}", sorted(training.pool[: training.largest]), training.records),
    ]
    if not probe.public_size:
        less = [picks.anchor - (picks.anchor > picks.place)]
        batches.append(("a data set of one less", less, probe.dropped(picks.place)))
    if bench.empty_problem is None:
        batches.append(("an empty batch", [], None))
    energy = float(reference @ reference)
    if energy == 0:
        return skipped(NORMALISATION, "there is no noise whose scale could be compared", NORMALISATION_WHY)
    scales = {
        what: float(_noise_difference(probe, batch, records) @ reference) / energy for what, batch, records in batches
    }
    worst = max(scales, key=lambda what: abs(scales[what] - 1))
    measured = f"noise x {scales[worst]:.4g} in {worst} compared with a batch of 1"
    fine = abs(scales[worst] - 1) <= AGREEMENT
    return judged(NORMALISATION, fine, measured, f"1 within {AGREEMENT:g}", NORMALISATION_WHY)


EMPTY = "empty batch"
EMPTY_WHY = (
    "Poisson sampling draws empty batches, and an empty one must be a step of noise alone. Usually it crashes, is "
    "skipped without noise, or is filled up with a made-up record, which makes a unit's presence count 2C."
)


def empty_batch(draws: Draws) -> Check:
    """It runs, has the claimed noise, and no signal: f([]) = f(a) + f(b) - f(a, b) under frozen noise."""
    bench, probe = draws.bench, draws.probe
    allowed = "noise as claimed, and nothing else"
    if bench.empty_problem is not None:
        return judged(EMPTY, False, bench.empty_problem, allowed, EMPTY_WHY)
    missing = set(draws.blocks) - probe.observe([]).noised
    if missing:
        return judged(EMPTY, False, f"no noise in {joined(missing)}", allowed, EMPTY_WHY)
    if not probe.deterministic:
        return skipped(EMPTY, FROZEN, EMPTY_WHY)
    one, two = draws.batch
    expected = probe.observe([one]).vector + probe.observe([two]).vector - probe.observe([one, two]).vector
    signal = probe.size(probe.observe([]).vector - expected) / probe.claim.max_grad_norm
    limit = 2 * AGREEMENT + 6 * bench.slack() / probe.claim.max_grad_norm
    measured = f"released noise and a signal of {signal:.3g} C"
    return judged(EMPTY, signal <= limit, measured, f"a signal of at most {limit:.2g} C", EMPTY_WHY)
