"""Behind the noise: only noised values reach parameters, and only the noisy gradient decides which."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.special import ndtr

from attacks.contract import equal, rules
from attacks.contract import statistics as stats
from attacks.contract.bench import FROZEN, Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import AGREEMENT, Observation, Probe, Vector
from attacks.contract.result import joined, judged, skipped
from attacks.contract.training import STAGES
from dpaudit.documents import Check

PILOT, MOST_RUNS = 8, 200
RUNS = 10  # noise seeds behind the fit of the update rule


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module."""
    for check in (every_parameter, noised_blocks, one_line, update_rule, mask, mask_leak):
        yield check(bench)


EVERY = "every trained parameter noised"
EVERY_WHY = (
    "A parameter that moves with the data must have received noise. Usually a new head, an embedding or a late "
    "unfrozen layer that sits outside the private optimiser."
)


def every_parameter(bench: Bench) -> Check:
    """Blocks that moved without noise, unless they move the same whatever the batch (weight decay); early and late."""
    probe, picks = bench.probe, bench.picks
    if probe.mechanism == "zeroth-order":
        return skipped(EVERY, "zeroth-order noise is one number; see 'moves along the public line'", EVERY_WHY)
    batches = [[picks.anchor], [picks.anchor, picks.group[0]], list(picks.group)]
    seen = [probe.observe(batch) for batch in batches]
    bare = {f"{name} in step 1" for name in _bare(probe, seen)}
    for step in STAGES.values() if probe.deterministic else ():
        later = [bench.training.at(step, batch) for batch in batches]
        bare |= {f"{name} in step {step}" for name in _bare(probe, later)}
        seen += later
    bare |= {f"{name}, which parameters() names only after some steps" for name in probe.appeared}
    moving = {name for item in seen for name, moved in item.moved.items() if moved.any()}
    measured = f"moved without noise: {joined(bare)}" if bare else f"{len(moving)} of {len(probe.shapes)} blocks moved"
    if not moving:
        return skipped(EVERY, "no block moved, so nothing was compared", EVERY_WHY)
    return judged(EVERY, not bare, measured, "every block that moves has noise", EVERY_WHY)


def _bare(probe: Probe, seen: Sequence[Observation]) -> set[str]:
    """Blocks that moved without noise in one of the steps, and not the same in all (weight decay, momentum)."""
    bare = {name for item in seen for name, moved in item.moved.items() if name not in item.noised and moved.any()}
    if not probe.deterministic:
        return bare
    return {name for name in bare if any((item.moved[name] != seen[0].moved[name]).any() for item in seen[1:])}


NOISED = "noised blocks don't follow data"
NOISED_WHY = (
    "Which blocks receive noise must be settled before the batch is seen. If the strongest clean blocks are chosen and "
    "only they are noised, the choice itself is released without any noise."
)


def noised_blocks(bench: Bench) -> Check:
    """In the first step no earlier release exists that the choice could follow, so it must be one and the same."""
    probe, picks = bench.probe, bench.picks
    batches = [[picks.anchor], list(picks.group), *([unit] for unit in picks.group)]
    seen = [probe.observe(batch, noise=noise) for batch in batches for noise in (0, 1)]
    if bench.empty_problem is None:
        seen.append(probe.observe([]))
    seen += [probe.observe([picks.anchor, picks.place], records=item.records) for item in bench.usable]
    kinds = {item.noised for item in seen}
    measured = f"{len(kinds)} different sets of noised blocks over {len(seen)} first steps"
    fine = len(kinds) == 1
    for step in STAGES.values() if fine and probe.deterministic else ():
        later = {bench.training.at(step, batch).noised for batch in batches}
        if len(later) > 1:
            measured, fine = f"after one history, {len(later)} different sets over {len(batches)} batches", False
    return judged(NOISED, fine, measured, "one and the same after the same releases", NOISED_WHY)


LINE = "moves along the public line"
LINE_WHY = (
    "A zeroth-order step may move parameters only along its public direction, by the noisy number; anything off that "
    "line is private and has no noise."
)


