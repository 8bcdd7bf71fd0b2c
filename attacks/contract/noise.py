"""The noise itself: how much, which law, and independent of what.

Where an empty batch is a step, its release is noise and nothing else, so whole trainings on empty batches show the
noise of every step. Differences of noise seeds at equal parameters, records and batch cancel the signal exactly, so
selection of blocks or clipping can't bias them. All intervals and p-values are exact under the claim
(attacks.contract.statistics).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from attacks.contract import independence
from attacks.contract import statistics as stats
from attacks.contract.bench import FROZEN, Bench
from attacks.contract.noise_table import Tables, least
from attacks.contract.probe import AGREEMENT, Probe, Records, Vector
from attacks.contract.result import joined, judged, skipped
from attacks.contract.seeds import WHITENED_STEPS, Draws, block_of
from attacks.contract.training import NOISE_STEPS, STAGES
from dpaudit.documents import Check

PARTS = 8  # of the training on empty batches: the level of each, and from each to the end


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    draws = Draws(bench)
    level_check = level(draws)
    yield level_check
    tables = Tables(draws) if level_check.status == "pass" else None
    yield law(draws, tables=tables)
    yield from independence.checks(draws, tables=tables)
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
    if fine and not draws.empty:
        why = f"{measured}, but later steps were not tested: they need an empty batch ({draws.bench.empty_problem})"
        return skipped(LEVEL, why, LEVEL_WHY)
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
        sums |= _later(draws, steps)
    return {label: found for label, found in sums.items() if found[1] > 0}


def _later(draws: Draws, steps: int) -> Squares:
    """The first training beyond `steps`: every step; and each block and all of them in parts of it, and from each part
    to the end, so that a level that falls late is seen by all steps after it together."""
    probe, laplace, course = draws.probe, draws.probe.mechanism == "laplace", draws.bench.training.noise
    names = draws.bench.series.blocks
    each: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for seen in course:
        for name in names:
            value = seen.released.get(name)
            each[name].append((0.0, 0) if value is None else squares(value / probe.std, laplace))
    each["all blocks"] = [_added(row) for row in zip(*each.values(), strict=True)]
    sums = {f"step {step}": each["all blocks"][step - 1] for step in range(steps + 1, len(course) + 1)}
    if len(course) > steps:
        for name, row in each.items():
            for part in np.array_split(np.arange(len(course)), PARTS):
                first, last = int(part[0]), int(part[-1])
                sums[f"{name}, steps {first + 1} to {last + 1} of one training"] = _added(row[first : last + 1])
                sums[f"{name}, from step {first + 1} of one training on"] = _added(row[first:])
    return sums


def _added(found: Sequence[tuple[float, int]]) -> tuple[float, int]:
    return sum(part[0] for part in found), sum(part[1] for part in found)


MOST_IN_BODY = 100_000  # values that Kolmogorov-Smirnov and the grid look at; the largest are those of all

LAW = "noise law"
LAW_WHY = (
    "The proof needs the claimed law and not only its variance: uniform or truncated noise of the right variance has "
    "no finite eps (rand for randn, clamped noise)."
)


def law(draws: Draws, *, tables: Tables | None) -> Check:
    """The pooled noise: its body, its largest values, whether it lies on a grid; the norms of blocks; equal numbers."""
    probe = draws.probe
    if tables is None:
        return skipped(LAW, "the noise level is not known to be as claimed, so its law can't be compared", LAW_WHY)
    if probe.mechanism == "laplace" and not draws.empty:
        return skipped(LAW, f"empty batch: {draws.bench.empty_problem}", LAW_WHY)
    first = abs(float(draws.mixing[0, 0])) if draws.mixing is not None and not draws.empty else 1.0
    values = np.concatenate([draws.rows(name).reshape(-1) for name in draws.blocks]) / (probe.std * first)
    if draws.empty and draws.mixing is None:  # one longer training beside the shorter ones
        later = [seen.vector for seen in draws.bench.training.noise[NOISE_STEPS:]]
        values = np.concatenate([values, *(part[part != 0] / probe.std for part in later)])
    single, which, count = law_of(probe, values)
    found = [(single, f"{count} values ({which})"), tables.of_law(), tables.equal()]
    p, what = least(found)
    measured = f"p = {p:.2g} over {what}" if what == found[0][1] else f"{what}, p = {p:.2g}"
    return judged(LAW, p > stats.ALPHA, measured, f"p above {stats.ALPHA:g}", LAW_WHY)


def law_of(probe: Probe, values: Vector) -> tuple[float, str, int]:
    """p of standardised noise under the claimed law, by which test, and over how many values."""
    order = np.random.default_rng(probe.seed)
    body = order.choice(values, MOST_IN_BODY, replace=False) if values.size > MOST_IN_BODY else None
    p, which = stats.law_p(values, "laplace" if probe.mechanism == "laplace" else "norm", body=body)
    return p, which, values.size


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
    batch = np.concatenate(
        [block_of(seen[0], name)[kept[name]] - block_of(seen[1], name)[kept[name]] for name in names]
    )
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
    batches += [(f"a batch of {len(batch)}", batch, training.records) for batch in training.every_size]
    energy = float(reference @ reference)
    if energy == 0:
        return skipped(NORMALISATION, "there is no noise whose scale could be compared", NORMALISATION_WHY)
    scales = {
        what: float(_noise_difference(probe, batch, records) @ reference) / energy for what, batch, records in batches
    }
    worst = max(scales, key=lambda what: abs(scales[what] - 1))
    measured = f"noise x {scales[worst]:.4g} in {worst} compared with a batch of 1 (batches {training.looked_at})"
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
    if bench.empty_problem is not None and probe.claim.sampling not in ("poisson", "allocation"):
        why = f"{probe.claim.sampling} batches are never empty, and the trainer takes none ({bench.empty_problem})"
        return skipped(EMPTY, why, EMPTY_WHY)
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
