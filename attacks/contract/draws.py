"""Answers of a trainer that several modules ask for: what its sampler draws, fresh and after steps; its own eps."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attacks.contract.guard import MethodFailure, TookTooLong
from attacks.contract.probe import Probe, Records
from attacks.contract.subject import Subject
from dpaudit.claims import StepClaim

EPOCHS, MOST_DRAWS, LEAST_DRAWS, SECONDS = 40, 20_000, 400, 8.0
CHEAP_DRAWS, CHEAP_SECONDS = 5_000, 1.5  # as many where they take no longer: a cap at B + 2.5 sqrt(B) shows in the size
PLAYED = 24  # steps of a training on the sampler's own batches, whose later draws are judged like the first ones

Drawn = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Draws:
    """`drawn` (draws, n): who was in. `twice`: batches with a repeated index. `played`: draws that were stepped on."""

    drawn: Drawn
    twice: int
    played: int = 0


def draw(
    probe: Probe,
    *,
    path: Sequence[Sequence[int]] = (),
    playing: int = 0,
    noise: int | None = 0,
    empties: bool = True,
    records: Records | None = None,
    cheap: bool = True,
) -> Draws:
    """Draws of one trainer after the steps `path`; the first `playing` of them are also stepped on, as in a training.

    noise: which noise seed it has; None: none, as in production. empties: whether an empty batch is a step. records:
    other ones than its own. cheap: whether more are drawn where they take no time.

    As many draws as EPOCHS epochs take, fewer where they are slow and more where they are cheap. A trainer that refuses
    a step after PLAYED of them and all that it claims has played to its end.
    """
    least = max(PLAYED, probe.claim.steps or 0)
    window = window_of(probe.claim)
    subject = probe.grown(tuple(tuple(part) for part in path), records, noise=noise)
    count, began = len((records or probe.own).items), time.monotonic()
    rows: list[Drawn] = []
    twice = 0
    while _another(len(rows) - playing, window, time.monotonic() - began, cheap=cheap):
        indices = ask(subject, count)
        row = np.zeros(count, dtype=bool)
        row[indices] = True
        twice += len(set(indices)) < len(indices)
        rows.append(row)
        if len(rows) <= playing and (indices or empties):
            try:
                subject.ask("step", sorted(set(indices)))
            except MethodFailure:
                if len(path) + len(rows) <= least:
                    raise
                playing = len(rows) - 1
    return Draws(np.stack(rows), twice, playing)


def _another(done: int, window: int, spent: float, *, cheap: bool) -> bool:
    """Whether one more draw is worth its time after `done` of them in `spent` seconds."""
    if done >= min(MOST_DRAWS, max(LEAST_DRAWS, EPOCHS * window)):
        return cheap and done < CHEAP_DRAWS and spent < CHEAP_SECONDS
    return done < 10 * window or spent < SECONDS


def ask(subject: Subject, count: int) -> list[int]:
    """One draw, validated: indices from 0 to `count` - 1."""
    value = subject.ask("sample")
    try:
        indices = [int(index) for index in value]
    except (TypeError, ValueError):
        raise MethodFailure("sample()", f"returned {type(value).__name__}; accepted: a list of indices") from None
    if any(not 0 <= index < count for index in indices):
        raise MethodFailure("sample()", f"returned an index outside 0 to {count - 1}")
    return indices


def window_of(claim: StepClaim) -> int:
    """Draws in an epoch."""
    return claim.epoch_steps or max(1, round(1 / claim.sample_rate))


def reported(subject: Subject, delta: float) -> float | None:
    """The eps that the trainer reports, validated; None where it takes longer than the time limit.

    An accountant may be slow where all else is fast. The probe remembers it, and what needs an eps is not judged.
    """
    try:
        value = subject.ask("epsilon", delta)
    except TookTooLong as failure:
        subject.probe.unanswered = subject.probe.unanswered or str(failure)
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or math.isnan(value) or value < 0:
        raise MethodFailure(f"epsilon({delta:g})", f"returned {value!r}; accepted: a number >= 0 (inf allowed)")
    return float(value)