def one_line(bench: Bench) -> Check:
    """Zeroth-order: displacements of all batches and noise seeds are parallel."""
    probe, picks = bench.probe, bench.picks
    if probe.mechanism != "zeroth-order":
        return skipped(LINE, "not a zeroth-order mechanism", LINE_WHY)
    batches = [[picks.anchor], list(picks.group), [picks.place]]
    moves = [_whole(probe.observe(batch, noise=noise).moved) for batch in batches for noise in (0, 1)]
    moves = [move for move in moves if np.linalg.norm(move) > 0]
    if len(moves) < 2:
        return skipped(LINE, "the parameters did not move", LINE_WHY)
    units = [move / np.linalg.norm(move) for move in moves]
    off = max(math.sqrt(max(0.0, 1 - min(1.0, float(unit @ units[0])) ** 2)) for unit in units[1:])
    weights = _whole(probe.build().parameters())
    rounding = 1e-6 * float(np.linalg.norm(weights)) / min(float(np.linalg.norm(move)) for move in moves)
    allowed = 10 * AGREEMENT + rounding
    return judged(LINE, off <= allowed, f"sine of the largest angle {off:.2g}", f"at most {allowed:.2g}", LINE_WHY)


def _whole(blocks: dict[str, Vector]) -> Vector:
    return np.concatenate([blocks[name] for name in sorted(blocks)])


RULE = "update follows the released gradient"
RULE_WHY = (
    "Parameters move as a function of what was released and of nothing else. If equal releases give different moves, "
    "the optimiser still sees the clean gradient: in momentum, in Adam's second moment, or in the update itself."
)


def update_rule(bench: Bench) -> Check:
    """Learn each coordinate's move from noise seeds on one batch, then predict it on other batches.

    Two forms are recognised: affine in the releases (SGD, momentum, weight decay) and the sign of the release (Adam in
    its first step). Step 1 is judged on other batches, step 2 on an empty batch after another first batch, and all
    steps of two histories, with a noise seed and without, by the rule that noise alone shows (attacks.contract.rules).
    Where gradients can be injected, equal releases must give equal moves, whatever the rule (attacks.contract.equal).
    """
    probe = bench.probe
    if not probe.deterministic:
        return skipped(RULE, FROZEN, RULE_WHY)
    if probe.mechanism == "zeroth-order":
        return skipped(RULE, "zeroth-order; see 'moves along the public line'", RULE_WHY)
    weights = probe.build().parameters()
    misses = [_miss_of_step(bench, name, weights[name], second) for name in sorted(weights) for second in (False, True)]
    judgeable = [miss for miss in misses if miss is not None]
    if bench.empty_problem is None:
        late = list(rules.misses(bench))
        covered = {miss.where.split(",")[0] for miss in late if miss.last >= rules.LATE} >= set(weights)
        late += equal.misses(bench, covered=covered)
        judgeable, misses = judgeable + late, [*misses, *late]
    if not judgeable:
        return skipped(RULE, "the update rule is neither affine nor a sign, so it can't be learned", RULE_WHY)
    worst, where, _ = max(judgeable)
    last = max(miss.last for miss in judgeable)
    measured = f"prediction off by {worst:.2g} x the tolerance ({where}; {len(judgeable)} of {len(misses)} cases judged"
    measured += f", {'step 1 alone' if last == 1 else f'steps 1 to {last}'})"
    if worst <= 1 and last < rules.LATE:
        return skipped(RULE, f"{measured}: the rule of later steps could not be learned{_why(bench)}", RULE_WHY)
    return judged(RULE, worst <= 1, measured, "at most 1", RULE_WHY)


def _why(bench: Bench) -> str:
    """Why no later step was compared without the rule."""
    if bench.empty_problem is not None:
        return f", which needs an empty batch: {bench.empty_problem}"
    if "inject" not in bench.probe.offered:
        return f", and equal releases need inject(): {bench.probe.lacking['inject']}"
    return ", and injected gradients gave no equal releases"


