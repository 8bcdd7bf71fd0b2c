"""Equal releases, equal moves: the update rule judged without knowing it, where gradients can be injected.

Two trainings have different noise. What is injected into the second makes up for the difference, so both release the
same in every step, while the first one's clipped sums are zero and the second one's are not. Whatever the optimiser is,
its moves must then be the same. Twice more the second training has batches of records as well, where it can be copied:
the injected gradients then make up for their sums too, and what follows their number or losses shows. And trainings
without a noise seed are repeated by one with a seed and no records: production has the update rule of tests.
"""

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from attacks.contract.bench import Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Observation, Vector
from attacks.contract.rules import LATE, Miss
from attacks.contract.subject import Subject
from attacks.contract.training import STEPS

ENOUGH = 0.3  # of CPU, after which no more steps are compared than must be
PART = 0.9  # of C: an injected gradient that is not clipped
MOST_PARTS, MOST_INJECTED = 400, 4_000_000  # gradients, and numbers of them, in one step
SECONDS = 4.0  # of CPU for as many steps as must be compared: a training whose steps take longer is not made
SAME = 1e-3  # relative gap of releases up to which they are equal
EARLIER = 10.0  # how far a gap of releases may be magnified in the moves


def misses(bench: Bench, *, covered: bool) -> Iterator[Miss]:
    """(gap in units of what is allowed, where, last step compared) of each block and pair of trainings.

    covered: whether all blocks were judged by rules that were learned; slow trainers are then left alone.

    A step that rounds near a jump of its rule (a sign at zero, a tie between blocks) may differ for no reason, so the
    gap of a block is the smaller one of two trainings that have nothing but the rule in common.
    """
    probe = bench.probe
    if "inject" not in probe.offered or bench.empty_problem is not None or probe.std == 0:
        return
    if covered and not bench.training.quick_batches:
        return
    training = bench.training
    noise = training.noise[:STEPS]
    none: list[list[int]] = [[] for _ in range(STEPS)]
    kinds = [("injected gradients", [(noise, none), (noise, none)])]
    if probe.copyable:
        batches = [(noise, training.batches), (noise, training.others)]
        kinds.append(("batches whose sums injected gradients take back", batches))
    if len(bench.live) == 2 and not covered:  # rules that were learned were put to production already
        kinds.append(("without a noise seed", [(course, none) for course in bench.live]))
    for number, (what, kind) in enumerate(kinds):
        try:
            both = [_gaps(bench, 2 * number + k, *pair) for k, pair in enumerate(kind, 1)]
        except MethodFailure:  # takes no injected gradient where there is no unit
            continue
        steps = min(len(gaps) for gaps in both)
        if steps < LATE:  # other pairs take no less time
            return
        for name in sorted(probe.shapes) if steps else ():
            worst = [max((gaps[step].get(name, 0.0), step + 1) for step in range(steps)) for gaps in both]
            gap, step = min(worst)
            yield Miss(gap, f"{name}, step {step} after equal releases, {what}", steps)


def _gaps(
    bench: Bench, noise: int, meant: Sequence[Observation], batches: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """Per step and block: the gap of the moves to those of the training `meant`, in tolerances; as many steps as
    released the same in good time. Made on `batches`, under the noise seed number `noise`."""
    probe = bench.probe
    subject = probe.build(bench.training.records, noise)
    own = None if any(batches) else probe.course([[]] * len(meant), noise=noise)
    found: list[dict[str, float]] = []
    apart, began = 0.0, time.process_time()
    for step, (wanted, batch) in enumerate(zip(meant, batches, strict=True)):
        if own is not None and (own[step].noised == wanted.noised or not probe.copyable):
            before = own[step]
        else:  # also where the noised blocks follow earlier releases, which are not those of `own`
            before = probe.watch(subject.twin(), batch)
        if wanted.noised != before.noised or not _inject(bench, subject, wanted, before):
            break
        values = subject.parameters()
        seen = probe.watch(subject, batch)
        if seen.noised != wanted.noised:
            break
        size = float(np.linalg.norm(wanted.vector))
        apart = max(apart, float(np.linalg.norm(seen.vector - wanted.vector)) / max(size, 1e-300))
        if not apart <= SAME:
            break
        found.append({name: _gap(bench, name, wanted, seen, values[name], apart) for name in probe.shapes})
        spent = time.process_time() - began
        if spent * LATE / (step + 1) > SECONDS or (step + 1 >= LATE and spent > ENOUGH):
            break
    return found


def _gap(bench: Bench, name: str, wanted: Observation, seen: Observation, value: Vector, apart: float) -> float:
    """Of one block's moves, in what rounding of releases, moves and parameters may amount to."""
    meant, moved = wanted.moved[name], seen.moved[name]
    size = float(np.linalg.norm(meant))
    precise = bench.probe.agreement * size + EARLIER * apart * size
    rounding = 4e-7 * float(np.linalg.norm(value)) + 1e-300
    return float(np.linalg.norm(moved - meant)) / (precise + rounding)


def _inject(bench: Bench, subject: Subject, wanted: Observation, before: Observation) -> bool:
    """Hand over what is lacking, in parts that are not clipped; False where these would be too many."""
    probe = bench.probe
    lacking = {
        name: value - before.released[name]  # type: ignore[operator]
        for name, value in wanted.released.items()
        if value is not None
    }
    whole = np.concatenate([lacking[name] for name in sorted(lacking)])
    size = probe.size(whole)
    if not math.isfinite(size) or set(lacking) - set(probe.shapes):
        return False
    parts = max(1, math.ceil(size / (PART * probe.claim.max_grad_norm)))
    if parts > MOST_PARTS or parts * whole.size > MOST_INJECTED:
        return False
    for _ in range(parts):
        part = {
            name: torch.from_numpy(lacking[name] / parts if name in lacking else np.zeros(math.prod(shape)))
            .reshape(shape)
            .float()
            for name, shape in probe.shapes.items()
        }
        subject.ask("inject", part)
    return True
