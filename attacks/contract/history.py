"""What a trainer remembers besides its parameters: nothing of the batches that it has seen.

Releases are compared in three ways. A training in which a record that no batch holds is replaced goes on exactly as
before (`whole_training`). An empty batch releases the noise of its step and nothing else, after any history. And at
equal parameters one batch has one clipped sum, whatever came before.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from attacks.contract.bench import Bench, finite
from attacks.contract.draws import ask, reported
from attacks.contract.probe import Observation, Records, Vector
from attacks.contract.result import frozen, judged, skipped
from attacks.contract.subject import Subject
from attacks.contract.training import STAGES
from dpaudit import temporary
from dpaudit.documents import Check

DRAWS = 20
GROWTH = 10.0  # what rounding may grow to over a training, in units of what one step may lose
DEFAULT_DELTA = 1e-5


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    for check in (carried_over, equal_parameters):
        yield check(bench)


CARRIED = "nothing carried over"
CARRIED_WHY = (
    "A batch is used once: what an empty step releases must not depend on the batches before. Usually a missing "
    "zero_grad, gradients accumulated over steps, or what clipping cut off added to the next batch."
)


@frozen(CARRIED, CARRIED_WHY)
def carried_over(bench: Bench) -> Check:
    """Every empty batch of two histories, against the same step of a training on empty batches; same noise.

    On the blocks that have noise in both: which ones these are may follow earlier releases.
    """
    probe, training = bench.probe, bench.training
    if bench.empty_problem is not None:
        return skipped(CARRIED, f"needs an empty batch: {bench.empty_problem}", CARRIED_WHY)
    size, worst, where, tried = probe.claim.max_grad_norm, 0.0, 0, 0
    seen = [
        (step, item)
        for batches, course in ((training.batches, training.first), (training.others, training.second))
        for step, (batch, item) in enumerate(zip(batches, course, strict=True), 1)
        if not batch
    ]
    seen += [(2, probe.observe([], earlier=[batch])) for batch in ([bench.picks.place], list(bench.picks.group))]
    seen += [(step, training.at(step, [])) for step in STAGES.values()]
    for step, item in seen:
        noise = training.noise[step - 1]
        common = sorted(noise.noised & item.noised)
        if common and np.isfinite(item.vector).all():
            tried += 1
            gap = probe.size(_of(item, common) - _of(noise, common)) - 2 * probe.slack(noise, item)
            if gap > worst:
                worst, where = gap, step
    if not tried:
        return skipped(CARRIED, "no block has noise in all of the steps that could be compared", CARRIED_WHY)
    at = f" (step {where})" if worst else ""
    measured = f"{tried} empty batches after other batches moved by {worst / size:.3g} C beyond rounding{at}"
    return judged(CARRIED, worst <= 1e-6 * size, measured, "nothing but the noise of their step", CARRIED_WHY)


def _of(seen: Observation, names: Sequence[str]) -> Vector:
    return np.concatenate([value for name in names if (value := seen.released[name]) is not None])


EQUAL = "equal parameters, equal release"
EQUAL_WHY = (
    "At equal parameters the release of a step is a function of its batch and its noise. If earlier batches still "
    "count, they do so without noise: buffers of raw activations, a clip norm that follows old gradients, residuals."
)


@frozen(EQUAL, EQUAL_WHY)
def equal_parameters(bench: Bench) -> Check:
    """One batch after several histories, with the parameters set alike before it."""
    probe = bench.probe
    size, worst, where, tried = probe.claim.max_grad_norm, 0.0, "", 0
    meant = _weights(bench)
    for step in (2, *STAGES.values()):
        # Without copies every history is repeated step by step for each of its branches.
        for batch in (list(bench.picks.group), [bench.picks.group[0]])[: 2 if probe.copyable else 1]:
            seen = _after(bench, _paths(bench, step), batch, meant)
            if seen is None:
                why = "the trainer offers neither assign() nor save() and load(), so parameters can't be made equal"
                if probe.unheard is not None:
                    why = f"{probe.unheard}, so parameters can't be made equal"
                elif "assign" in probe.offered:
                    why = "assign() does not change what the next step releases, so nothing can be compared"
                return skipped(EQUAL, why, EQUAL_WHY)
            for one, two in pairwise(seen):
                if one.noised == two.noised and finite(one) and finite(two):
                    tried += 1
                    gap = probe.size(one.vector - two.vector) - 2 * probe.slack(one, two)
                    if gap > worst:
                        worst, where = gap, f" (a batch of {len(batch)} in step {step})"
    if not tried:
        return skipped(EQUAL, "which blocks are noised followed the history, so no two steps compare", EQUAL_WHY)
    allowed = max(1e-6, probe.agreement - 1e-3) * size
    measured = f"the release moved by {worst / size:.3g} C with the history over {tried} pairs{where}"
    return judged(EQUAL, worst <= allowed, measured, f"at most {allowed / size:.1g} C beyond rounding", EQUAL_WHY)


def _weights(bench: Bench) -> dict[str, Vector]:
    """Parameters that a training would really have: those after five steps of the first history."""
    steps = bench.training.first[:5]
    meant = {name: value + sum(step.moved[name] for step in steps) for name, value in bench.probe.start.items()}
    return meant if all(np.isfinite(value).all() for value in meant.values()) else bench.probe.start


History = tuple[list[list[int]], Records | None]  # batches, and a neighbouring data set that holds an extreme record


def _paths(bench: Bench, step: int) -> list[History]:
    """Histories of `step` - 1 steps: two of data, one of empty batches, and three that end with what is extreme."""
    training, picks = bench.training, bench.picks
    idle = [] if bench.empty_problem is None else training.batches[0]
    paths: list[History] = [(part[: step - 1], None) for part in (training.batches, training.others)]
    paths.append(([idle] * (step - 1), None))
    before = training.batches[: step - 2]
    paths += [([*before, [picks.group[0]]], None), ([*before, sorted(training.pool[: training.largest])], None)]
    if bench.usable:
        paths.append(([*before, [picks.place]], bench.usable[0].records))
    return paths


def _after(
    bench: Bench, paths: Sequence[History], batch: list[int], meant: dict[str, Vector]
) -> list[Observation] | None:
    """The release of `batch` after each path at equal parameters; None if these can't be set."""
    probe, training = bench.probe, bench.training
    subjects = [probe.grown(tuple(map(tuple, path)), training.beside(records)) for path, records in paths]
    effective = all(subject.put(meant) for subject in subjects) and heard(bench, paths[0][0], batch, meant)
    if not effective:
        if not {"save", "load"} <= probe.offered:
            return None
        with temporary.folder("check") as folder:
            file = folder / "checkpoint"
            subjects[0].ask("save", file)
            for subject in subjects:
                subject.ask("load", file)
    return [probe.watch(subject, batch) for subject in subjects]


