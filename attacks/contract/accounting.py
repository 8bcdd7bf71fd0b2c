"""The eps that the trainer reports, against an accountant of our own; and what a checkpoint forgets."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attacks.contract import statistics as stats
from attacks.contract.guard import MethodFailure
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe, Subject, Vector
from attacks.contract.result import judged, skipped
from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Check

STEPS = 20
DEFAULT_DELTA = 1e-5
# Ours is an upper bound, tight to 1e-4; accountants that are right to 1 % (PRV at eps_error 0.01) still pass.
RELATIVE, ABSOLUTE = 0.01, 0.005
RESUME_SEEDS = 8

EPSILON = "eps reported"
EPSILON_WHY = (
    "The eps that the trainer reports may not be below what (sigma, q, steps taken) spend under the claimed relation. "
    "Usually: a wrong sample rate, shuffled batches accounted as Poisson, replace-one accounted as add/remove, the CLT "
    "approximation, empty batches or the last step not counted, the target reported instead of what was spent."
)


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    yield epsilon(bench)
    yield from resume(bench)


def epsilon(bench: Bench) -> Check:
    """After one step (an empty one where that works) and after twenty."""
    probe = bench.probe
    if "epsilon" not in probe.offered:
        return skipped(EPSILON, probe.lacking["epsilon"], EPSILON_WHY)
    delta = probe.claim.delta or DEFAULT_DELTA
    needed = {steps: spent(probe, steps, delta) for steps in (1, STEPS)}
    if any(value is None for value in needed.values()):
        why = f"no proof known to dpaudit for {probe.claim.mechanism} noise with {probe.claim.sampling} batches"
        return _fixed(bench, delta) if probe.claim.sampling == "fixed" else skipped(EPSILON, why, EPSILON_WHY)
    subject = probe.build(probe.own)
    first = [] if bench.empty_problem is None else [bench.picks.anchor]
    reported: dict[int, float] = {}
    for step in range(1, STEPS + 1):
        subject.ask("step", first if step == 1 else [bench.picks.anchor])
        if step in needed:
            reported[step] = _reported(subject, delta)
    lines, fine = [], True
    for steps, ours in needed.items():
        assert ours is not None
        fine &= reported[steps] >= ours * (1 - RELATIVE) - ABSOLUTE
        empty = " (an empty batch)" if steps == 1 and not first else ""
        lines.append(f"{reported[steps]:.4g} after {steps} step{'s'[: steps - 1]}{empty}, ours {ours:.4g}")
    allowed = f"at least ours, less {RELATIVE:.0%} and {ABSOLUTE:g}"
    return judged(EPSILON, fine, f"eps at delta = {delta:g}: {'; '.join(lines)}", allowed, EPSILON_WHY)


def spent(probe: Probe, steps: int, delta: float) -> float | None:
    """Our own eps after `steps`; None where no proof applies.

    Shuffled batches compose as one full Gaussian per epoch: batches of an epoch are disjoint, a unit is in one of them.
    """
    claim = probe.claim
    if claim.mechanism not in ("gaussian", "zeroth-order") or claim.sampling == "fixed":
        return None
    rate, count = claim.sample_rate, steps
    if claim.sampling == "shuffle":
        rate, count = 1.0, max(1, math.ceil(steps * claim.sample_rate - 1e-9))
    elif claim.sampling == "full":
        rate = 1.0
    return accounting.epsilon(DpSgd(claim.noise_multiplier, rate, count, claim.relation), delta)


def _fixed(bench: Bench, delta: float) -> Check:
    """Fixed-size batches: no number of ours, but the accountant's number for Poisson batches is certainly not it."""
    probe, claim = bench.probe, bench.probe.claim
    subject = probe.build(probe.own)
    for _ in range(STEPS):
        subject.ask("step", [bench.picks.anchor])
    reported = _reported(subject, delta)
    poisson = accounting.epsilon(DpSgd(claim.noise_multiplier, claim.sample_rate, STEPS, claim.relation), delta)
    measured = f"eps {reported:.4g} after {STEPS} steps; for Poisson batches it would be {poisson:.4g}"
    fine = reported > poisson * (1 + RELATIVE) + ABSOLUTE
    return judged(EPSILON, fine, measured, "more than the eps of Poisson batches", EPSILON_WHY)


def _reported(subject: Subject, delta: float) -> float:
    value = subject.ask("epsilon", delta)
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or math.isnan(value) or value < 0:
        raise MethodFailure(f"epsilon({delta:g})", f"returned {value!r}; accepted: a number >= 0 (inf allowed)")
    return float(value)


RESUME_EPSILON = "eps after a resume"
RESUME_EPSILON_WHY = "Spent budget stays spent: a checkpoint that forgets it lets a run restart its accountant at zero."
RESUME_NOISE = "noise after a resume"
RESUME_NOISE_WHY = (
    "The step after a resume must not reuse the noise of an earlier one: two releases with equal noise differ by the "
    "data alone. Usually the generator is restored, but not the step count."
)


def resume(bench: Bench) -> Iterator[Check]:
    """Two empty steps, a checkpoint, a fresh trainer that loads it, one more empty step."""
    probe = bench.probe
    why = None
    if not {"save", "load"} <= probe.offered:
        why = probe.lacking["load" if "save" in probe.offered else "save"]
    elif bench.empty_problem is not None:
        why = f"needs an empty batch: {bench.empty_problem}"
    if why is not None:
        yield skipped(RESUME_EPSILON, why, RESUME_EPSILON_WHY)
        yield skipped(RESUME_NOISE, why, RESUME_NOISE_WHY)
        return
    earlier: list[list[Vector]] = [[], []]
    later: list[Vector] = []
    eps: list[tuple[float, float]] = []
    delta = probe.claim.delta or DEFAULT_DELTA
    with tempfile.TemporaryDirectory(prefix="dpaudit-check-") as folder:
        for noise in range(RESUME_SEEDS):
            path = Path(folder) / f"checkpoint-{noise}"
            subject = probe.build(probe.own, noise)
            for place in range(2):
                earlier[place].append(probe.watch(subject, []).vector)
            subject.ask("save", path)
            resumed = probe.build(probe.own, noise)
            resumed.ask("load", path)
            if "epsilon" in probe.offered and not eps:
                eps.append((_reported(subject, delta), _reported(resumed, delta)))
            later.append(probe.watch(resumed, []).vector)
    yield _eps_check(eps)
    test = stats.symmetric_correlation if probe.mechanism == "laplace" else stats.correlation
    pairs = [test(np.concatenate(part), np.concatenate(later)) for part in earlier]
    worst = min(range(2), key=lambda place: pairs[place][1])
    r, p = pairs[worst]
    if probe.mechanism == "correlated":
        p = 0.0 if abs(r) > 1 - 1e-9 else 1.0  # correlation is allowed, repetition is not
    measured = f"correlation {r:.3g} with step {worst + 1} (p = {2 * p:.2g})"
    fine = 2 * p > stats.ALPHA
    yield judged(RESUME_NOISE, fine, measured, f"none: p above {stats.ALPHA:g}", RESUME_NOISE_WHY)


def _eps_check(eps: list[tuple[float, float]]) -> Check:
    if not eps:
        return skipped(RESUME_EPSILON, "the trainer offers no epsilon()", RESUME_EPSILON_WHY)
    before, after = eps[0]
    measured = f"eps {before:.4g} before and {after:.4g} after"
    return judged(RESUME_EPSILON, after >= before * (1 - 1e-6), measured, "not less", RESUME_EPSILON_WHY)
