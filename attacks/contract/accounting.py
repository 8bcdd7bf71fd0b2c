"""The eps that the trainer reports, and the one that is claimed for it, against an accountant of our own."""

import math
from collections.abc import Iterator
from dataclasses import replace

from attacks.contract.bench import Bench
from attacks.contract.draws import reported, window_of
from attacks.contract.probe import Probe
from attacks.contract.result import judged, skipped
from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Check

STEPS, MANY = 20, 60
DEFAULT_DELTA = 1e-5
# Ours is an upper bound, tight to 1e-4; accountants that are right to 1 % (PRV at eps_error 0.01) still pass.
RELATIVE, ABSOLUTE = 0.01, 0.005

EPSILON = "eps reported"
EPSILON_WHY = (
    "The eps that the trainer reports may not be below what (sigma, q, steps) spend under the claimed relation, "
    "sampling and noise. Usually: a wrong sample rate, shuffled or fixed-size batches accounted as Poisson or as "
    "allocation, replace accounted as add/remove, Laplace noise accounted as Gaussian or not at all, the CLT "
    "approximation, empty batches or the last step not counted, the target reported instead of what was spent."
)


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    yield epsilon(bench)
    yield claimed(bench)


def epsilon(bench: Bench) -> Check:
    """After one step (an empty one where that works), after twenty, and after many where steps are quick."""
    probe = bench.probe
    if "epsilon" not in probe.offered:
        return skipped(EPSILON, probe.lacking["epsilon"], EPSILON_WHY)
    delta = probe.claim.delta or DEFAULT_DELTA
    quick = bench.empty_problem is None and len(bench.training.noise) > MANY
    counts = _counts(probe, MANY if quick else STEPS)
    if not counts:
        return skipped(
            EPSILON, f"an epoch has {window_of(probe.claim)} steps, and its eps is due at its end", EPSILON_WHY
        )
    needed = {steps: spent(probe, steps, delta) for steps in counts}
    if any(value is None for value in needed.values()):
        why = f"no proof known to dpaudit for {probe.claim.mechanism} noise with {probe.claim.sampling} batches"
        return skipped(EPSILON, why, EPSILON_WHY)
    subject = probe.build(probe.own)
    first = [] if bench.empty_problem is None else [bench.picks.anchor]
    found: dict[int, float] = {}
    for step in range(1, counts[-1] + 1):
        subject.ask("step", [bench.picks.anchor] if 1 < step <= STEPS else first)
        if step in needed:
            found[step] = reported(subject, delta)
    lines, fine = [], True
    for steps, ours in needed.items():
        assert ours is not None
        fine &= found[steps] >= ours * (1 - RELATIVE) - ABSOLUTE
        empty = " (an empty batch)" if steps == 1 and not first else ""
        lines.append(f"{found[steps]:.4g} after {steps} step{'s'[: steps - 1]}{empty}, ours {ours:.4g}")
    scheme = f"{probe.claim.mechanism} noise, {probe.claim.sampling} batches, {probe.claim.relation}"
    allowed = f"at least ours for {scheme}, less {RELATIVE:.0%} and {ABSOLUTE:g}"
    return judged(EPSILON, fine, f"eps at delta = {delta:g}: {'; '.join(lines)}", allowed, EPSILON_WHY)


def _counts(probe: Probe, most: int) -> list[int]:
    """After how many steps to ask: one, some, many; at the end of epochs of allocation, of which no part is judged."""
    if probe.claim.sampling != "allocation":
        return [1, STEPS, *([most] if most > STEPS else [])]
    epoch = window_of(probe.claim)
    return sorted({epoch, most // epoch * epoch}) if epoch <= most else []


def spent(probe: Probe, steps: int, delta: float) -> float | None:
    """Our own eps after `steps`; None where no proof applies. inf without noise.

    Shuffled batches compose as one full mechanism per epoch: batches of an epoch are disjoint, a unit is in one of
    them. Fixed-size batches: `dpaudit.accounting.schemes`. Laplace noise under replace with subsampling has no number
    here, but that of add-remove is no larger: a record without a gradient may be the one replaced.
    """
    claim = probe.claim
    if claim.mechanism not in ("gaussian", "zeroth-order", "laplace"):
        return None
    if claim.noise_multiplier == 0:
        return math.inf
    noise = "laplace" if claim.mechanism == "laplace" else "gaussian"
    if claim.sampling == "allocation":
        return None if noise == "laplace" else accounting.epsilon(claim.allocated(steps), delta)
    if claim.sampling == "fixed":
        if noise == "laplace":
            return None
        event = DpSgd(claim.noise_multiplier, claim.sample_rate, steps, claim.relation, sampling="fixed")
        return accounting.epsilon(event, delta)
    rate, count = claim.sample_rate, steps
    if claim.sampling == "shuffle":
        rate, count = 1.0, max(1, math.ceil(steps * claim.sample_rate - 1e-9))
    elif claim.sampling == "full":
        rate = 1.0
    relation = "add-remove" if noise == "laplace" and rate < 1 else claim.relation
    event = replace(DpSgd(claim.noise_multiplier, rate, count, relation), noise=noise)  # type: ignore[arg-type]
    return accounting.epsilon(event, delta)


CLAIMED = "eps claimed"
CLAIMED_WHY = (
    "The eps that is claimed for the whole training must cover what its sigma, q and number of steps spend. If it does "
    "not, the optimiser under test was built for another target, or trains longer than it was accounted for."
)


def claimed(bench: Bench) -> Check:
    """What (sigma, q, T) of the trainer's claim spend, against the eps stated from outside (--epsilon)."""
    probe, stated = bench.probe, bench.stated
    if stated.epsilon is None:
        return skipped(CLAIMED, "no eps was stated (--epsilon)", CLAIMED_WHY)
    delta = stated.delta or probe.claim.delta or DEFAULT_DELTA
    steps = probe.claim.steps
    if steps is None:
        return skipped(CLAIMED, "the trainer's claim has no number of steps (claim.steps)", CLAIMED_WHY)
    ours = spent(probe, steps, delta)
    if ours is None:
        why = f"no proof known to dpaudit for {probe.claim.mechanism} noise with {probe.claim.sampling} batches"
        return skipped(CLAIMED, why, CLAIMED_WHY)
    sigma, rate = probe.claim.noise_multiplier, probe.claim.sample_rate
    measured = f"sigma {sigma:.4g}, q {rate:.4g}, {steps} steps spend eps {ours:.4g} at delta = {delta:g}"
    fine = ours <= stated.epsilon * (1 + RELATIVE) + ABSOLUTE
    return judged(CLAIMED, fine, measured, f"at most {stated.epsilon:g} (1 % for another accountant)", CLAIMED_WHY)
