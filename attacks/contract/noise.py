"""The noise itself: how much, which law, and independent of what.

Differences of noise seeds at equal parameters, records and batch cancel the signal exactly, so selection of blocks or
clipping can't bias them. All intervals and p-values are exact under the claim (attacks.contract.statistics).
"""

import math
from collections.abc import Iterator

import numpy as np

from attacks.contract import statistics as stats
from attacks.contract.influence import FROZEN, Bench
from attacks.contract.probe import AGREEMENT, Observation, Probe, Records, Vector
from attacks.contract.result import joined, judged, skipped
from dpaudit.documents import Check

MOST_SEEDS, LEAST_SEEDS, VALUES_WANTED = 200, 24, 400
STEPS = 4


class Draws:
    """Repeated releases under different noise seeds, asked once and used by several checks."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.probe = bench, bench.probe
        first = self.probe.observe(self.batch)
        self.blocks = sorted(first.noised)
        smallest = min((first.released[name].size for name in self.blocks), default=1)  # type: ignore[union-attr]
        self.seeds = min(MOST_SEEDS, max(LEAST_SEEDS, 2 * math.ceil(VALUES_WANTED / smallest / 2)))

    @property
    def batch(self) -> list[int]:
        """Two ordinary units."""
        return [self.bench.picks.anchor, self.bench.picks.group[0]]

    def full(self, name: str) -> Vector:
        """(K, d) released block `name` on the batch, a row a noise seed."""
        return np.stack([_block(self.probe.observe(self.batch, noise=k), name) for k in range(self.seeds)])

    def empty(self, name: str) -> Vector:
        """(K, d) the same for an empty batch."""
        return np.stack([_block(self.probe.observe([], noise=k), name) for k in range(self.seeds)])

    def paired(self, name: str) -> Vector:
        """(K / 2, d) differences of disjoint pairs of seeds: the signal is gone, the noise has twice the variance."""
        values = self.full(name)
        return np.asarray((values[0::2] - values[1::2]) / math.sqrt(2.0))


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
    "Noise on the sum must have standard deviation sigma * C in every block. Too little: sigma without C, C / B used "
    "for the sum, deviations added over micro-steps or workers, a multiplier read as 0. Too much costs accuracy."
)


def level(draws: Draws) -> Check:
    """Per block: sum of squared deviations over noise seeds, chi-square exact; all blocks together as one more test."""
    probe = draws.probe
    first = _first_step_factor(probe)
    if first is None:
        return skipped(LEVEL, "correlated noise, and the trainer offers no mixing() to say how it is made", LEVEL_WHY)
    std = probe.std * first
    if std == 0:
        return judged(LEVEL, False, "the claim itself says noise multiplier 0", "more than 0", LEVEL_WHY)
    if not draws.blocks:
        return judged(LEVEL, False, "no block received noise", f"std {std:.4g} on the sum", LEVEL_WHY)
    if probe.mechanism == "laplace" and draws.bench.empty_problem is not None:
        return skipped(LEVEL, f"empty batch: {draws.bench.empty_problem}", LEVEL_WHY)
    sums = {name: _squares(draws, name, std) for name in draws.blocks}
    sums["all blocks"] = (sum(part[0] for part in sums.values()), sum(part[1] for part in sums.values()))
    alpha = stats.ALPHA / len(sums)
    laplace = probe.mechanism == "laplace"
    p_of = stats.laplace_scale_p if laplace else stats.variance_p
    interval = stats.laplace_interval if laplace else stats.std_interval
    worst = min(sums, key=lambda name: p_of(*sums[name]))
    low, high = interval(*sums[worst], alpha)
    fine = p_of(*sums[worst]) > alpha
    total, freedom = sums[worst]
    ratio = total / freedom if laplace else math.sqrt(total / freedom)
    measured = (
        f"{ratio:.3g} x the claimed noise in {worst!r} ({low:.3g} to {high:.3g}; {draws.seeds} noise seeds, "
        f"{len(sums) - 1} blocks)"
    )
    return judged(LEVEL, fine, measured, "an interval that holds 1 in every block", LEVEL_WHY)


def _first_step_factor(probe: Probe) -> float | None:
    if probe.mechanism != "correlated":
        return 1.0
    matrix = mixing(probe, 1)
    return None if matrix is None else abs(float(matrix[0, 0]))


def mixing(probe: Probe, steps: int) -> Vector | None:
    """The trainer's own statement of how its correlated noise is made; None if it makes none."""
    if "mixing" not in probe.offered:
        return None
    matrix = probe.build().ask("mixing", steps)
    return np.asarray(matrix.detach().to("cpu").double().numpy(), dtype=np.float64)


