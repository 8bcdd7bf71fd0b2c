"""Isolation: does changing one record move anything of another record before clipping?

DP-SGD's sensitivity C rests on each clipped gradient being a function of one unit. Token pruning and fusion keep that
only while every stage (which tokens are kept, what they are fused around, the fused tokens, their normalisation,
padding, loss) works example by example. The test is exact replay: one record is replaced, all randomness is kept, and
everything that can be watched of every other record must be equal bit for bit. A vector-Jacobian product would not do:
selection is discrete, and its zero derivative is no evidence.

Where shapes change (other paddings, batch sizes or orders) kernels may round differently. There equality is up to a
tolerance that is calibrated without any other record: what moves when a record stands in a batch of copies of itself,
and when its tokens are perturbed by one unit of the number format's precision; ten times the larger of the two, at
least 1e-5 and never more than 10,000 such units (1.2e-3 in float32). A leak is far above it (published ones move
gradients by 8 % to 114 %). Records whose selection flips under relative perturbations of
1e-5 of their own tokens sit at a tie, which rounding may break either way; they are left out of those comparisons and
counted in the text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attacks.fusion.path import DISCRETE, OBSERVABLES, Stage, TokenPath, Trace, tied, watch
from attacks.fusion.standins import adversarial_pictures, climb, fitted, longer, replacements, with_pixels
from dpaudit.documents import Check, Leak
from dpaudit.errors import UsageError
from trainers.records import Pixels, Unit

SMALLEST_TOLERANCE = 1e-5
REPLAY = "isolation under exact replay"


@dataclass(frozen=True)
class Movement:
    """The largest movement of one observable of a record that was not changed; indices count the units of the batch."""

    observable: str
    changed: int
    moved: int
    size: float
    how: str
    reshaped: bool = False

    @property
    def stage(self) -> Stage:
        """The stage to blame. Equal tokens whose logits move when only shapes changed: padding."""
        if self.reshaped and self.observable == "logits":
            return "padding"
        return OBSERVABLES[self.observable]


@dataclass(frozen=True)
class Isolation:
    """All checks on one batch, the first leak, and the largest movement that the search for a partner found."""

    checks: tuple[Check, ...]
    leak: Leak | None
    worst: Movement | None = None

    @property
    def passed(self) -> bool:
        return self.leak is None


def movements(
    before: Trace, after: Trace, changed: int, how: str, *, left_out: Iterable[int] = (), reshaped: bool = False
) -> list[Movement]:
    """Movement of every observable of every record but `changed`, relative to its own size; the largest of each."""
    found, skipped = [], {changed, *left_out}
    for name in OBSERVABLES:
        floor = 1e-3 * float(np.median([float(value.double().norm()) for value in before[name]]))
        worst = Movement(name, changed, changed, 0.0, how, reshaped)
        for index, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            if index in skipped:
                continue
            size = _differing(old, new) if name in DISCRETE else _relative(old, new, floor)
            if size > worst.size:
                worst = Movement(name, changed, index, size, how, reshaped)
        found.append(worst)
    return found


def _relative(old: Tensor, new: Tensor, floor: float) -> float:
    """|new - old| / |old|; `floor` stands in for the size of a value next to zero."""
    if old.shape != new.shape:
        return float("inf")
    if torch.equal(old, new):
        return 0.0
    gap = float((old.double() - new.double()).norm())
    return gap / (max(float(old.double().norm()), floor) or 1.0) if np.isfinite(gap) else float("inf")


def _differing(old: Tensor, new: Tensor) -> float:
    """Share of entries that differ, the missing ones of a shorter list included."""
    if old.shape == new.shape:
        return float((old != new).double().mean()) if old.numel() else 0.0
    ours, theirs = set(old.flatten().tolist()), set(new.flatten().tolist())
    return max(len(ours ^ theirs) / max(len(ours | theirs), 1), 1e-9)


Tolerance = dict[str, float]  # observable -> what rounding may move


def first_leak(found: Sequence[Movement], allowed: Tolerance) -> Movement | None:
    """The largest movement of the earliest observable that moves by more than `allowed`; None if nothing does."""
    for name in OBSERVABLES:
        leaking = [item for item in found if item.observable == name and item.size > allowed[name]]
        if leaking:
            return max(leaking, key=lambda item: item.size)
    return None


def exactly() -> Tolerance:
    """No movement at all."""
    return dict.fromkeys(OBSERVABLES, 0.0)


def calibrate(path: TokenPath, units: Sequence[Unit]) -> Tolerance:
    """The tolerances for comparisons across shapes (see the module's text); 0 for selections and clusters."""
    precision = float(torch.finfo(next(iter(path.model.hf.parameters())).dtype).eps)
    worst = exactly()
    for unit in units:
        alone = watch(path, [unit], noisy=False)
        copies = watch(path, [unit] * len(units), noisy=False)
        nudged = watch(path, [unit], noisy=False, nudge=precision)
        for other in (copies, nudged):
            for item in movements(alone, {name: [values[0]] for name, values in other.items()}, -1, "copies"):
                worst[item.observable] = max(worst[item.observable], item.size)
    return {
        name: 0.0 if name in DISCRETE else min(max(10 * size, SMALLEST_TOLERANCE), max(1e4 * precision, 1e-3))
        for name, size in worst.items()
    }


def exact_replay(
    path: TokenPath, units: Sequence[Unit], adversarial: dict[str, Pixels], *, rng: np.random.Generator
) -> tuple[list[Movement], float]:
    """Replace each unit in turn by every stand-in: all movements of the others, and what a bare repeat moves.

    The second number is 0 wherever kernels are deterministic, and then no movement at all is allowed.
    """
    before = watch(path, units)
    repeat = max(item.size for item in movements(before, watch(path, units), -1, "repeat"))
    found: list[Movement] = []
    for index, unit in enumerate(units):
        other = units[(index + 1) % len(units)]
        for how, stand_in in replacements(unit, other, adversarial, rng):
            after = watch(path, [*units[:index], stand_in, *units[index + 1 :]])
            found.extend(movements(before, after, index, how))
    return found, repeat


def search_partner(
    path: TokenPath,
    units: Sequence[Unit],
    start: Movement | None,
    *,
    rng: np.random.Generator,
    rounds: int = 4,
    width: int = 4,
) -> list[Movement]:
    """Movements over a climb in pixels for the partner that moves the others most, from the best stand-in so far."""
    index = start.changed if start is not None and start.changed >= 0 else int(rng.integers(len(units)))
    before = watch(path, units)
    found: list[Movement] = []

    def moving(pictures: list[Pixels]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        sizes = []
        for picture in pictures:
            stand_in = with_pixels(units[index], partial(fitted, picture))
            after = watch(path, [*units[:index], stand_in, *units[index + 1 :]])
            made = movements(before, after, index, "a picture found by search")
            found.extend(made)
            sizes.append(made[-1].size)  # of the gradient, which is what the sum is made of
        return np.array(sizes)

    climb(units[index].pictures[0].pixels, moving, rng=rng, rounds=rounds, width=width)
    return found


def reshaped(
    path: TokenPath, units: Sequence[Unit], left_out: Iterable[int], *, rng: np.random.Generator
) -> dict[str, list[Movement]]:
    """Movements when only padding, order or batch size change; equal up to rounding when examples are isolated."""
    before, skipped = watch(path, units, noisy=False), tuple(left_out)

    def moved(after: Trace, changed: int, how: str) -> list[Movement]:
        return movements(before, after, changed, how, left_out=skipped, reshaped=True)

    padding = []
    for index in (len(units) - 1, 0):
        for how, stand_in in longer(units[index]):
            after = watch(path, [*units[:index], stand_in, *units[index + 1 :]], noisy=False)
            padding += moved(after, index, how)
    order = rng.permutation(len(units))
    place = np.argsort(order)
    permuted = watch(path, [units[index] for index in order], noisy=False)
    sizes = []
    for size in sorted({1, 2, max(1, len(units) - 1)}):
        parts = [watch(path, units[at : at + size], noisy=False) for at in range(0, len(units), size)]
        joined = {name: [value for part in parts for value in part[name]] for name in OBSERVABLES}
        sizes += moved(joined, -1, f"in batches of {size} instead of {len(units)}")
    return {
        "padding": padding,
        "permutation": moved(
            {name: [values[index] for index in place] for name, values in permuted.items()}, -1, "another order"
        ),
        "batch size": sizes,
    }


WHY = {
    REPLAY: "One record is replaced (another picture, one pixel, one patch, white, black, checkerboard, noise, large "
    "tokens, peaked and flat attention) and everything random is kept: nothing of any other record may move. A failure "
    "is a statistic shared over the batch.",
    "isolation under a searched partner": "A search in pixels for the one record that moves the others most.",
    "isolation under padding": "More text in one record must not change another's result (padding that is attended "
    "to, positions that follow the longest record, token-mean losses).",
    "isolation under permutation": "The order of a batch must not matter (tie-breaking and capacity limits show here).",
    "isolation under batch size": "A record alone must give what it gives in a batch (batch statistics show here).",
}


def _check(name: str, found: Sequence[Movement], allowed: Tolerance, note: str = "") -> tuple[Check, Movement | None]:
    leak, most = first_leak(found, allowed), max(allowed.values())
    if leak is None:
        largest = max((item.size for item in found), default=0.0)
        measured = f"largest relative movement of another record {largest:.2g} over {len(found)} comparisons{note}"
    else:
        who = "all records" if leak.changed < 0 else f"record {leak.changed}"
        measured = (
            f"{leak.stage}: {leak.observable} of record {leak.moved} moved by {leak.size:.2g} of its size when "
            f"{who}: {leak.how}{note}"
        )
    return (
        Check(
            name=name,
            status="pass" if leak is None else "fail",
            measured=measured,
            allowed="no movement at all" if most == 0 else f"at most {most:.2g} (rounding, calibrated)",
            explanation=WHY[name],
        ),
        leak,
    )


def audit_isolation(path: TokenPath, units: Sequence[Unit], *, seed: int = 0) -> Isolation:
    """All isolation checks on a batch of units. Raises UsageError for fewer than two."""
    if len(units) < 2:
        raise UsageError(f"isolation: got {len(units)} unit; accepted: at least 2 units in the data set")
    rng = np.random.default_rng(seed)
    adversarial = adversarial_pictures(path.model, units[0].pictures[0].pixels, rng=rng)
    replayed, repeat = exact_replay(path, units, adversarial, rng=rng)
    tolerance = calibrate(path, units)
    exact = exactly()
    if repeat > 0:  # kernels that don't repeat themselves
        exact = {name: 0.0 if name in DISCRETE else max(10 * repeat, SMALLEST_TOLERANCE) for name in exact}
    start = first_leak(replayed, exact)
    searched = search_partner(path, units, start, rng=rng)
    ties = [index for index, unit in enumerate(units) if tied(path, unit)]
    note = f"; {len(ties)} of {len(units)} records at a tie left out" if ties else ""
    ways = f"; gradients by {' and by '.join(way.kind for way in path.gradients)}"
    results = [
        _check(REPLAY, replayed, exact, ways),
        _check("isolation under a searched partner", searched, exact),
    ]
    for name, found in reshaped(path, units, ties, rng=rng).items():
        results.append(_check(f"isolation under {name}", found, tolerance, note))
    leaks = [leak for _, leak in results if leak is not None]
    return Isolation(
        tuple(check for check, _ in results),
        _described(leaks[0], [*replayed, *searched]) if leaks else None,
        max(searched, key=lambda item: item.size) if searched else None,
    )


def _described(leak: Movement, everything: Sequence[Movement]) -> Leak:
    """The leak for the document, with the most that any partner moved another record's gradient by."""
    most = max((item.size for item in everything if item.observable == "gradient"), default=0.0)
    finite = leak.size if np.isfinite(leak.size) else float("inf")
    return Leak(
        stage=leak.stage,
        observable=leak.observable,
        changed=None if leak.changed < 0 else leak.changed,
        moved=leak.moved,
        size=finite,
        largest_gradient_change=max(most, 0.0),
        how=leak.how,
    )