Run = tuple[Vector, Vector]  # releases (p, d) of the last p steps, and the move (d,)
Rule = Callable[[Vector], Vector]


def _miss_of_step(bench: Bench, name: str, weights: Vector, second: bool) -> rules.Miss | None:
    """How badly the rule learned on one batch predicts another, in tolerances; None where no rule was learned."""
    if second and bench.empty_problem is not None:
        return None
    picks = bench.picks
    learn_on, judge_on = [picks.anchor, picks.group[0]], [[picks.place], list(picks.group)]
    learn = _runs(bench, name, learn_on, range(RUNS), second)
    judge = [run for batch in judge_on for run in _runs(bench, name, batch, range(3), second)]
    if len(learn) < (6 if second else 4) or not judge:
        return None
    size = max(float(np.abs(move).max()) for _, move in learn)
    tolerance = 10 * AGREEMENT * size + 4e-7 * float(np.abs(weights).max())
    predict = _affine(learn, tolerance) or (None if second else _signs(learn, tolerance))
    if predict is None:
        return None
    gaps = np.concatenate([np.abs(predict(inputs) - move) for inputs, move in judge])
    if np.isnan(gaps).all():
        return None
    gap = float(np.nanmax(gaps))
    step = 2 if second else 1
    return rules.Miss(gap / (3 * tolerance), f"{name}, step {step}", step)


def _runs(bench: Bench, name: str, batch: Sequence[int], noises: Sequence[int], second: bool) -> list[Run]:
    runs = []
    for noise in noises:
        if second:
            first, seen = _two_steps(bench, batch, noise)
            steps = [first, seen]
        else:
            seen = bench.probe.observe(batch, noise=noise)
            steps = [seen]
        values = [step.released.get(name) for step in steps]
        # A block that was pruned does not move; the rule of the others is what is learned.
        if all(value is not None for value in values) and all(step.moved[name].any() for step in steps):
            runs.append((np.stack([value for value in values if value is not None]), seen.moved[name]))
    return runs


def _two_steps(bench: Bench, batch: Sequence[int], noise: int) -> tuple[Observation, Observation]:
    """`batch`, then an empty one; remembered on the bench's probe."""
    memory: dict[tuple[tuple[int, ...], int], tuple[Observation, Observation]]
    memory = bench.__dict__.setdefault("_two_steps", {})
    key = (tuple(batch), noise)
    if key not in memory:
        subject = bench.probe.build(bench.probe.own, noise)
        memory[key] = (bench.probe.watch(subject, batch), bench.probe.watch(subject, []))
    return memory[key]


def _affine(learn: list[Run], tolerance: float) -> Rule | None:
    """Per coordinate: move = a + b . releases, by least squares; None if that does not fit what it was learned on.

    Predictions are NaN outside the range of releases that it was learned on.
    """
    inputs = np.stack([run[0] for run in learn])  # (K, p, d)
    moves = np.stack([run[1] for run in learn])  # (K, d)
    count, _, size = inputs.shape
    low, high = inputs.min(axis=0), inputs.max(axis=0)
    scale = np.abs(inputs).max(axis=(0, 2), keepdims=True) + 1e-300
    design = np.concatenate([np.ones((count, 1, size)), inputs / scale], axis=1).transpose(2, 0, 1)
    fits = [np.linalg.lstsq(design[j], moves[:, j], rcond=1e-6) for j in range(size)]
    coefficients = np.stack([fit[0] for fit in fits])
    # Where releases did not vary (no noise, or the same noise in both steps) nothing can be learned.
    known = np.array([fit[2] == design.shape[2] for fit in fits])
    if not known.any():
        return None
    residual = np.abs(np.einsum("jkp,jp->kj", design, coefficients) - moves).max()
    if residual > tolerance:
        return None

    def predict(new: Vector) -> Vector:
        value = coefficients[:, 0] + np.einsum("pd,dp->d", new / scale[0], coefficients[:, 1:])
        # No further than what was learned: a rule that looks affine here may bend elsewhere (the sign of Adam).
        inside = ((new >= low) & (new <= high)).all(axis=0)
        return np.where(known & inside, value, np.nan)

    return predict