def _squares(draws: Draws, name: str, std: float) -> tuple[float, int]:
    """(statistic, degrees of freedom) in claimed units."""
    if draws.probe.mechanism == "laplace":
        values = draws.empty(name) / std
        return float(np.abs(values).sum()), values.size
    values = draws.full(name) / std
    centred = values - values.mean(axis=0)
    return float((centred**2).sum()), (values.shape[0] - 1) * values.shape[1]


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
    empty = draws.bench.empty_problem is None
    if probe.mechanism == "laplace" and not empty:
        return skipped(LAW, f"empty batch: {draws.bench.empty_problem}", LAW_WHY)
    first = _first_step_factor(probe) or 1.0
    source = draws.empty if empty else draws.paired
    values = np.concatenate([source(name).reshape(-1) for name in draws.blocks]) / (probe.std * first)
    if values.size > 100_000:
        values = np.random.default_rng(probe.seed).choice(values, 100_000, replace=False)
    p = stats.law_p(values, "laplace" if probe.mechanism == "laplace" else "norm")
    measured = f"Kolmogorov-Smirnov p = {p:.2g} over {values.size} values"
    return judged(LAW, p > stats.ALPHA, measured, f"p above {stats.ALPHA:g}", LAW_WHY)


OVER_STEPS = "noise over steps"
OVER_STEPS_WHY = (
    "The noise of one step must be independent of that of every other; the same noise twice cancels in a difference. "
    "Usually a generator that is seeded anew in every step."
)


def over_steps(draws: Draws) -> Check:
    """Empty batches release pure noise whatever the parameters; all pairs of the first steps are compared."""
    bench, probe = draws.bench, draws.probe
    if bench.empty_problem is not None:
        return skipped(OVER_STEPS, f"needs an empty batch: {bench.empty_problem}", OVER_STEPS_WHY)
    whitening: Vector = np.eye(STEPS, dtype=np.float64)
    if probe.mechanism == "correlated":
        matrix = mixing(probe, STEPS)
        if matrix is None:
            return skipped(OVER_STEPS, "correlated noise by claim, and no mixing() to judge it by", OVER_STEPS_WHY)
        whitening = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
    size = probe.observe([]).vector.size
    series = [noise_of_steps(bench, k) for k in range(min(MOST_SEEDS, max(4, math.ceil(200 / size))))]
    steps = np.concatenate(series, axis=1)
    white = whitening @ steps
    worst = _worst_pair(
        probe, [(f"steps {a + 1} and {b + 1}", white[a], white[b]) for b in range(STEPS) for a in range(b)]
    )
    return _correlation_check(OVER_STEPS, worst, OVER_STEPS_WHY)


def noise_of_steps(bench: Bench, noise: int, steps: int = STEPS) -> Vector:
    """(steps, d) noise of the first steps of one trainer."""
    subject = bench.probe.build(bench.probe.own, noise)
    return np.stack([bench.probe.watch(subject, []).vector for _ in range(steps)])


Pair = tuple[str, Vector, Vector]


def _worst_pair(probe: Probe, pairs: list[Pair]) -> tuple[float, float, str, int]:
    """(p corrected for the number of pairs, correlation, which, pairs)."""
    test = stats.symmetric_correlation if probe.mechanism == "laplace" else stats.correlation
    best = (1.0, 0.0, "")
    for what, x, y in pairs:
        r, p = test(x, y)
        if p < best[0]:
            best = (p, r, what)
    return min(1.0, best[0] * len(pairs)), best[1], best[2], len(pairs)


def _correlation_check(name: str, worst: tuple[float, float, str, int], why: str) -> Check:
    p, r, what, pairs = worst
    measured = f"largest correlation {r:.3g} ({what or 'none'}), p = {p:.2g} over {pairs} pairs"
    return judged(name, p > stats.ALPHA, measured, f"no correlation: p above {stats.ALPHA:g}", why)