def heard(bench: Bench, path: list[list[int]], batch: list[int], meant: dict[str, Vector]) -> bool:
    """Whether the parameters set are those that gradients are computed from (an average of weights may be shown)."""
    probe, records = bench.probe, bench.training.records
    subject = probe.grown(tuple(map(tuple, path)), records)
    subject.put(meant)
    seen = probe.watch(subject, batch)
    before = probe.observe(batch, records=records, earlier=path)
    return probe.size(seen.vector - before.vector) > 2 * probe.slack(seen, before)


def whole_training(bench: Bench, neighbours: Sequence[Records]) -> str | None:
    """What differs between a training and the same training on neighbouring data; None if nothing does.

    Everything public is compared at every step: releases, parameters, updated blocks; at the end the claim, the eps
    reported and, where neighbours have equal sizes, the next draws of the sampler.
    """
    reference = _transcript(bench, bench.probe.own)
    own, count = bench.training.records, len(bench.training.records.items)
    repeats = "sample" in bench.probe.offered and reference[1]["draws"] == _draws(bench.probe.build(own), count)
    for records in neighbours:
        found = _differing(bench, reference, _transcript(bench, records), repeats)
        if found is not None:
            return f"a record that is in no batch was changed ({records.name}): {found}"
    return None


Transcript = tuple[list[Observation], dict[str, Any]]


def _transcript(bench: Bench, records: Records) -> Transcript:
    probe, place = bench.probe, bench.training.outside
    less = len(records.items) < len(probe.own.items)
    records = bench.training.beside(records if records is not probe.own else None)
    batches = [[unit - (less and unit > place) for unit in batch] for batch in bench.training.batches]
    subject = probe.build(records)
    facts: dict[str, Any] = {}
    if "sample" in probe.offered and not less:
        facts["draws"] = _draws(probe.build(records), len(records.items))
    course = [probe.watch(subject, batch) for batch in batches]
    facts["claim"] = subject.claim()
    # It may be slow, and nothing has been judged yet; once it was, it is not waited for again.
    if "epsilon" in probe.offered and probe.unanswered is None:
        eps = reported(subject, probe.claim.delta or DEFAULT_DELTA)
        facts |= {} if eps is None else {"eps": eps}
    if "sample" in probe.offered and not less:
        facts["draws after the training"] = _draws(subject, len(records.items))
    return course, facts


def _draws(subject: Subject, count: int) -> list[list[int]]:
    return [ask(subject, count) for _ in range(DRAWS)]


def _differing(bench: Bench, one: Transcript, two: Transcript, repeats: bool) -> str | None:
    probe = bench.probe
    weights = max(float(np.abs(value).max()) for value in probe.start.values() if value.size)
    for step, (mine, theirs) in enumerate(zip(one[0], two[0], strict=True), 1):
        if mine.noised != theirs.noised or mine.applied != theirs.applied:
            return f"other blocks are noised or updated in step {step}"
        if not np.isfinite(mine.vector).all():
            return None
        gap = probe.size(mine.vector - theirs.vector)
        if gap > GROWTH * (1e-6 * probe.claim.max_grad_norm + 2 * probe.slack(mine, theirs)):
            return f"the release of step {step} moved by {gap / probe.claim.max_grad_norm:.3g} C"
        for name, moved in mine.moved.items():
            allowed = GROWTH * (1e-5 * float(np.abs(moved).max(initial=0.0)) + 1e-6 * weights)
            if float(np.abs(moved - theirs.moved[name]).max(initial=0.0)) > allowed:
                return f"{name} moved otherwise in step {step}, although the release was the same"
    for name, value in one[1].items():
        if name not in two[1] or (name.startswith("draws") and not repeats):
            continue
        if name == "eps" and math.isclose(two[1][name], value, rel_tol=1e-6):
            continue
        if two[1][name] != value:
            return f"{name} changed ({value:.6g} to {two[1][name]:.6g})" if name == "eps" else f"{name} changed"
    return None
