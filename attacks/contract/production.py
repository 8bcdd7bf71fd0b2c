"""The noise of production: trainers without a noise seed, in this process and in others.

All other checks hand a noise seed to the factory. Here none is handed over: two trainers, two steps and two processes
must then release different noise, and the noise must have the claimed law.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attacks.contract import statistics as stats
from attacks.contract.bench import Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.independence import Pair, neighbours, repeated, worst_pair
from attacks.contract.noise import law_of, level_of, squares
from attacks.contract.probe import Observation, Vector
from attacks.contract.result import judged, skipped
from attacks.contract.seeds import Draws, mixing
from dpaudit.documents import Check

TRAINERS, STEPS, PROCESSES = 4, 12, 2
QUICK_STEPS = 60  # where a step takes a moment
MOST_COMPARED = 4096  # coordinates that another process hands over
TESTS = 5  # level, law, steps and trainers, parameters, signal: each at ALPHA / TESTS
GRACE = 120.0  # seconds that a process may take beyond the time limit of a call, most of them for imports

UNSEEDED = "noise without a seed"
UNSEEDED_WHY = (
    "In production noise_seed is None and nobody may know the noise. Usually a torch.Generator() that nobody seeded "
    "(its first numbers are public and always the same), a global seed set at import, a noise multiplier that only the "
    "test passes on, or a generator seeded anew in every step."
)


def checks(bench: Bench) -> Iterator[Check]:
    """The one check of this module."""
    yield unseeded(bench)


def unseeded(bench: Bench) -> Check:
    """TRAINERS trainers without a noise seed, each on one batch and then on empty ones; and PROCESSES processes."""
    probe = bench.probe
    draws = Draws(bench)
    if not draws.blocks or probe.std == 0:
        return skipped(UNSEEDED, "there is no noise with a seed either", UNSEEDED_WHY)
    running = [_start(bench) for _ in range(PROCESSES)] if probe.target is not None and draws.empty else []
    try:
        batch, empty = _released(bench)
        answers = [_finish(process, bench) for process in running]
    except MethodFailure as failure:
        return judged(UNSEEDED, False, f"with noise_seed=None {failure}", "a step like any other", UNSEEDED_WHY)
    finally:
        for process in running:
            process.kill()
            process.wait()
    others = [answer for answer in answers if not isinstance(answer, str)]
    problems = [answer for answer in answers if isinstance(answer, str)]
    results = [_independent(bench, [*np.nan_to_num(empty), *others]) if empty.size else _differ(bench, batch)]
    if empty.size and not draws.unknown:
        results += _as_claimed(bench, draws, batch, empty)
    bad = [said for fine, said in results if not fine]
    where = f"{TRAINERS} trainers of this process and {len(others)} other processes"
    if problems:
        where += f"; another process could not be asked: {problems[0]}"
    elif not running:
        where += "; only a factory named module:factory can be built in another one"
    measured = f"{(bad or [said for _, said in results])[0]} ({where})"
    return judged(UNSEEDED, not bad, measured, "other noise every time, of the claimed law", UNSEEDED_WHY)


def _released(bench: Bench) -> tuple[Vector, Vector]:
    """(TRAINERS, d) of a batch in the first step, and (TRAINERS, steps - 1, d) of the empty steps that follow."""
    probe = bench.probe
    first, rest = [], []
    for _ in range(TRAINERS):
        subject = probe.build(probe.own, None)
        first.append(row_of(probe.watch(subject, list(bench.picks.group))))
        if bench.empty_problem is None:
            steps = min(QUICK_STEPS, len(bench.training.noise)) if bench.training.quick else STEPS
            rest.append(np.stack([row_of(probe.watch(subject, [])) for _ in range(steps - 1)]))
    return np.stack(first), np.stack(rest) if rest else np.zeros((0, 0, 0))


def row_of(seen: Observation) -> Vector:
    """What was released, NaN where a block was not noised."""
    known = [
        np.full(seen.moved[name].size if name in seen.moved else 1, np.nan) if value is None else value
        for name, value in sorted(seen.released.items())
    ]
    return np.concatenate(known)


def _differ(bench: Bench, batch: Vector) -> tuple[bool, str]:
    """Without empty batches: releases of one batch are the same only where the noise is."""
    pairs = [(a, b) for b in range(len(batch)) for a in range(b)]
    equal = [
        pair
        for pair in pairs
        if np.linalg.norm(np.nan_to_num(batch[pair[0]] - batch[pair[1]])) < 1e-3 * bench.probe.std
    ]
    return not equal, f"{len(equal)} of {len(pairs)} pairs of trainers released the same"


def _independent(bench: Bench, trainers: list[Vector]) -> tuple[bool, str]:
    """All pairs of trainers over their common steps, and all pairs of steps of all trainers."""
    probe = bench.probe
    symmetric = probe.mechanism == "laplace"
    size = min(MOST_COMPARED, *(rows.shape[1] for rows in trainers))
    rows = [_white(bench, noise[:, :size]) for noise in trainers]  # as many steps each as it was watched for
    if rows and probe.mechanism == "correlated" and mixing(probe, 1) is None:
        whole = np.stack([noise.reshape(-1) for noise in rows])
        r, _, where, pairs = stats.most_correlated(whole, symmetric=True)
        return abs(r) < 1 - 1e-9, f"correlation {r:.3g} of trainers {where[0] + 1} and {where[1] + 1}, {pairs} pairs"
    common = min(len(noise) for noise in rows)
    tests = [stats.most_correlated(np.stack([noise[:common].reshape(-1) for noise in rows]), symmetric=symmetric)]
    names = [f"trainers {tests[0][2][0] + 1} and {tests[0][2][1] + 1}"]
    if size >= stats.FEWEST:
        steps = np.concatenate(rows)
        tests.append(stats.most_correlated(steps, symmetric=symmetric))
        named = [f"step {step + 2} of trainer {k + 1}" for k, noise in enumerate(rows) for step in range(len(noise))]
        names.append(" and ".join(named[place] for place in tests[1][2]))
    again, equal = repeated(probe, np.concatenate(rows)) if probe.mechanism != "correlated" else (1.0, 0)
    if again * (len(tests) + 1) <= stats.ALPHA / TESTS:
        return (
            False,
            f"the same noise again: {equal} numbers are those of another place, step or trainer (p = {again:.2g})",
        )
    r, p, _, pairs = min(tests, key=lambda test: test[1])
    what = names[min(range(len(tests)), key=lambda place: tests[place][1])]
    fine = p * (len(tests) + 1) > stats.ALPHA / TESTS
    said = f"largest correlation {r:.3g} ({what}; p = {min(1.0, p * len(tests)):.2g} over {pairs} pairs)"
    return fine, said if fine else f"the same noise again: {said}"


def _white(bench: Bench, noise: Vector) -> Vector:
    if bench.probe.mechanism != "correlated" or (matrix := mixing(bench.probe, len(noise) + 1)) is None:
        return noise
    # The first step had a batch: its noise is not known, so only what is new in later steps is taken.
    return np.asarray(noise / np.abs(np.diag(matrix))[1:, None])


def _as_claimed(bench: Bench, draws: Draws, batch: Vector, empty: Vector) -> list[tuple[bool, str]]:
    """Level, law, parameters; and the batch's release minus the clipped sum that frozen noise showed."""
    probe, laplace = bench.probe, bench.probe.mechanism == "laplace"
    if probe.mechanism == "correlated":
        return []
    alpha = stats.ALPHA / TESTS
    values = empty[~np.isnan(empty)] / probe.std
    by_step = {
        f"step {step + 2}": squares(empty[:, step].reshape(-1) / probe.std, laplace) for step in range(empty.shape[1])
    }
    fine, said = level_of({"all steps": squares(values, laplace)} | by_step, laplace=laplace, alpha=alpha)
    results = [(fine, f"{said})")]
    p, which, _ = law_of(probe, values)
    results.append((p > alpha, f"the noise has another law (p = {p:.2g}: {which})"))
    blocks = _blocks(bench.probe.observe([]), np.nan_to_num(empty))
    if probe.mechanism != "zeroth-order":
        pairs: list[Pair] = []
        for place, one in enumerate(sorted(blocks)):
            pairs += neighbours(one, blocks[one], probe.shapes.get(one, ()))
            for two in sorted(blocks)[:place]:
                m = min(blocks[one].shape[1], blocks[two].shape[1])
                pairs.append((f"{two} and {one}", blocks[one][:, :m].reshape(-1), blocks[two][:, :m].reshape(-1)))
        p, r, what, _ = worst_pair(probe, pairs) if pairs else (1.0, 0.0, "", 0)
        results.append((p > alpha, f"parameters share noise: correlation {r:.3g} of {what} (p = {p:.2g})"))
    if probe.deterministic:
        frozen = probe.observe(list(bench.picks.group)).vector - probe.observe([]).vector
        rest = (batch - frozen) / probe.std
        fine, said = level_of({"a batch": squares(rest.reshape(-1), laplace)}, laplace=laplace, alpha=alpha)
        results.append((fine, f"a batch releases another sum than with a seed: {said})"))
    return [(ok, text) for ok, text in results if not ok] + [results[0]]