def _signs(learn: list[Run], tolerance: float) -> Rule | None:
    """Per coordinate: the move depends on the sign of the release alone; NaN where a sign was not seen, and beyond the
    releases that were (a rule that rounds may look like a sign among small ones)."""
    releases = np.stack([run[0][0] for run in learn])
    if np.ptp(releases, axis=0).max() == 0:
        return None
    # Adam divides by |release| + eps: a release that happens to be nearly zero is no sign yet.
    nearly_zero = AGREEMENT * float(np.median(np.abs(releases)))
    signs = np.where(np.abs(releases) > nearly_zero, np.sign(releases), 0.0)
    moves = np.stack([run[1] for run in learn])
    tables, ranges = {}, {}
    for sign in (-1.0, 1.0):
        chosen = np.where(signs == sign, moves, np.nan)
        seen = (signs == sign).any(axis=0)
        low = np.min(np.where(signs == sign, moves, np.inf), axis=0)
        high = np.max(np.where(signs == sign, moves, -np.inf), axis=0)
        if (np.where(seen, high - low, 0.0) > tolerance).any():
            return None
        tables[sign] = np.where(seen, np.nanmax(np.where(seen, chosen, 0.0), axis=0), np.nan)
        least = np.min(np.where(signs == sign, releases, np.inf), axis=0)
        ranges[sign] = least, np.max(np.where(signs == sign, releases, -np.inf), axis=0)

    def predict(new: Vector) -> Vector:
        out = np.full(new[0].shape, np.nan)
        for sign, (least, most) in ranges.items():
            inside = (sign * new[0] > nearly_zero) & (new[0] >= least) & (new[0] <= most)
            out = np.where(inside, tables[sign], out)
        return out

    return predict


LIVE_MASKS = 12
MASK = "update mask sees noise only"
MASK_WHY = (
    "Which blocks are updated must be a function of the noisy gradient. A mask from the clean gradient is a release "
    "without noise (pruning before noise instead of after it)."
)


def mask(bench: Bench) -> Check:
    """Equal noisy input after neighbouring batches must give equal masks, and the mask applied must be that one."""
    probe, picks = bench.probe, bench.picks
    if "select" not in probe.offered:
        return skipped(MASK, "the trainer offers no select(); see 'update mask leaks no more than claimed'", MASK_WHY)
    if probe.mechanism == "zeroth-order" or not probe.deterministic:
        return skipped(MASK, "zeroth-order" if probe.deterministic else FROZEN, MASK_WHY)
    batches = [[picks.anchor], [picks.anchor, *picks.group], [picks.place]]
    subjects = []
    differs = 0
    paths: list[tuple[int, list[int]]] = [(1, batch) for batch in batches]
    paths += [(step, batch) for step in STAGES.values() for batch in batches[:2]]
    for step, batch in paths:
        subject = probe.grown(tuple(map(tuple, bench.training.batches[: step - 1])), bench.training.records)
        seen = probe.watch(subject, batch)
        released = subject.ask("released")
        if seen.applied is not None and all(value is not None for value in released.values()):
            differs += subject.select(dict(released)) != seen.applied
        if step == 1:
            subjects.append(subject)
    differs, asked = differs + _not_applied(bench), len(paths) + LIVE_MASKS
    rng = np.random.default_rng([probe.seed, 13])
    some = _noisy_input(probe, rng, 1.0)
    if len({subjects[0].select(some) for _ in range(3)}) > 1:
        return skipped(MASK, "select() gives another mask at every call", MASK_WHY)
    inputs = [_noisy_input(probe, rng, scale) for scale in (1e-6, 1e-2, 1.0, 1e2) for _ in range(6)]
    moved = sum(len({subject.select(noisy) for subject in subjects}) > 1 for noisy in inputs)
    measured = f"{moved} of {len(inputs)} masks changed with the batch; {differs} of {asked} were not applied"
    return judged(MASK, moved + differs == 0, measured, "none", MASK_WHY)


