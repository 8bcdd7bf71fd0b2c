"""What one unit can do to the clipped sum: empirical sensitivity, clipping, isolation.

Two trainers with equal seeds on neighbouring inputs release the same noise, so the difference of what they release
(times the expected batch size) is the difference of two clipped sums, exactly up to float32 rounding. Nothing here is
statistical, hence no false alarms but those of rounding, for which a margin of 0.1 % is left (more where a step
computes in bfloat16, `Probe.agreement`). Every check looks at the first step, at later ones of a training, and at
batches from one unit to several times the expected size.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from attacks.contract import boundary
from attacks.contract.bench import FROZEN as FROZEN
from attacks.contract.bench import SHARE
from attacks.contract.bench import Bench as Bench
from attacks.contract.history import whole_training
from attacks.contract.probe import AGREEMENT, Observation, Records, Vector
from attacks.contract.result import frozen, judged, ratio, skipped
from attacks.contract.training import STAGES
from dpaudit.documents import Check

REACHED = 0.9  # a unit that moves the sum by less than this times C did not put clipping to the test
GROUP = 8  # units whose joint sum is compared with the sum of their own
SMALL = range(2, 17)  # sizes of batches that are all tried: one size may take a path of its own


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    for check in (influence, replacement, additivity, isolation, outside):
        yield check(bench)


INFLUENCE = "influence of one unit"
INFLUENCE_WHY = (
    "One unit, added to or removed from batch or data set, moves the sum by at most C, in every step and in batches of "
    "any size. More is usually clipping per layer or per question, a norm that leaves parameters out, clipping that "
    "starts late or ends with the first physical batch, or noise that follows the data."
)

Move = tuple[float, str]  # in units of C


@frozen(INFLUENCE, INFLUENCE_WHY)
def influence(bench: Bench) -> Check:
    """Empirical sensitivity under adding and removing, in units of C."""
    probe = bench.probe
    moves = [*_first_step(bench)]
    if bench.empty_problem is None:
        moves += [*_one_by_one(bench), *_over_histories(bench), *_branched(bench), *boundary.moves(bench)]
    moves += _large(bench)
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
    count, sizes = len(probe.own.items), bench.training.sizes
    measured = (
        f"largest move {worst:.5g} C ({what}; {len(moves)} comparisons; {len(bench.sample)} of {count} units one by "
        f"one, so a fault of {SHARE:.0%} of them is missed with probability {bench.missed:.2g}; batches of 1 to "
        f"{sizes[-1]} units; steps 1 to {STAGES['late']})"
    )
    return judged(INFLUENCE, worst <= allowed, measured, f"at most {allowed:.5g} C", INFLUENCE_WHY)


def _first_step(bench: Bench) -> Iterator[Move]:
    """A few units in small batches of the first step, and extreme records."""
    probe, picks = bench.probe, bench.picks
    group, every = list(picks.group), [*picks.group, picks.anchor]

    def move(vector: Vector, what: str) -> Move:
        return probe.size(vector) / probe.claim.max_grad_norm, what

    for unit in group:
        yield move(bench.contribution(unit, [picks.anchor]), f"unit {unit} in a batch of two")
        rest = [other for other in every if other != unit]
        yield _less(bench, move(bench.difference(every, rest), f"unit {unit} in a batch of {len(every)}"), len(every))
    if not probe.public_size:
        dropped = _dropped(bench, every, picks.group[0])
        yield _less(bench, move(dropped, f"unit {picks.group[0]} dropped from the data set"), len(every))
    for item in bench.usable:
        yield move(bench.contribution(picks.place, [picks.anchor], item.records), f"extreme record {item.number}")
        alone = probe.observe([*group, picks.place], records=item.records).vector - probe.observe(group).vector
        what = f"extreme record {item.number} added to a batch of {len(group)}"
        yield _less(bench, move(alone, what), len(every))


def _less(bench: Bench, move: Move, others: int) -> Move:
    """Less what the others' contributions may have been rounded by in another batch (bfloat16 only)."""
    return move[0] - (bench.probe.agreement - AGREEMENT) * math.sqrt(others), move[1]