OVER_PARAMETERS = "noise over parameters"
OVER_PARAMETERS_WHY = (
    "Blocks must not share noise: it cancels in differences between them. Usually a generator that is seeded anew for "
    "every parameter, or the same stream on every rank."
)


def over_parameters(draws: Draws) -> Check:
    """Beginnings of all pairs of blocks."""
    if draws.probe.mechanism == "zeroth-order" or len(draws.blocks) < 2:
        return skipped(OVER_PARAMETERS, "only one noisy block (zeroth-order noise is one number)", OVER_PARAMETERS_WHY)
    values = {name: draws.paired(name) for name in draws.blocks}
    pairs: list[Pair] = []
    for place, one in enumerate(draws.blocks):
        for two in draws.blocks[:place]:
            m = min(values[one].shape[1], values[two].shape[1])
            pairs.append((f"{two} and {one}", values[one][:, :m].reshape(-1), values[two][:, :m].reshape(-1)))
    return _correlation_check(OVER_PARAMETERS, _worst_pair(draws.probe, pairs), OVER_PARAMETERS_WHY)


WITHIN = "noise within a parameter"
WITHIN_WHY = "Every coordinate needs its own noise. Usually one row of noise that is broadcast over a matrix."


def within_parameters(draws: Draws) -> Check:
    """Disjoint pairs of neighbouring rows and of neighbouring coordinates of each block."""
    if draws.probe.mechanism == "zeroth-order":
        return skipped(WITHIN, "zeroth-order noise is one number", WITHIN_WHY)
    pairs: list[Pair] = []
    for name in draws.blocks:
        values, shape = draws.paired(name), draws.probe.shapes[name]
        if values.shape[1] >= 2:
            even = values.shape[1] // 2 * 2
            pairs.append((f"coordinates of {name}", values[:, 0:even:2].reshape(-1), values[:, 1:even:2].reshape(-1)))
        if len(shape) > 1 and shape[0] >= 2:
            rows = values.reshape(values.shape[0], shape[0], -1)[:, : shape[0] // 2 * 2]
            pairs.append((f"rows of {name}", rows[:, 0::2].reshape(-1), rows[:, 1::2].reshape(-1)))
    if not pairs:
        return skipped(WITHIN, "every block has a single coordinate", WITHIN_WHY)
    return _correlation_check(WITHIN, _worst_pair(draws.probe, pairs), WITHIN_WHY)


OF_DATA = "noise independent of data"
OF_DATA_WHY = (
    "The noise of a noise seed must be the same whatever the records. If its size follows the data ('local "
    "sensitivity', the largest norm seen) or it is drawn per record, the noise itself tells about them."
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
    gap = max(float(np.linalg.norm(other - reference)) for other in others) if size else 0.0
    ratio = gap / size if size else 0.0
    seen = [probe.observe([bench.picks.place], records=item.records) for item in bench.usable]
    allowed = AGREEMENT + (4 * probe.slack(probe.observe([bench.picks.anchor]), *seen) / size if size else 0.0)
    measured = f"the noise changed by {ratio:.2g} of its size over {len(others)} other units"
    return judged(OF_DATA, ratio <= allowed, measured, f"at most {allowed:.2g}", OF_DATA_WHY)


def _noise_difference(probe: Probe, batch: list[int], records: Records | None) -> Vector:
    one = probe.observe(batch, records=records, noise=0).vector
    return one - probe.observe(batch, records=records, noise=1).vector


NORMALISATION = "normalisation"
NORMALISATION_WHY = (
    "The noisy sum is divided by a public number. Dividing by the realised Poisson batch size, or by n q of the "
    "private n, discloses how many there were and shrinks the noise (Opacus issues 571, 819)."
)


def normalisation(draws: Draws) -> Check:
    """The noise of one seed on batches of different sizes, and in a smaller data set: its scale must not move."""
    bench, probe = draws.bench, draws.probe
    if not probe.deterministic:
        return skipped(NORMALISATION, FROZEN, NORMALISATION_WHY)
    picks = bench.picks
    reference = _noise_difference(probe, [picks.anchor], None)
    batches: list[tuple[str, list[int], Records | None]] = [
        (f"a batch of {len(picks.group)}", list(picks.group), None),
        ("a batch of 2", draws.batch, None),
        ("a data set of one less", [picks.anchor - (picks.anchor > picks.place)], probe.dropped(picks.place)),
    ]
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
