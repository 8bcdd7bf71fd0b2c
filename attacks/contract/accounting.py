"""The eps that the trainer reports, and the one that is claimed for it, against an accountant of our own."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from attacks.contract.bench import Bench
from attacks.contract.draws import reported, window_of
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Probe
from attacks.contract.result import judged, skipped
from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Check

STEPS, MANY = 20, 60
EARLY = (1, 2, 9, 19, STEPS)  # also off the beat of accountants that are asked every 10 steps
BEYOND, LONGEST, CHEAP = 0.2, 500, 0.1  # of the claimed steps; at most so many; seconds of a step and its eps
SAME = 1e-3  # of eps, with and without a noise seed
OTHER = 0.01  # times the claim's delta: an eps that does not follow delta is right for one of them at most
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
    """After one step (an empty one where that works), at several up to twenty, and at all that are claimed where steps
    are quick, and beyond them; at the claim's delta, and at a smaller one; without a noise seed as with one."""
    probe = bench.probe
    if "epsilon" not in probe.offered:
        return skipped(EPSILON, probe.lacking["epsilon"], EPSILON_WHY)
    delta = probe.claim.delta or DEFAULT_DELTA
    counts = _counts(bench)
    if not counts:
        return skipped(
            EPSILON, f"an epoch has {window_of(probe.claim)} steps, and its eps is due at its end", EPSILON_WHY
        )
    asked = [(steps, delta) for steps in counts] + [(steps, OTHER * delta) for steps in (counts[0], counts[-1])]
    needed = {pair: spent(probe, *pair) for pair in dict.fromkeys(asked)}
    if any(value is None for value in needed.values()):
        why = f"no proof known to dpaudit for {probe.claim.mechanism} noise with {probe.claim.sampling} batches"
        return skipped(EPSILON, why, EPSILON_WHY)
    found = _reported(bench, needed, counts[-1])
    lines, short = [], []
    for (steps, at), ours in needed.items():
        assert ours is not None
        if (steps, at) not in found:
            continue
        empty = " (an empty batch)" if steps == 1 and bench.empty_problem is None else ""
        where = f" at delta = {at:g}" if at != delta else ""
        lines.append(f"{found[steps, at]:.4g} after {steps} step{'s'[: steps - 1]}{empty}{where}, ours {ours:.4g}")
        if not found[steps, at] >= ours * (1 - RELATIVE) - ABSOLUTE:
            short.append(lines[-1])
    beyond = _beyond(bench, delta) if probe.unanswered is None else None
    early = [pair for pair in needed if pair[0] <= STEPS]
    if beyond is not None:
        lines.append(f"{beyond[0]:.4g} after {beyond[2]} steps, more than claimed, ours {beyond[1]:.4g}")
        if not beyond[0] >= beyond[1] * (1 - RELATIVE) - ABSOLUTE:
            short.append(lines[-1])
    if not short and early and probe.unanswered is None:
        lines, short = _in_production(bench, found, early, lines)
    if not short and probe.unanswered is not None:
        why = f"{probe.unanswered}, so not every eps could be judged: {'; '.join(lines) or 'none was reported'}"
        return skipped(EPSILON, why, EPSILON_WHY)
    scheme = f"{probe.claim.mechanism} noise, {probe.claim.sampling} batches, {probe.claim.relation}"
    allowed = f"at least ours for {scheme}, less {RELATIVE:.0%} and {ABSOLUTE:g}"
    measured = f"eps at delta = {delta:g}: {'; '.join(short or lines)}"
    return judged(EPSILON, not short, measured, allowed, EPSILON_WHY)


def _reported(
    bench: Bench, asked: Iterable[tuple[int, float]], last: int, noise: int | None = 0
) -> dict[tuple[int, float], float]:
    """What one trainer reports at each (steps, delta), up to the first that takes longer than the time limit."""
    subject = bench.probe.build(bench.probe.own, noise)
    first = [] if bench.empty_problem is None else [bench.picks.anchor]
    found: dict[tuple[int, float], float] = {}
    for step in range(1, last + 1):
        subject.ask("step", [bench.picks.anchor] if 1 < step <= STEPS else first)
        for pair in (pair for pair in asked if pair[0] == step):
            eps = reported(subject, pair[1])
            if eps is None:
                return found
            found[pair] = eps
    return found


def _beyond(bench: Bench, delta: float) -> tuple[float, float, int] | None:
    """(reported, ours, steps) of a training that goes on for BEYOND of its claimed steps; None where that takes time or
    the trainer refuses: a table of eps, or a budget, may end where the training was planned to end."""
    probe, steps = bench.probe, bench.probe.claim.steps
    if steps is None or not bench.training.quick or steps > LONGEST or probe.claim.sampling == "allocation":
        return None
    last = steps + math.ceil(BEYOND * steps)
    subject = probe.build(probe.own)
    try:
        began = time.monotonic()
        subject.ask("step", [])
        reported(subject, delta)
        if time.monotonic() - began > CHEAP:
            return None
        for _ in range(last - 1):
            subject.ask("step", [])
        found = reported(subject, delta)
    except MethodFailure:
        return None
    ours = spent(probe, last, delta)
    return None if ours is None or found is None else (found, ours, last)


def _in_production(
    bench: Bench, found: dict[tuple[int, float], float], asked: list[tuple[int, float]], lines: list[str]
) -> tuple[list[str], list[str]]:
    """(lines, those that are wrong): a trainer without a noise seed reports the same eps as one with a seed."""
    try:
        live = _reported(bench, asked, max(steps for steps, _ in asked), None)
    except MethodFailure as failure:
        return lines, [f"with noise_seed=None {failure}"]
    wrong = [
        f"{live[pair]:.4g} without a noise seed and {found[pair]:.4g} with one, after {pair[0]} steps"
        for pair in asked
        if pair in live and live[pair] != found[pair] and not abs(live[pair] - found[pair]) <= SAME * abs(found[pair])
    ]
    return lines if len(live) < len(asked) else [*lines, "the same without a noise seed"], wrong


def _counts(bench: Bench) -> list[int]:
    """After how many steps to ask: one, several up to twenty, many; for allocation at the end of epochs alone, of which
    no part is judged."""
    probe, longest = bench.probe, len(bench.training.noise) if bench.empty_problem is None else 0
    if probe.claim.sampling == "allocation":
        epoch, most = window_of(probe.claim), MANY if longest > MANY else STEPS
        return sorted({epoch, most // epoch * epoch}) if epoch <= most else []
    many = {MANY - 1, MANY, *((longest // 2, longest) if longest > 2 * MANY else ())} if longest > MANY else set()
    return [*EARLY, *sorted(many)]


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
