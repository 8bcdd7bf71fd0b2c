"""Batches of production: a trainer without a noise seed may do otherwise than in tests, from any step on.

Its noise is not known, its clipped sum is: that of the same step with a seed at equal parameters, or the sum of the
clipped gradients that it shows. What is left must be noise of the claimed size in every step, whatever came before.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import norm

from attacks.contract import statistics as stats
from attacks.contract.bench import Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.history import heard
from attacks.contract.noise import level_of, squares
from attacks.contract.probe import Vector
from attacks.contract.production import TRAINERS, row_of
from attacks.contract.result import judged, skipped
from attacks.contract.seeds import Draws
from attacks.contract.subject import Subject
from dpaudit.documents import Check

LATER = "batches without a seed"
LATER_WHY = (
    "In production noise_seed is None. Clipping, noise or sums of later batches that differ from those of a trainer "
    "with a seed: a branch for tests, a warm-up that only tests go through, state that a fixed seed resets."
)


def checks(bench: Bench) -> Iterator[Check]:
    """The one check of this module."""
    yield later(bench)


def later(bench: Bench) -> Check:
    """TRAINERS trainers without a noise seed on batches of steps 2 to 7."""
    draws = Draws(bench)
    if not draws.blocks or bench.probe.std == 0 or bench.empty_problem is not None or draws.unknown:
        return skipped(LATER, "needs noise and empty batches", LATER_WHY)
    allowed = "the clipped sum and noise of the claimed size"
    try:
        found = _compared(bench)
    except MethodFailure as failure:
        return judged(LATER, False, f"with noise_seed=None {failure}", allowed, LATER_WHY)
    if isinstance(found, str):
        return skipped(LATER, found, LATER_WHY)
    return judged(LATER, found[0], found[1], allowed, LATER_WHY)


def _compared(bench: Bench) -> tuple[bool, str] | str:
    """Batches of steps 2 to 7 without a seed, minus the clipped sums that they should have; or why that was not looked
    at. The sums are those of the same step with a seed at equal parameters, or of clipped gradients where the trainer
    shows them and they explain its first step."""
    probe, group = bench.probe, list(bench.picks.group)
    if not probe.deterministic or probe.mechanism not in ("gaussian", "laplace"):
        return "there is no clipped sum to compare with"
    large = sorted(bench.training.pool[: bench.training.largest])
    batches = [group, group[:1], large, group, large, group[:1]]
    # An average of weights may be shown, or nothing can be set: then the sums would belong to other parameters.
    fixed = _sums(bench, batches) if heard(bench, [group], group, probe.start) else None
    if fixed is None and not _explained(bench, [group, large]):
        return "the trainer offers neither assign() nor a gradient() that explains its clipped sums"
    left: list[list[Vector]] = [[] for _ in batches]
    shifts = []
    for _ in range(TRAINERS):
        subject = probe.build(bench.training.records, None)
        subject.ask("step", group)
        for place, batch in enumerate(batches):
            if fixed is not None:
                subject.put(probe.start)
            known = fixed[place] if fixed is not None else _clipped(bench, subject, batch)
            rest = (row_of(probe.watch(subject, batch)) - known) / probe.std
            left[place].append(rest[~np.isnan(rest)])
            known = np.nan_to_num(known)
            if (size := np.linalg.norm(known)) > 0 and probe.mechanism == "gaussian":
                shifts.append((abs(float(np.nan_to_num(rest) @ known) / float(size)), place + 2))
    return _same_sums(bench, [len(batch) for batch in batches], left, shifts)


def _same_sums(
    bench: Bench, sizes: list[int], left: list[list[Vector]], shifts: list[tuple[float, int]]
) -> tuple[bool, str]:
    """left: what each step of each trainer released beyond the expected sum, over sigma C; shifts: standard errors
    along that sum, and the step."""
    laplace, alpha = bench.probe.mechanism == "laplace", stats.ALPHA / 2
    rests = {
        f"step {place + 2}, a batch of {sizes[place]}": squares(np.concatenate(values), laplace)
        for place, values in enumerate(left)
    }
    wrong = "a later batch releases another sum than it should"
    fine, said = level_of(rests, laplace=laplace, alpha=alpha)
    if not fine:
        return False, f"{wrong}: {said})"
    z, step = max(shifts, default=(0.0, 2))
    if shifts and 2 * float(norm.sf(z)) * len(shifts) <= alpha:
        return False, f"{wrong}: {z:.3g} standard errors along it in step {step}"
    return True, f"the sums of {len(sizes)} batches are as expected in {TRAINERS} trainers"


def _sums(bench: Bench, batches: list[list[int]]) -> list[Vector] | None:
    """Clipped sums of steps 2, 3, … at the first parameters, by trainers with a seed; None if these can't be set."""
    probe, found = bench.probe, []
    for place, batch in enumerate(batches):
        one, two = (probe.grown(((),) * (place + 1), bench.training.records) for _ in range(2))
        if not (one.put(probe.start) and two.put(probe.start)):
            return None
        found.append(row_of(probe.watch(one, batch)) - row_of(probe.watch(two, [])))
    return found


def _clipped(bench: Bench, subject: Subject, batch: list[int]) -> Vector:
    """Sum of gradient(record) clipped to C at the parameters of `subject`."""
    probe, total = bench.probe, np.zeros(0)
    for index in batch:
        gradient = probe.gradient(bench.training.records.items[index], subject)
        part = gradient * min(1.0, probe.claim.max_grad_norm / max(probe.size(gradient), 1e-300))
        total = part if not total.size else total + part
    return total


def _explained(bench: Bench, batches: list[list[int]]) -> bool:
    """Whether clipped gradients are what a first step with a seed adds up."""
    probe = bench.probe
    if "gradient" not in probe.offered or set(probe.observe([]).released) != set(probe.shapes):
        return False
    records = bench.training.records
    for batch in batches:
        seen = row_of(probe.observe(batch, records=records)) - row_of(probe.observe([], records=records))
        gap = seen - _clipped(bench, probe.build(records), batch)
        if not np.isfinite(gap).all() or probe.size(gap) > 1e-3 * probe.claim.max_grad_norm * len(batch):
            return False
    return True