def _blocks(seen: Observation, empty: Vector) -> dict[str, Vector]:
    """(TRAINERS * steps, d) of each block."""
    rows, start, out = empty.reshape(-1, empty.shape[2]), 0, {}
    for name, value in sorted(seen.released.items()):
        size = value.size if value is not None else math.prod(seen.moved[name].shape) if name in seen.moved else 1
        if value is not None:
            out[name] = rows[:, start : start + min(size, MOST_COMPARED)]
        start += size
    return out


def _start(bench: Bench) -> "subprocess.Popen[str]":
    """A process of its own that builds the factory anew and takes the same steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from attacks.contract.process import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdin is not None
    probe = bench.probe
    task = {
        "target": probe.target, "folder": str(Path.cwd()), "path": sys.path, "seed": probe.seed, "limit": probe.limit,
        "batch": list(bench.picks.group), "steps": STEPS - 1, "most": MOST_COMPARED,
    }  # fmt: skip
    process.stdin.write(json.dumps(task))
    process.stdin.close()
    process.stdin = None
    return process


def _finish(process: "subprocess.Popen[str]", bench: Bench) -> Vector | str:
    """(STEPS - 1, d) of its empty steps, or why there are none."""
    try:
        out, _ = process.communicate(timeout=bench.probe.limit + GRACE)
    except subprocess.TimeoutExpired:
        return "it did not come back with a few steps"
    answer = json.loads(out) if process.returncode == 0 and out else {"problem": "it ended without an answer"}
    if "problem" in answer:
        return str(answer["problem"])
    return np.array(answer["noise"], dtype=np.float64)
