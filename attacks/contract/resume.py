"""What a checkpoint forgets: parameters, budget, and which noise was used already."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attacks.contract import statistics as stats
from attacks.contract.bench import Bench
from attacks.contract.draws import reported
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Vector
from attacks.contract.result import joined, judged, skipped
from attacks.contract.subject import Subject
from dpaudit import temporary
from dpaudit.documents import Check

SEEDS, FEW_SEEDS = 8, 4  # few where the factory is slow
EMPTY, BEFORE = 3, 9  # empty steps, and steps on data, before the checkpoint
FORKS, FEW_FORKS, FORKED = 4, 2, 3  # trainings without a noise seed; steps before and after each checkpoint
DEFAULT_DELTA = 1e-5
FEW_FURTHER = 3  # further steps, of slow trainers, after which eps is asked again; others make as many as before
SAME = 1e-3  # of eps: what a resumed training may report less than one that was not interrupted
LOST = 2.0**-8  # of a parameter's size: what a checkpoint in bfloat16 may lose

RESUME_PARAMETERS = "parameters after a resume"
RESUME_PARAMETERS_WHY = (
    "A checkpoint holds the parameters that were trained. If it holds the starting weights, whatever was trained is "
    "silently lost (a wrapped module saved in place of the trained one)."
)
RESUME_EPSILON = "eps after a resume"
RESUME_EPSILON_WHY = (
    "Spent budget stays spent: a checkpoint that forgets it lets a run restart its accountant at zero. Steps after a "
    "resume are paid for like those before it."
)
RESUME_NOISE = "noise after a resume"
RESUME_NOISE_WHY = (
    "The step after a resume must not reuse the noise of an earlier one: two releases with equal noise differ by the "
    "data alone. Usually the generator is restored, but not the step count."
)
# eps before a checkpoint and after it, and (further steps, eps without an interruption, eps after the resume)
Spent = tuple[float, float, tuple[int, float, float] | None]
NAMES = (
    (RESUME_PARAMETERS, RESUME_PARAMETERS_WHY),
    (RESUME_EPSILON, RESUME_EPSILON_WHY),
    (RESUME_NOISE, RESUME_NOISE_WHY),
)


def checks(bench: Bench) -> Iterator[Check]:
    """Empty steps, a few on data, a checkpoint, a fresh trainer that loads it, and one more empty step."""
    probe = bench.probe
    if not {"save", "load"} <= probe.offered:
        yield from (
            skipped(name, bench.probe.lacking["load" if "save" in bench.probe.offered else "save"], why)
            for name, why in NAMES
        )
        return
    empty = bench.empty_problem is None
    batches: list[list[int]] = [[]] * (EMPTY if empty else 0) + [batch for batch in bench.training.batches if batch][
        :BEFORE
    ]
    earlier: list[list[Vector]] = []
    later: list[Vector] = []
    eps: list[Spent] = []
    lost: list[str] = []
    moved = False
    with temporary.folder("check") as folder:
        for noise in range(FEW_SEEDS if probe.slow else SEEDS):
            path = folder / f"checkpoint-{noise}"
            subject = probe.build(bench.training.records, noise)
            for batch in batches:
                subject.ask("step", list(batch))
            subject.ask("save", path)
            resumed = probe.build(bench.training.records, noise)
            resumed.ask("load", path)
            if "epsilon" in probe.offered and probe.unanswered is None and not eps:
                delta = probe.claim.delta or DEFAULT_DELTA
                before = reported(subject, delta)
                after = None if before is None else reported(resumed, delta)
                if before is not None and after is not None:
                    eps.append((before, after, None))
            if not lost:
                moved, lost = _lost(bench, subject, resumed)
            if eps and eps[0][2] is None and probe.unanswered is None:
                eps[0] = (*eps[0][:2], _further(bench, subject, path, batches))
            if empty:
                pure = bench.series.noises[noise].noise
                earlier.append([_step(pure, step) for step in range(len(batches))])
                seen = probe.watch(resumed, [])
                later.append(_kept(bench, seen.released))
    yield _parameters(moved, lost)
    yield _eps(eps, probe.unanswered)
    yield _noise(bench, earlier, later, _forks(bench) if empty else None)


def _forks(bench: Bench) -> Vector | str:
    """(3 x FORKED, d) noise without a seed: of a trainer before its checkpoint and of two that go on from it; of
    FORKS such trainings, side by side. Or what failed."""
    probe, forks = bench.probe, []
    with temporary.folder("check") as folder:
        try:
            for number in range(FEW_FORKS if probe.slow else FORKS):
                path = folder / f"checkpoint-{number}"
                subject = probe.build(bench.training.records, None)
                rows = [_kept(bench, probe.watch(subject, []).released) for _ in range(FORKED)]
                subject.ask("save", path)
                for _ in range(2):
                    resumed = probe.build(bench.training.records, None)
                    resumed.ask("load", path)
                    rows += [_kept(bench, probe.watch(resumed, []).released) for _ in range(FORKED)]
                forks.append(np.stack(rows))
        except MethodFailure as failure:
            return f"with noise_seed=None {failure}"
    return np.concatenate(forks, axis=1)


def _further(bench: Bench, subject: Subject, path: Path, batches: list[list[int]]) -> tuple[int, float, float] | None:
    """(further steps, eps of the trainer that saved, eps of one that loaded) after both went on with the same batches.
    None where the claim has no step left."""
    probe = bench.probe
    left = len(batches) if probe.claim.steps is None else min(len(batches), probe.claim.steps - len(batches))
    further = batches[: min(left, FEW_FURTHER) if probe.slow else left] if left > 0 else []
    if not further:
        return None
    resumed = probe.build(bench.training.records, 0)
    resumed.ask("load", path)
    for batch in further:
        subject.ask("step", list(batch))
        resumed.ask("step", list(batch))
    delta = probe.claim.delta or DEFAULT_DELTA
    straight = reported(subject, delta)
    other = None if straight is None else reported(resumed, delta)
    return None if straight is None or other is None else (len(further), straight, other)


def _step(noise: dict[str, "np.typing.NDArray[np.float32]"], step: int) -> Vector:
    return np.concatenate([noise[name][step].astype(np.float64) for name in sorted(noise)])


def _kept(bench: Bench, released: dict[str, Vector | None]) -> Vector:
    kept = bench.series.kept
    parts = [released.get(name) for name in sorted(kept)]
    return np.concatenate(
        [
            np.full(kept[name].size, np.nan) if part is None else part[kept[name]]
            for name, part in zip(sorted(kept), parts, strict=True)
        ]
    )


def _lost(bench: Bench, subject: Subject, resumed: Subject) -> tuple[bool, list[str]]:
    """Whether anything had moved, and the blocks that the resumed trainer shows otherwise."""
    saved, loaded, start = subject.parameters(), resumed.parameters(), bench.probe.start
    lost, moved = [], False
    for name in sorted(start):
        distance = float(np.linalg.norm(saved[name] - start[name]))
        moved |= distance > 0
        gap = float(np.linalg.norm(saved[name] - loaded.get(name, start[name])))
        if gap > min(LOST * float(np.linalg.norm(saved[name])), 0.5 * distance):
            lost.append(name)
    return moved, lost


def _parameters(moved: bool, lost: list[str]) -> Check:
    if not moved:
        return skipped(RESUME_PARAMETERS, "no parameter had moved, so nothing was compared", RESUME_PARAMETERS_WHY)
    measured = f"other values for {joined(lost)}" if lost else "as they were saved"
    return judged(RESUME_PARAMETERS, not lost, measured, "those that were saved", RESUME_PARAMETERS_WHY)


def _eps(eps: list[Spent], unanswered: str | None) -> Check:
    if not eps:
        return skipped(RESUME_EPSILON, unanswered or "the trainer offers no epsilon()", RESUME_EPSILON_WHY)
    before, after, further = eps[0]
    measured, fine = f"eps {before:.4g} before and {after:.4g} after", after >= before * (1 - 1e-6)
    if further is not None:
        steps, straight, resumed = further
        measured += f"; {steps} steps later {resumed:.4g}, without an interruption {straight:.4g}"
        fine = fine and resumed >= straight * (1 - SAME)
    if fine and unanswered is not None:
        return skipped(RESUME_EPSILON, f"{unanswered}; {measured}", RESUME_EPSILON_WHY)
    return judged(RESUME_EPSILON, fine, measured, "not less", RESUME_EPSILON_WHY)


def _noise(bench: Bench, earlier: list[list[Vector]], later: list[Vector], forks: Vector | str | None) -> Check:
    """Correlation of the resumed step's noise with that of every earlier step; without a seed, of the steps before a
    checkpoint and of those of two trainers after it."""
    if not later:
        return skipped(RESUME_NOISE, f"needs an empty batch: {bench.empty_problem}", RESUME_NOISE_WHY)
    test = stats.symmetric_correlation if bench.probe.mechanism == "laplace" else stats.correlation
    new = np.nan_to_num(np.concatenate(later))
    steps = len(earlier[0])
    old = [np.nan_to_num(np.concatenate([run[step] for run in earlier])) for step in range(steps)]
    pairs = [test(part, new) for part in old]
    worst = min(range(steps), key=lambda place: pairs[place][1])
    r, p = pairs[worst]
    if bench.probe.mechanism == "correlated":
        p = 0.0 if abs(r) > 1 - 1e-9 else 1.0  # correlation is allowed, repetition is not
    p = min(1.0, steps * p)
    measured = f"correlation {r:.3g} with step {worst + 1} of {steps} (p = {p:.2g})"
    fine, alpha = p > stats.ALPHA / 2, stats.ALPHA / 2
    if fine and forks is not None:
        fine, said = _forked(bench, forks)
        measured = f"{measured}; without a seed {said}" if fine else f"without a seed {said}"
    return judged(RESUME_NOISE, fine, measured, f"none: p above {alpha:g}", RESUME_NOISE_WHY)


def _forked(bench: Bench, forks: Vector | str) -> tuple[bool, str]:
    """Whether any two of the steps before a checkpoint and after it, by two trainers, share noise."""
    if isinstance(forks, str):
        return False, forks
    mechanism = bench.probe.mechanism
    r, p, (a, b), pairs = stats.most_correlated(np.nan_to_num(forks), symmetric=mechanism in ("laplace", "correlated"))
    if mechanism == "correlated":
        p = 0.0 if abs(r) > 1 - 1e-9 else 1.0
    who = ("before the checkpoint", "of a trainer that loaded it", "of another that loaded it")
    named = " and ".join(f"step {place % FORKED + 1} {who[place // FORKED]}" for place in (a, b))
    return p > stats.ALPHA / 2, f"correlation {r:.3g} ({named}; p = {p:.2g} over {pairs} pairs)"