def _not_applied(bench: Bench) -> int:
    """In how many of the first LIVE_MASKS steps without a noise seed another mask was applied than the release has."""
    differs = 0
    try:
        subject = bench.probe.build(bench.training.records, None)
        for batch in bench.training.batches[:LIVE_MASKS]:
            seen = bench.probe.watch(subject, batch)
            released = subject.ask("released")
            if seen.applied is not None and all(value is not None for value in released.values()):
                differs += subject.select(dict(released)) != seen.applied
    except MethodFailure:  # what 'batches without a seed' reports
        return 0
    return differs


def _noisy_input(probe: Probe, rng: np.random.Generator, scale: float) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(scale * rng.exponential() * rng.standard_normal(shape)).float()
        for name, shape in probe.shapes.items()
    }


LEAK = "update mask leaks no more than claimed"
LEAK_WHY = (
    "The mask of a step that releases a mu-GDP gradient can tell a unit's presence only as well as mu allows. A mask "
    "that follows the unit and not the noise seed comes from the clean gradient."
)


def mask_leak(bench: Bench) -> Check:
    """How often one mask occurs with a unit and without it, over fresh noise seeds (Clopper-Pearson, GDP).

    The mask is fixed on a pilot; the count uses other seeds. mu = 1 / sigma for adding or removing one unit.
    """
    probe, picks = bench.probe, bench.picks
    sigma = probe.claim.noise_multiplier
    if "applied" not in probe.offered:
        return skipped(LEAK, "the trainer offers no applied()", LEAK_WHY)
    if probe.mechanism != "gaussian" or sigma == 0:
        return skipped(LEAK, f"mechanism {probe.mechanism}, noise multiplier {sigma:g}", LEAK_WHY)
    pairs: list[tuple[list[int], list[int]]] = (
        [([unit], []) for unit in picks.group] if bench.empty_problem is None else []
    )
    pairs += [([unit, picks.anchor], [picks.anchor]) for unit in picks.group]
    telling = [(big, small, chosen) for big, small in pairs if (chosen := _pilot(probe, big, small)) is not None]
    if not telling:
        measured = f"no mask told a unit's presence over {len(pairs)} pairs of neighbours"
        return judged(LEAK, True, measured, f"mu at most {1 / sigma:.3g}", LEAK_WHY)
    alpha = stats.ALPHA / (2 * len(pairs))  # either direction of each pair
    runs = min(MOST_RUNS, math.ceil(math.log(alpha / 2) / math.log(float(ndtr(0.55 / sigma)))) + 1)
    worst = 0.0
    for big, small, chosen in telling[:3]:
        seeds = range(PILOT, PILOT + runs)
        hits = [sum(probe.observe(batch, noise=k).applied == chosen for k in seeds) for batch in (big, small)]
        worst = max(worst, stats.gaussian_leak(max(hits), min(hits), runs, alpha))
    measured = f"mu at least {worst:.3g} ({runs} noise seeds, {len(telling)} pairs with a telling mask)"
    return judged(LEAK, worst <= 1 / sigma, measured, f"at most {1 / sigma:.3g}", LEAK_WHY)


def _pilot(probe: Probe, big: list[int], small: list[int]) -> frozenset[str] | None:
    """A mask that was applied (nearly) always with the unit and never without it, or the other way round."""
    for seeds in (3, PILOT):  # most pairs are settled by the first few seeds
        masks = [[probe.observe(batch, noise=k).applied for k in range(seeds)] for batch in (big, small)]
        found = None
        for mine, other in ((masks[0], masks[1]), (masks[1], masks[0])):
            common = max(set(mine), key=mine.count)
            if mine.count(common) >= seeds - (seeds > 3) and other.count(common) <= (seeds > 3):
                found = common
        if found is None:
            return None
    return found
