"""What one unit can do to the clipped sum: empirical sensitivity, clipping, isolation.

Two fresh trainers with equal seeds on neighbouring inputs release the same noise, so the difference of what they
release (times the expected batch size) is the difference of two clipped sums, exactly up to float32 rounding. Nothing
here is statistical, hence no false alarms but those of rounding, for which a margin of 0.1 % is left.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from attacks.contract.guard import MethodFailure
from attacks.contract.probe import AGREEMENT, Observation, Probe, Records, Vector
from attacks.contract.result import judged, skipped
from dpaudit.documents import Check

FROZEN = "equal seeds on equal records gave different steps, so nothing can be compared under frozen noise"
REACHED = 0.9  # a unit that moves the sum by less than this times C did not put clipping to the test


@dataclass(frozen=True)
class Picks:
    """Which units are probed: `anchor` keeps batches from being empty, `group`, and `place` for stand-ins."""

    anchor: int
    group: tuple[int, ...]
    place: int

    @classmethod
    def of(cls, probe: Probe, norms: dict[int, float]) -> "Picks":
        """A few units, chosen by the seed; where gradients are offered, the group has the three smallest in it.

        A unit far above C is clipped to the same length whatever rescales it, so a leak that rescales gradients (a
        token-mean loss) shows on small ones only.
        """
        order = [int(index) for index in np.random.default_rng([probe.seed, 7]).permutation(len(probe.own.items))]
        small = sorted(norms, key=lambda index: norms[index])[:3] if len(order) > 6 else []
        others = [index for index in order if index not in small]
        anchor, place = others[:2]
        return cls(anchor, (*small, *others[2 : 7 - len(small)]), place)


@dataclass(frozen=True)
class StandIn:
    """An extreme record in the data set at `place`."""

    number: int
    records: Records
    problem: str | None  # why a batch with it can't be used (raised, or not finite)


class Bench:
    """The probe with its picks and stand-ins; shared by the modules of the contract."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.norms = self._gradient_norms()
        self.picks = Picks.of(probe, self.norms)
        self.empty_problem = self._empty_problem()
        self.stand_ins = tuple(self._stand_in(number, record) for number, record in enumerate(probe.extremes))

    @property
    def usable(self) -> list[StandIn]:
        """Stand-ins that a step survives."""
        return [item for item in self.stand_ins if item.problem is None]

    def contribution(self, unit: int, beside: Sequence[int], records: Records | None = None) -> Vector:
        """What `unit` adds to the sum of the batch `beside`."""
        return self.difference([*beside, unit], beside, records)

    def difference(self, batch: Sequence[int], other: Sequence[int], records: Records | None = None) -> Vector:
        """Sum of one batch minus sum of the other, in one data set."""
        one = self.probe.observe(batch, records=records)
        two = self.probe.observe(other, records=records)
        return one.vector - two.vector

    def slack(self) -> float:
        """Rounding of the noisy sums."""
        picks = self.picks
        return self.probe.slack(self.probe.observe([picks.anchor]), self.probe.observe([*picks.group, picks.anchor]))

    def _gradient_norms(self) -> dict[int, float]:
        """Of the first units, before clipping; empty where gradients are not offered."""
        if "gradient" not in self.probe.offered:
            return {}
        return {
            index: self.probe.size(self.probe.gradient(item)) for index, item in enumerate(self.probe.own.items[:60])
        }

    def _empty_problem(self) -> str | None:
        try:
            seen = self.probe.observe([])
        except MethodFailure as failure:
            return str(failure)
        if not seen.noised:
            return "nothing was released for it"
        return None if np.isfinite(seen.vector).all() else "what was released for it is not finite"

    def _stand_in(self, number: int, record: object) -> StandIn:
        records = self.probe.replaced(self.picks.place, record, f"extreme record {number}")
        try:
            seen = self.probe.observe([self.picks.anchor, self.picks.place], records=records)
        except MethodFailure as failure:
            return StandIn(number, records, str(failure))
        fine = np.isfinite(seen.vector).all() and all(np.isfinite(part).all() for part in seen.moved.values())
        return StandIn(number, records, None if fine else "made the released gradient or the parameters not finite")


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    yield public_claim(bench)
    for check in (influence, replacement, additivity, isolation, outside, repeated, contained, upwards, injected):
        yield check(bench)


PUBLIC = "claim is public"
PUBLIC_WHY = (
    "Batch size, rate, C and sigma that follow the private records disclose them (Opacus int(len(dataset) * "
    "sample_rate), issue 571). Declare a public size instead."
)


