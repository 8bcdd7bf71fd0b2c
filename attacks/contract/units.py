"""One unit counts once: what the claim may follow, repeated and extreme units, the clip factor, canary gradients."""

from collections.abc import Iterator

import numpy as np

from attacks.contract.bench import Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.influence import REACHED
from attacks.contract.probe import AGREEMENT, Records
from attacks.contract.result import frozen, judged, skipped
from dpaudit.documents import Check


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    for check in (public_claim, repeated, contained, upwards, injected):
        yield check(bench)


PUBLIC = "claim is public"
PUBLIC_WHY = (
    "Batch size, rate, C and sigma that follow the private records disclose them (Opacus int(len(dataset) * "
    "sample_rate), issue 571). Declare a public size instead."
)


def public_claim(bench: Bench) -> Check:
    """The claim must be equal for neighbouring data sets; these have equal sizes where n is public."""
    probe = bench.probe
    half = Records("half", probe.own.items[: max(3, len(probe.own.items) // 2)])
    others = [item.records for item in bench.stand_ins]
    others.append(probe.replaced(bench.picks.place, probe.own.items[bench.picks.group[0]], "another record"))
    if not probe.public_size:
        others += [probe.dropped(bench.picks.place), half]
    changed: set[str] = set()
    for records in others:
        try:
            claim = probe.build(records).claim()
        except MethodFailure:
            if records is half:  # no neighbour; a trainer may refuse so small a data set
                continue
            raise
        changed |= {field for field, value in vars(probe.claim).items() if getattr(claim, field) != value}
    measured = f"changes with the records: {', '.join(sorted(changed))}" if changed else "equal on all neighbours"
    if probe.public_size:
        measured += f" (of one size: n is public under {probe.claim.relation})"
    return judged(PUBLIC, not changed, measured, "equal for every data set", PUBLIC_WHY)


REPEATED = "repeated unit"
REPEATED_WHY = (
    "A unit that the sampler names twice still is one unit: it moves the sum by at most C, or the step refuses. "
    "Otherwise repeat augmentation or a sampler with replacement multiplies what one person can do."
)


@frozen(REPEATED, REPEATED_WHY)
def repeated(bench: Bench) -> Check:
    """The same index twice, where the trainer's own sampler does that: `step` is handed sets otherwise."""
    probe, picks = bench.probe, bench.picks
    if not bench.repeats:
        why = bench.probe.lacking["sample"] if bench.repeats is None else "the trainer's sampler repeats no index"
        return skipped(REPEATED, f"{why}, and batches are sets", REPEATED_WHY)
    tried = [(unit, None) for unit in picks.group] + [(picks.place, item.records) for item in bench.usable]
    worst = 0.0
    try:
        for unit, records in tried:
            twice = bench.difference([picks.anchor, unit, unit], [picks.anchor], records)
            worst = max(worst, probe.size(twice) / probe.claim.max_grad_norm)
    except MethodFailure:
        return judged(REPEATED, True, "a repeated index is refused", "at most C, or refused", REPEATED_WHY)
    allowed = 1 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    measured = f"a unit named twice moved the sum by {worst:.5g} C"
    return judged(REPEATED, worst <= allowed, measured, f"at most {allowed:.5g} C, or refused", REPEATED_WHY)


CONTAINED = "extreme record contained"
CONTAINED_WHY = (
    "A record with NaN, infinite or huge values must not stop the step, leave the released gradient finite, and count "
    "at most like any other. Usually: a NaN norm makes a NaN factor, or NaN is replaced after clipping."
)


def contained(bench: Bench) -> Check:
    """Every extreme record is survived."""
    if not bench.stand_ins:
        return skipped(CONTAINED, bench.probe.lacking["extreme_records"], CONTAINED_WHY)
    bad = [f"extreme record {item.number}: {item.problem}" for item in bench.stand_ins if item.problem is not None]
    measured = "; ".join(bad[:2]) if bad else f"{len(bench.stand_ins)} extreme records survived, all finite"
    return judged(CONTAINED, not bad, measured, "finite, and no exception", CONTAINED_WHY)


UPWARDS = "clipping never scales up"
UPWARDS_WHY = (
    "A unit's contribution is never longer than its own gradient: the factor is min(1, C / norm). Without the min a "
    "small gradient is blown up to C (norms stay bounded, but that is normalisation and not the clipping claimed)."
)


@frozen(UPWARDS, UPWARDS_WHY)
def upwards(bench: Bench) -> Check:
    """Contribution against the unit's own gradient, smallest gradients first."""
    probe, picks = bench.probe, bench.picks
    if "gradient" not in probe.offered:
        return skipped(UPWARDS, bench.probe.lacking["gradient"], UPWARDS_WHY)
    norms = bench.norms
    candidates = sorted((index for index in norms if index != picks.anchor), key=lambda index: norms[index])
    worst, slack = 0.0, 2 * bench.slack()
    for unit in candidates[:3]:
        norm = norms[unit]
        moved = probe.size(bench.contribution(unit, [picks.anchor]))
        worst = max(worst, (moved - slack) / max(norm, 1e-300) if moved > slack else 0.0)
    smallest = norms[candidates[0]] / probe.claim.max_grad_norm
    measured = f"contribution / gradient at most {worst:.4g}; smallest gradient {smallest:.3g} C"
    return judged(UPWARDS, worst <= 1 + 10 * AGREEMENT, measured, "at most 1", UPWARDS_WHY)


ARRIVED = 0.1  # of C: an injected gradient that moves the sum by less did not arrive
INJECTED = "injected gradient"
TURNED = "along it: what is released is the sum of the clipped gradients, not its negative"
INJECTED_WHY = "A gradient handed to inject() is one more unit: clipped to C, used once, and gone in the next step."


@frozen(INJECTED, INJECTED_WHY)
def injected(bench: Bench) -> Check:
    """A huge gradient through inject()."""
    import torch

    probe, picks = bench.probe, bench.picks
    if "inject" not in probe.offered:
        return skipped(INJECTED, bench.probe.lacking["inject"], INJECTED_WHY)
    subject = probe.build()
    rng = np.random.default_rng([probe.seed, 11])
    huge = {
        name: torch.from_numpy(100 * probe.claim.max_grad_norm * rng.standard_normal(shape)).float()
        for name, shape in probe.shapes.items()
    }
    subject.ask("inject", huge)
    seen = probe.watch(subject, [picks.anchor])
    change = seen.vector - probe.observe([picks.anchor]).vector
    moved = probe.size(change) / probe.claim.max_grad_norm
    blocks = [huge[name].double().numpy().reshape(-1) for name in sorted(seen.released) if name in huge]
    given = np.concatenate(blocks) if blocks else np.zeros(0)
    if moved >= ARRIVED and given.shape == change.shape and change @ given < 0:  # no clipping turns the sign
        return judged(INJECTED, False, f"moved the sum by {moved:.5g} C against its direction", TURNED, INJECTED_WHY)
    if ARRIVED < moved < REACHED:
        why = (
            f"moved the sum by {moved:.5g} C: the trainer clips below C, or an injected gradient arrives weakly; "
            "nothing is wrong with that, but games that insert canary gradients see less here"
        )
        return skipped(INJECTED, why, INJECTED_WHY)
    fine = REACHED <= moved <= 1 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    return judged(INJECTED, fine, f"moved the sum by {moved:.5g} C", "C: clipped like a unit", INJECTED_WHY)
