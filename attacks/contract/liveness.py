"""Whether anything happened at all: no move, no gradient and no signal is a result of its own, never agreement."""

from collections.abc import Iterator

import numpy as np

from attacks.contract.bench import FROZEN, Bench
from attacks.contract.probe import ROUNDING, Observation, Vector
from attacks.contract.result import joined, judged, skipped
from attacks.contract.training import STAGES
from dpaudit.documents import Check

FEWEST = 5  # steps in which a released block that does not move has stopped


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    for check in (moves, gradients_live):
        yield check(bench)


MOVES = "every released block moves"
MOVES_WHY = (
    "A block that is noised and released is trained, so it moves within a training. If it never does, the optimiser "
    "holds other tensors than parameters() shows, the learning rate is 0, or updates round to nothing; what is checked "
    "is then not what trains (PEFT after make_private, a model moved to the GPU after its optimiser was built)."
)


def moves(bench: Bench) -> Check:
    """Blocks that received noise (and were updated, where the trainer says which) and did not move in any step, or in
    none of the last third of a training in which others did."""
    probe, training = bench.probe, bench.training
    courses = [training.first, training.second]
    if bench.empty_problem is None:
        courses.append(training.noise)
    steps = [seen for course in courses for seen in course]
    moved = {name for seen in steps for name, value in seen.moved.items() if value.any()}
    due = _due(bench, steps)
    if not moved:
        measured = f"no parameter moved in any of {len(steps)} steps"
        return judged(MOVES, False, measured, "every block that is updated moves", MOVES_WHY)
    still = sorted(due - moved)
    measured = f"{len(moved)} of {len(probe.shapes)} blocks moved in {len(steps)} steps"
    if still:
        measured = f"never moved in {len(steps)} steps: {joined(still)} ({len(still)} of {len(due)} released blocks)"
    stopped = {} if still else _stopped(bench, [*courses, *bench.live])
    if stopped:
        measured = f"moved no more: {', '.join(f'{name} after step {step}' for name, step in sorted(stopped.items()))}"
    dead = None if still or stopped else _dead(bench, courses)
    if dead is not None:
        measured = dead
    idle = [] if still or stopped or dead else _idle(bench)
    if idle:
        measured = f"never moved without a noise seed, and did with one: {joined(idle)}"
    fine = not (still or stopped or dead or idle)
    return judged(MOVES, fine, measured, "every block that is updated moves", MOVES_WHY)