def _one_by_one(bench: Bench) -> Iterator[Move]:
    """Every probed unit alone: at the initial parameters, and in one training that meets them one after the other."""
    probe, training = bench.probe, bench.training
    for unit in bench.sample:
        yield probe.size(bench.difference([unit], [])) / probe.claim.max_grad_norm, f"unit {unit} alone"
    swept = bench.sample[: len(training.noise)]
    sweep = probe.course([[unit] for unit in swept])
    for step, (unit, seen) in enumerate(zip(swept, sweep, strict=True), 1):
        if training.comparable(step, seen) and np.isfinite(seen.vector).all():
            move = probe.size(training.signal(step, seen)) - training.slack(step, seen)
            yield move / probe.claim.max_grad_norm, f"unit {unit} alone in step {step}"


def _over_histories(bench: Bench) -> Iterator[Move]:
    """The sum of a batch of k units, at every step of two trainings: at most k C."""
    probe, training = bench.probe, bench.training
    for batches, course in ((training.batches, training.first), (training.others, training.second)):
        for step, (batch, seen) in enumerate(zip(batches, course, strict=True), 1):
            if batch and training.comparable(step, seen) and np.isfinite(seen.vector).all():
                move = probe.size(training.signal(step, seen)) - training.slack(step, seen)
                what = f"per unit, in a batch of {len(batch)} in step {step}"
                yield move / probe.claim.max_grad_norm / len(batch), what


def _branched(bench: Bench) -> Iterator[Move]:
    """Single units and extreme records in the middle of a training and late in it."""
    probe, picks, training = bench.probe, bench.picks, bench.training
    for when, step in STAGES.items():
        alone = training.releases(step, [[unit] for unit in picks.group])
        tried = [(seen, f"unit {unit}") for unit, seen in zip(picks.group, alone, strict=True)]
        tried += [
            (training.at(step, [picks.place], records=item.records), f"extreme record {item.number}")
            for item in bench.usable
        ]
        for seen, what in tried:
            if training.comparable(step, seen) and _sound(bench, step):
                move = probe.size(training.signal(step, seen)) - training.slack(step, seen)
                yield move / probe.claim.max_grad_norm, f"{what} alone {when} (step {step})"


def _sound(bench: Bench, step: int) -> bool:
    """Whether the history up to `step` stayed finite; a training that diverges says nothing about later steps."""
    return all(np.isfinite(seen.vector).all() for seen in bench.training.first[: step - 1])