def public_claim(bench: Bench) -> Check:
    """The claim must be equal for neighbouring data sets."""
    probe = bench.probe
    half = Records("half", probe.own.items[: max(3, len(probe.own.items) // 2)])
    others = [probe.dropped(bench.picks.place), *(item.records for item in bench.stand_ins), half]
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
    return judged(PUBLIC, not changed, measured, "equal for every data set", PUBLIC_WHY)


def _frozen(name: str, why: str) -> Callable[[Callable[[Bench], Check]], Callable[[Bench], Check]]:
    """A check under frozen noise: not applicable where equal seeds don't repeat."""

    def wrap(function: Callable[[Bench], Check]) -> Callable[[Bench], Check]:
        def run(bench: Bench) -> Check:
            return function(bench) if bench.probe.deterministic else skipped(name, FROZEN, why)

        return run

    return wrap


INFLUENCE = "influence of one unit"
INFLUENCE_WHY = (
    "One unit, added to or removed from batch or data set, moves the sum by at most C. More is usually clipping per "
    "layer or per question, a norm that leaves parameters out, min and max confused, or noise that follows the data."
)


@_frozen(INFLUENCE, INFLUENCE_WHY)
def influence(bench: Bench) -> Check:
    """Empirical sensitivity under adding and removing, in units of C."""
    probe, picks = bench.probe, bench.picks
    group, every = list(picks.group), [*picks.group, picks.anchor]
    moves: list[tuple[float, str]] = []

    def note(vector: Vector, what: str) -> None:
        moves.append((probe.size(vector) / probe.claim.max_grad_norm, what))

    for unit in group:
        note(bench.contribution(unit, [picks.anchor]), f"unit {unit} in a batch of two")
        rest = [other for other in every if other != unit]
        note(bench.difference(every, rest), f"unit {unit} in a batch of {len(every)}")
        if bench.empty_problem is None:
            note(bench.difference([unit], []), f"unit {unit} against an empty batch")
    note(_dropped(bench, every, picks.group[0]), f"unit {picks.group[0]} dropped from the data set")
    for item in bench.usable:
        note(bench.contribution(picks.place, [picks.anchor], item.records), f"extreme record {item.number}")
        alone = probe.observe([*group, picks.place], records=item.records).vector - probe.observe(group).vector
        note(alone, f"extreme record {item.number} added to a batch of {len(group)}")
    worst, what = max(moves)
    allowed = 1 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    if allowed > 1.5:
        measured = f"the released numbers are so rough (or sigma so large) that rounding alone is {allowed - 1:.2g} C"
        return skipped(INFLUENCE, measured, INFLUENCE_WHY)
    if worst < REACHED:
        more = "extreme_records() that push further" if probe.extremes else "extreme_records()"
        measured = (
            f"no unit moved the sum by more than {worst:.3g} C, so clipping was not put to the test; offer {more}"
        )
        return skipped(INFLUENCE, measured, INFLUENCE_WHY)
    measured = f"largest move {worst:.5g} C ({what}; {len(moves)} comparisons)"
    return judged(INFLUENCE, worst <= allowed, measured, f"at most {allowed:.5g} C", INFLUENCE_WHY)


def _dropped(bench: Bench, batch: Sequence[int], unit: int) -> Vector:
    """The batch's sum minus the sum of the same others in the data set without `unit`."""
    probe = bench.probe
    rest = [other - (other > unit) for other in batch if other != unit]
    return probe.observe(batch).vector - probe.observe(rest, records=probe.dropped(unit)).vector


REPLACE = "influence of a replaced unit"
REPLACE_WHY = (
    "A unit replaced by another one moves the sum by at most 2C. More is a clipping fault, or a replaced record that "
    "reaches the others."
)


@_frozen(REPLACE, REPLACE_WHY)
def replacement(bench: Bench) -> Check:
    """Empirical sensitivity under replacing, in units of C."""
    probe, picks = bench.probe, bench.picks
    batch = [picks.anchor, picks.place]
    others = [item.records for item in bench.usable]
    for unit in picks.group[:3]:
        others.append(probe.replaced(picks.place, probe.own.items[unit], f"record {unit}"))
    before = probe.observe(batch)
    moves = [probe.size(probe.observe(batch, records=records).vector - before.vector) for records in others]
    # Two stand-ins on opposite sides are the farthest pair.
    for one, two in pairwise(others):
        gap = probe.observe(batch, records=one).vector - probe.observe(batch, records=two).vector
        moves.append(probe.size(gap))
    worst = max(moves) / probe.claim.max_grad_norm
    allowed = 2 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    measured = f"largest move {worst:.5g} C ({len(moves)} comparisons)"
    return judged(REPLACE, worst <= allowed, measured, f"at most {allowed:.5g} C", REPLACE_WHY)


CLIPPING = "clipping per unit"
CLIPPING_WHY = (
    "The sum of a batch is the sum of what its units give one by one. If not, something else than the unit is clipped "
    "(batch mean, microbatch), or the norm limit follows the batch."
)


@_frozen(CLIPPING, CLIPPING_WHY)
def additivity(bench: Bench) -> Check:
    """f(batch) - f(anchor) = sum of the contributions beside the anchor."""
    probe, picks = bench.probe, bench.picks
    parts = [bench.contribution(unit, [picks.anchor]) for unit in picks.group]
    together = bench.difference([picks.anchor, *picks.group], [picks.anchor])
    scale = max(probe.size(part) for part in parts)
    gap = probe.size(together - sum(parts, np.zeros_like(together)))
    allowed = AGREEMENT * scale + len(parts) * bench.slack()
    measured = f"sum of {len(parts)} units off by {_ratio(gap, scale)} of the largest contribution"
    return judged(CLIPPING, gap <= allowed, measured, f"at most {_ratio(allowed, scale)}", CLIPPING_WHY)


ISOLATION = "others unmoved"
ISOLATION_WHY = (
    "A unit's contribution must not depend on who else is in the batch. If it does, records meet before clipping: "
    "batch normalisation, a token-mean loss, in-batch contrast, shared centres or thresholds, padding."
)


@_frozen(ISOLATION, ISOLATION_WHY)
def isolation(bench: Bench) -> Check:
    """The same unit beside ordinary and extreme partners."""
    probe, picks = bench.probe, bench.picks
    worst, where, scale = 0.0, "no partner", 0.0
    for unit in picks.group[:3]:
        alone = bench.contribution(unit, [picks.anchor])
        scale = max(scale, probe.size(alone))
        partners: list[tuple[str, Records | None]] = [("another unit", None)]
        partners += [(f"extreme record {item.number}", item.records) for item in bench.usable]
        for what, records in partners:
            gap = probe.size(bench.contribution(unit, [picks.place], records) - alone)
            if gap > worst:
                worst, where = gap, f"unit {unit} beside {what}"
    allowed = AGREEMENT * scale + 4 * bench.slack()
    measured = f"a contribution changed by {_ratio(worst, scale)} of its size ({where})"
    if bench.norms and min(bench.norms.values()) > probe.claim.max_grad_norm:
        measured += "; every unit is clipped, so a leak that only rescales gradients can't show"
    return judged(ISOLATION, worst <= allowed, measured, f"at most {_ratio(allowed, scale)}", ISOLATION_WHY)


OUTSIDE = "records outside the batch"
OUTSIDE_WHY = (
    "A record that is not in the batch must not matter at all. If it does: statistics of the whole data set "
    "(normalisation, vocabulary), or a size that is private."
)


@_frozen(OUTSIDE, OUTSIDE_WHY)
def outside(bench: Bench) -> Check:
    """Change or drop a record outside the batch, keep the noise."""
    probe, picks = bench.probe, bench.picks
    before = probe.observe([picks.anchor])
    shifted = picks.anchor - (picks.anchor > picks.place)
    seen: list[Observation] = [probe.observe([shifted], records=probe.dropped(picks.place))]
    seen += [probe.observe([picks.anchor], records=item.records) for item in bench.usable]
    other = probe.replaced(picks.place, probe.own.items[picks.group[0]], f"record {picks.group[0]}")
    seen.append(probe.observe([picks.anchor], records=other))
    size = probe.claim.max_grad_norm
    gap = max(probe.size(item.vector - before.vector) for item in seen)
    allowed = 1e-6 * size + 2 * bench.slack()
    measured = f"the release moved by {gap / size:.3g} C over {len(seen)} changes of a record outside"
    return judged(OUTSIDE, gap <= allowed, measured, f"at most {allowed / size:.2g} C (rounding)", OUTSIDE_WHY)


REPEATED = "repeated unit"
REPEATED_WHY = (
    "A unit that is in a batch twice still is one unit: it moves the sum by at most C, or the step refuses. Otherwise "
    "repeat augmentation or a sampler with replacement multiplies what one person can do."
)


@_frozen(REPEATED, REPEATED_WHY)
def repeated(bench: Bench) -> Check:
    """The same index twice."""
    probe, picks = bench.probe, bench.picks
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


@_frozen(UPWARDS, UPWARDS_WHY)
def upwards(bench: Bench) -> Check:
    """Contribution against the unit's own gradient, smallest gradients first."""
    probe, picks = bench.probe, bench.picks
    if "gradient" not in probe.offered:
        return skipped(UPWARDS, probe.lacking["gradient"], UPWARDS_WHY)
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


INJECTED = "injected gradient"
INJECTED_WHY = "A gradient handed to inject() is one more unit: clipped to C, used once, and gone in the next step."


@_frozen(INJECTED, INJECTED_WHY)
def injected(bench: Bench) -> Check:
    """A huge gradient through inject()."""
    import torch

    probe, picks = bench.probe, bench.picks
    if "inject" not in probe.offered:
        return skipped(INJECTED, probe.lacking["inject"], INJECTED_WHY)
    subject = probe.build()
    rng = np.random.default_rng([probe.seed, 11])
    huge = {
        name: torch.from_numpy(100 * probe.claim.max_grad_norm * rng.standard_normal(shape)).float()
        for name, shape in probe.shapes.items()
    }
    subject.ask("inject", huge)
    seen = probe.watch(subject, [picks.anchor])
    moved = probe.size(seen.vector - probe.observe([picks.anchor]).vector) / probe.claim.max_grad_norm
    fine = REACHED <= moved <= 1 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    return judged(INJECTED, fine, f"moved the sum by {moved:.5g} C", "C: clipped like a unit", INJECTED_WHY)


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2g}" if whole > 0 else ("0" if part == 0 else "inf")