def _dead(bench: Bench, courses: list[list[Observation]]) -> str | None:
    """A training in which nothing moves in the last third of the steps looked at, all of them claimed: weights
    that have become NaN, a schedule made for fewer steps, a warm-up that never begins. Beyond the claimed steps
    a learning rate may well be 0."""
    claimed = bench.probe.claim.steps
    for course in courses:
        within = course if claimed is None else course[:claimed]
        tail = within[2 * len(within) // 3 :]
        if len(tail) >= FEWEST and _due(bench, tail) and not any(map(_goes_on, tail)):
            last = max((step for step, seen in enumerate(within, 1) if _goes_on(seen)), default=0)
            return f"no parameter moved after step {last} of {len(within)}"
    return None


def _goes_on(seen: Observation) -> bool:
    """Whether a step moved some block to numbers."""
    return any(np.nan_to_num(value, posinf=0.0, neginf=0.0).any() for value in seen.moved.values())


def _idle(bench: Bench) -> list[str]:
    """Blocks that moved in most steps of a history with a noise seed and in none of those without."""
    training, live = bench.training, [seen for course in bench.live for seen in course]
    seeded = [*training.first, *training.second]

    def times(steps: list[Observation], name: str) -> int:
        return sum(bool(seen.moved[name].any()) for seen in steps if name in seen.moved)

    names = bench.probe.shapes if live else ()
    return [name for name in names if 2 * times(seeded, name) > len(seeded) and not times(live, name)]


def _stopped(bench: Bench, courses: list[list[Observation]]) -> dict[str, int]:
    """Blocks that are released in the last third of a training and don't move in it, and their last step that did.

    Only where another block still moves (at the end of a schedule the learning rate may be 0 for all), and only blocks
    that moved in every step before: one that is chosen now and then may as well not be chosen for a third. Beyond the
    claimed steps a decayed learning rate may round a block's updates to nothing; only a claim of few steps is looked at
    further, for blocks that stopped within it.
    """
    found: dict[str, int] = {}
    for whole in courses:
        claimed = bench.probe.claim.steps or len(whole)
        course = whole[:claimed] if claimed >= 3 * FEWEST else whole
        tail = course[2 * len(course) // 3 :]
        moving = {name for seen in tail for name, value in seen.moved.items() if value.any()}
        if moving and len(tail) >= FEWEST:
            for name in _due(bench, tail) - moving:
                steps = [step for step, seen in enumerate(course, 1) if name in seen.moved and seen.moved[name].any()]
                if len(steps) >= FEWEST and len(steps) == steps[-1] - steps[0] + 1 and steps[-1] < claimed:
                    found[name] = steps[-1]
    return found


def _due(bench: Bench, steps: list[Observation]) -> set[str]:
    """Blocks that should have moved; a zeroth-order step moves all of them."""
    if bench.probe.mechanism == "zeroth-order":
        return set(bench.probe.shapes)
    due: set[str] = set()
    for seen in steps:
        due |= seen.noised if seen.applied is None else seen.noised & seen.applied
    return due


LIVE = "gradients follow the parameters"
LIVE_WHY = (
    "Gradients belong to the parameters that parameters() shows: when these move, a unit's contribution changes. If it "
    "never does, gradients come from another copy of the model than the one that is updated; if there are none at all, "
    "the training consists of noise."
)


def gradients_live(bench: Bench) -> Check:
    """Contributions early and late, and at parameters set far away; blocks that no unit ever moved."""
    probe, training = bench.probe, bench.training
    if not probe.deterministic:
        return skipped(LIVE, FROZEN, LIVE_WHY)
    if bench.empty_problem is not None:
        return skipped(LIVE, f"needs an empty batch: {bench.empty_problem}", LIVE_WHY)
    alive, silent = _signals(bench)
    if not alive:
        measured = f"no unit moved any block in {len(training.batches)} steps: the training consists of noise"
        return judged(LIVE, False, measured, "contributions that are not zero", LIVE_WHY)
    count = len(alive) + len(silent)
    silent, far = _silent_far_away(bench, silent)
    if silent and (far or len(silent) > len(alive)):
        where = ", also at other parameters" if far else ""
        measured = f"no unit ever moved {joined(silent)} ({len(silent)} of {count} released blocks){where}"
        return judged(LIVE, False, measured, "contributions in every released block", LIVE_WHY)
    moved = any(seen.moved[name].any() for seen in training.first for name in seen.moved)
    units = [unit for unit in bench.picks.group if _size(bench, 1, unit) > 0]
    if not moved or not units:
        return skipped(LIVE, "the parameters did not move, or no unit moved the sum by itself", LIVE_WHY)
    changed = any(_changed(bench, unit) for unit in units) or _changed_far_away(bench, units[0])
    measured = (
        f"contributions of {len(units)} units {'changed' if changed else 'stayed the same'} when parameters moved"
    )
    if silent:
        measured += f"; no unit moved {joined(silent)}"
    if probe.unheard is not None:
        measured += f"; {probe.unheard}"
    return judged(LIVE, changed, measured, "contributions that change", LIVE_WHY)


def _signals(bench: Bench) -> tuple[set[str], set[str]]:
    """Released blocks that some batch of two histories moved, and those that none did."""
    training = bench.training
    alive: set[str] = set()
    named: set[str] = set()
    for batches, course in ((training.batches, training.first), (training.others, training.second)):
        for step, (batch, seen) in enumerate(zip(batches, course, strict=True), 1):
            noise = training.noise[step - 1]
            for name in noise.noised & seen.noised if batch else ():
                named.add(name)
                if _heard(bench, seen, noise, name):
                    alive.add(name)
    return alive, named - alive


def _heard(bench: Bench, seen: Observation, noise: Observation, name: str) -> bool:
    """Whether a block was released with more than the noise of its step."""
    mine, pure = seen.released[name], noise.released[name]
    if mine is None or pure is None:
        return False
    gap = float(np.linalg.norm(mine - pure))
    return not gap <= ROUNDING * bench.probe.precision * float(np.linalg.norm(mine))


def _signal(bench: Bench, step: int, unit: int) -> tuple[Vector, float] | None:
    training = bench.training
    seen = training.at(step, [unit])
    if not training.comparable(step, seen) or not np.isfinite(seen.vector).all():
        return None
    return training.signal(step, seen), training.slack(step, seen)


def _size(bench: Bench, step: int, unit: int) -> float:
    found = _signal(bench, step, unit)
    return bench.probe.size(found[0]) - 2 * found[1] if found is not None else 0.0


def _changed(bench: Bench, unit: int) -> bool:
    """Whether a unit's contribution differs between the first step and a later one by more than rounding."""
    first = _signal(bench, 1, unit)
    for step in STAGES.values():
        late = _signal(bench, step, unit)
        if first is None or late is None or bench.probe.size(late[0] - first[0]) > 2 * (first[1] + late[1]):
            return True
    return False


def _far(bench: Bench) -> dict[str, Vector]:
    """Parameters far from the first ones: a LoRA matrix that starts at 0 is none, so that its partner has gradients."""
    rng = np.random.default_rng([bench.probe.seed, 31])
    return {
        name: value + (0.1 + np.abs(value).mean()) * rng.standard_normal(value.size)
        for name, value in sorted(bench.probe.start.items())
    }


def _silent_far_away(bench: Bench, silent: set[str]) -> tuple[set[str], bool]:
    """Those of the silent blocks that no unit moves far away either, and whether that could be looked at.

    Early in a training the gradient of a block may drown in the rounding of its noise (A of a LoRA, whose B is small).
    """
    probe, training = bench.probe, bench.training
    if not silent:
        return silent, False
    for unit in bench.picks.group:
        subject = probe.build(training.records)
        if not subject.put(_far(bench)):
            return silent, False
        seen = probe.watch(subject, [unit])
        if training.comparable(1, seen) and np.isfinite(seen.vector).all():
            silent = {name for name in silent if not _heard(bench, seen, training.noise[0], name)}
    return silent, True


def _changed_far_away(bench: Bench, unit: int) -> bool:
    """Whether the contribution changes when all parameters are set elsewhere in the middle of a training, where a copy
    of them that was made in the first step is old; True where they can't be set."""
    probe, training, step = bench.probe, bench.training, STAGES["in the middle"]
    subject = probe.grown(tuple(map(tuple, training.batches[: step - 1])), training.records)
    if not subject.put(_far(bench)):
        return _displaced(bench) < 1e-3
    seen = probe.watch(subject, [unit])
    here = training.at(step, [unit])
    if seen.noised != here.noised or not (np.isfinite(seen.vector).all() and np.isfinite(here.vector).all()):
        return True
    return probe.size(seen.vector - here.vector) > 2 * probe.slack(seen, here)


def _displaced(bench: Bench) -> float:
    """How far the first history moved the parameters, relative to their size."""
    steps, start = bench.training.first, bench.probe.start
    far = np.concatenate([np.sum([step.moved[name] for step in steps], axis=0) for name in sorted(start)])
    size = np.linalg.norm(np.concatenate([start[name] for name in sorted(start)]))
    return float(np.linalg.norm(far) / max(float(size), 1e-300))