def _large(bench: Bench) -> Iterator[Move]:
    """Units that join the largest batch, first and late; the first and the last index, so that chunks are crossed."""
    probe, training = bench.probe, bench.training
    units = sorted(training.pool[: training.largest])
    for step in (1, STAGES["late"]):
        if not _sound(bench, step):
            continue
        left_out = sorted({units[0], units[len(units) // 2], units[-1]})
        fewer = [[other for other in units if other != unit] for unit in left_out]
        whole, *rests = training.releases(step, [units, *fewer])
        for unit, rest in zip(left_out, rests, strict=True):
            if rest.noised == whole.noised:
                move = probe.size(whole.vector - rest.vector) - probe.slack(whole, rest)
                what = f"unit {unit} in a batch of {len(units)} in step {step}"
                yield _less(bench, (move / probe.claim.max_grad_norm, what), len(units))
        for item in bench.usable[:2]:
            more = training.at(step, [*units, bench.picks.place], records=item.records)
            if more.noised == whole.noised:
                move = probe.size(more.vector - whole.vector) - probe.slack(whole, more)
                what = f"extreme record {item.number} in a batch of {len(units) + 1} in step {step}"
                yield _less(bench, (move / probe.claim.max_grad_norm, what), len(units))


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


@frozen(REPLACE, REPLACE_WHY)
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
    if worst < bench.slack() / probe.claim.max_grad_norm:
        return skipped(REPLACE, "no replaced unit moved the sum at all, so nothing was compared", REPLACE_WHY)
    allowed = 2 + AGREEMENT + bench.slack() / probe.claim.max_grad_norm
    measured = f"largest move {worst:.5g} C ({len(moves)} comparisons)"
    return judged(REPLACE, worst <= allowed, measured, f"at most {allowed:.5g} C", REPLACE_WHY)


CLIPPING = "clipping per unit"
CLIPPING_WHY = (
    "The sum of a batch is the sum of what its units give one by one, in small batches and in those that need several "
    "physical ones. If not, something else than the unit is clipped (batch mean, microbatch), the norm limit follows "
    "the batch, chunks are forgotten or counted twice, or noise follows the number of micro-batches."
)


@frozen(CLIPPING, CLIPPING_WHY)
def additivity(bench: Bench) -> Check:
    """f(batch) = sum of its units' contributions; large batches by halves: f(A and B) + f() = f(A) + f(B)."""
    probe, picks = bench.probe, bench.picks
    parts = [bench.contribution(unit, [picks.anchor]) for unit in picks.group]
    together = bench.difference([picks.anchor, *picks.group], [picks.anchor])
    scale = max(probe.size(part) for part in parts)
    if scale <= 2 * bench.slack():
        return skipped(CLIPPING, "no unit moved the sum, so nothing was compared", CLIPPING_WHY)
    gaps = [_Gap(together - sum(parts, np.zeros_like(together)), len(parts), bench.slack(), "a batch of 5")]
    if bench.empty_problem is None:
        gaps += [*_groups(bench), *_every_size(bench), *_halves(bench)]
    worst = max(gaps, key=lambda gap: gap.over(bench, scale))
    fine = worst.over(bench, scale) <= 1
    measured = (
        f"off by {ratio(probe.size(worst.vector), scale)} of the largest contribution ({worst.what}; {len(gaps)} "
        f"batches, {bench.training.looked_at})"
    )
    return judged(CLIPPING, fine, measured, f"at most {ratio(worst.allowed(bench, scale), scale)}", CLIPPING_WHY)


class _Gap:
    """By how much a sum is off, and over how many units."""

    def __init__(self, vector: Vector, units: int, slack: float, what: str) -> None:
        self.vector, self.units, self.slack, self.what = vector, units, slack, what

    def allowed(self, bench: Bench, scale: float) -> float:
        """0.1 % of a contribution, or what a coarse type loses over so many of them; and rounding of the noisy sums."""
        coarse = (bench.probe.agreement - AGREEMENT) * math.sqrt(self.units)
        return (AGREEMENT + coarse) * scale + max(4, min(self.units, 6)) * self.slack

    def over(self, bench: Bench, scale: float) -> float:
        """In units of what is allowed."""
        return bench.probe.size(self.vector) / self.allowed(bench, scale)


def _groups(bench: Bench) -> Iterator[_Gap]:
    """All probed units, GROUP at a time, at the initial parameters: each is in one of the batches; and every SMALL
    size of batch."""
    probe = bench.probe
    alone = {unit: bench.difference([unit], []) for unit in bench.sample}
    groups = [bench.sample[start : start + GROUP] for start in range(0, len(bench.sample), GROUP)]
    for size in SMALL if len(bench.sample) >= SMALL[-1] else ():
        groups.append(sorted(np.roll(bench.sample, size * (size - 1) // 2)[:size].tolist()))
    for group in groups:
        if len(group) > 1:
            seen = probe.observe(group)
            parts = sum((alone[unit] for unit in group), np.zeros_like(seen.vector))
            gap = seen.vector - probe.observe([]).vector - parts
            yield _Gap(gap, len(group), probe.slack(seen), f"a batch of {len(group)}")


def _every_size(bench: Bench) -> Iterator[_Gap]:
    """Batches of every size in the first step, each against the one with a unit less and that unit (quick trainers)."""
    probe, training = bench.probe, bench.training
    for size, batch in enumerate(training.every_size[1:], 2):
        last = [training.pool[size - 1]]
        less = training.every_size[size - 2]
        seen = [probe.observe(part, records=training.records) for part in (batch, less, last, [])]
        gap = seen[0].vector - seen[1].vector - seen[2].vector + seen[3].vector
        yield _Gap(gap, size, probe.slack(*seen), f"a batch of {size} against one of {size - 1} and a unit")


def _halves(bench: Bench) -> Iterator[_Gap]:
    """Batches of doubling size against their two halves; first, in the middle and late."""
    training = bench.training
    for step in (1, *STAGES.values()):
        if not _sound(bench, step):
            continue
        pairs = [(training.pool[:size], training.pool[size:larger]) for size, larger in pairwise(training.sizes)]
        batches = [sorted(batch) for one, two in pairs for batch in ([*one, *two], one, two)]
        releases = iter(training.releases(step, batches))
        for larger in training.sizes[1:]:
            seen = [next(releases) for _ in range(3)]
            if not training.comparable(step, *seen):
                continue
            signals = [training.signal(step, item) for item in seen]
            what = f"a batch of {larger} against its halves in step {step}"
            yield _Gap(signals[0] - signals[1] - signals[2], larger, training.slack(step, *seen), what)


ISOLATION = "others unmoved"
ISOLATION_WHY = (
    "A unit's contribution must not depend on who else is in the batch. If it does, records meet before clipping: "
    "batch normalisation, a token-mean loss, in-batch contrast, shared centres or thresholds, padding."
)


@frozen(ISOLATION, ISOLATION_WHY)
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
    if bench.empty_problem is None:
        for gap, what in _late_partners(bench):
            if gap > worst:
                worst, where = gap, what
    if scale <= 2 * bench.slack():
        return skipped(ISOLATION, "no unit moved the sum, so nothing was compared", ISOLATION_WHY)
    allowed = probe.agreement * scale + 4 * bench.slack()
    measured = f"a contribution changed by {ratio(worst, scale)} of its size ({where})"
    if bench.norms and min(bench.norms.values()) > probe.claim.max_grad_norm:
        measured += "; every unit is clipped, so a leak that only rescales gradients can't show"
    return judged(ISOLATION, worst <= allowed, measured, f"at most {ratio(allowed, scale)}", ISOLATION_WHY)


def _late_partners(bench: Bench) -> Iterator[tuple[float, str]]:
    """A unit beside another unit and beside extreme records, late in a training, against the unit alone."""
    probe, picks, training, step = bench.probe, bench.picks, bench.training, STAGES["late"]
    if not _sound(bench, step):
        return
    for unit in picks.group[:2]:
        alone = training.at(step, [unit])
        for records in (None, *(item.records for item in bench.usable[:3])):
            pair = training.at(step, [unit, picks.place], records=records)
            partner = training.at(step, [picks.place], records=records)
            if training.comparable(step, alone, pair, partner):
                gap = probe.size(pair.vector - partner.vector - training.signal(step, alone))
                yield gap, f"unit {unit} in step {step}"


OUTSIDE = "records outside the batch"
OUTSIDE_WHY = (
    "A record that is in none of the batches must not matter at all, in no step. If it does: statistics of the whole "
    "data set (normalisation, vocabulary), a size that is private, or a sampler or learning rate that follows losses."
)


@frozen(OUTSIDE, OUTSIDE_WHY)
def outside(bench: Bench) -> Check:
    """Change or drop a record outside the batches, keep the noise: first step, then everything public of a training."""
    probe, picks = bench.probe, bench.picks
    before = probe.observe([picks.anchor])
    seen: list[Observation] = [probe.observe([picks.anchor], records=item.records) for item in bench.usable]
    if not probe.public_size:
        shifted = picks.anchor - (picks.anchor > picks.place)
        seen.append(probe.observe([shifted], records=probe.dropped(picks.place)))
    other = probe.replaced(picks.place, probe.own.items[picks.group[0]], f"record {picks.group[0]}")
    seen.append(probe.observe([picks.anchor], records=other))
    size = probe.claim.max_grad_norm
    gap = max(probe.size(item.vector - before.vector) for item in seen)
    allowed = 1e-6 * size + 2 * bench.slack()
    measured = f"the release moved by {gap / size:.3g} C over {len(seen)} changes of a record outside"
    wanted = f"at most {allowed / size:.2g} C (rounding)"
    if gap > allowed:
        return judged(OUTSIDE, gap <= allowed, measured, wanted, OUTSIDE_WHY)
    neighbours = [*(item.records for item in bench.usable[-1:]), other]
    differing = whole_training(bench, neighbours if probe.public_size else [*neighbours, probe.dropped(picks.place)])
    if differing is not None:
        return judged(OUTSIDE, False, differing, "a training without the record goes on as before", OUTSIDE_WHY)
    same = "draws and eps" if probe.unanswered is None else "and draws"
    measured += f"; {STAGES['late']} steps, parameters, {same} the same"
    measured += f"; not compared: {probe.unanswered}" if probe.unanswered is not None else ""
    return judged(OUTSIDE, True, measured, wanted, OUTSIDE_WHY)
