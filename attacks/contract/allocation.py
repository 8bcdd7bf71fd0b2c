"""The sampler of a claim of random allocation, by its own law.

Every unit is in exactly k of the t steps of every epoch, its k steps are a uniform subset drawn anew each epoch, and no
two units share anything. So over E whole epochs of n units

- a unit is k times in each epoch, always;
- at each place of the epoch a unit is included Binomial(E, k / t) times, all units together Binomial(nE, k / t);
- batch sizes at one place, over the epochs, are independent Binomial(n, k / t): they vary. A shuffled list cut into
  batches has the first two properties and batches of one size; allocation's eps holds for it as little as Poisson's;
- two units have the same subset in Binomial(E, 1 / binom(t, k)) epochs, and what a unit draws in one epoch says nothing
  about the next: a pair of places holds it in both in Binomial(n E / 2, (k / t)^2) of E / 2 separate pairs of epochs.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from attacks.contract import statistics as stats
from attacks.contract.draws import Drawn
from dpaudit.accounting import DpSgd

LEAST_EPOCHS = 4
MOST_PLACES = 100  # of an epoch whose sizes, and whose pairs, are looked at one by one

Epochs = npt.NDArray[np.bool_]  # (E, t, n)
Found = tuple[float, str]  # p-value and what was seen


def whole_epochs(event: DpSgd, drawn: Drawn) -> Epochs:
    """(E, t, n) the whole epochs of (draws, n)."""
    steps = event.epoch_steps
    count = len(drawn) // steps
    return drawn[: count * steps].reshape(count, steps, drawn.shape[1])


def uniform(event: DpSgd, held: Epochs) -> Found:
    """Whether every place of the epoch holds every unit equally often."""
    epochs, steps, units = held.shape
    rate = event.sample_rate
    each = held.sum(axis=0)  # (t, n)
    p_each = np.array([stats.count_p(value, epochs, rate) for value in range(epochs + 1)])[each]
    together = [stats.count_p(int(value), epochs * units, rate) for value in each.sum(axis=1)]
    step, unit = np.unravel_index(int(p_each.argmin()), p_each.shape)
    p = min(1.0, 2 * min(float(p_each.min()) * steps * units, min(together) * steps))
    seen = f"most unusual: unit {unit} in {each[step, unit]} of {epochs} steps {step + 1} of an epoch"
    return p, f"{seen} ({epochs} epochs of {steps} steps, p = {p:.2g})"


def sizes(event: DpSgd, held: Epochs) -> Found:
    """Whether batches vary as those of independent units do."""
    _, steps, units = held.shape
    found = held.sum(axis=2).astype(np.float64)  # (E, t)
    places = np.unique(np.linspace(0, steps - 1, min(steps, MOST_PLACES)).astype(int))
    least = 1.0
    for place in places:
        size = found[:, place]
        least = min(least, stats.spread_p(size, units, event.sample_rate))
        least = min(least, stats.extremes_p(size, units, event.sample_rate))
    p = min(1.0, 2 * places.size * least)
    seen = f"variance {found.var():.3g} over {found.size} draws, sizes {found.min():.0f} to {found.max():.0f}"
    return p, f"{seen} (p <= {p:.2g})"


def counted(event: DpSgd, held: Epochs) -> Found:
    """Whether each unit is in k steps of every epoch: p is 1 or 0."""
    times = held.sum(axis=1)
    wrong = int((times != event.draws).sum())
    seen = f"{wrong} of {times.size} times a unit was in other than {event.draws} of {event.epoch_steps} steps"
    return float(wrong == 0), seen


def independent(event: DpSgd, held: Epochs) -> Found:
    """Whether two units, or two epochs, share their draws."""
    pairs, same = _shared(event, held)
    again = _carried(event, held)
    p = min(1.0, 2 * min(pairs, again))
    return (
        p,
        f"two units alike in at most {same} of {len(held)} epochs (p = {pairs:.2g}), epochs alike: p = {again:.2g}",
    )


def _shared(event: DpSgd, held: Epochs) -> tuple[float, int]:
    """(p, epochs) of the two units that draw the same subset most often; one-sided."""
    epochs, _, units = held.shape
    if units < 2:
        return 1.0, 0
    alike = np.zeros((units, units), dtype=np.int64)
    for epoch in held:
        code = np.unique(epoch.T, axis=0, return_inverse=True)[1].ravel()
        alike += code[:, None] == code
    most = int(np.triu(alike, 1).max())
    tail = float(binom.sf(most - 1, epochs, 1 / math.comb(event.epoch_steps, event.draws)))
    return min(1.0, tail * units * (units - 1) / 2), most


def _carried(event: DpSgd, held: Epochs) -> float:
    """p of the pair of places, in one epoch and in the next, that hold the same unit most unusually often."""
    pairs, units = len(held) // 2, held.shape[2]
    places = np.unique(np.linspace(0, held.shape[1] - 1, min(held.shape[1], MOST_PLACES)).astype(int))
    one, two = (held[start : 2 * pairs : 2][:, places].astype(np.float32) for start in (0, 1))
    both = np.einsum("epn,eqn->pq", one, two, optimize=True).round().astype(np.int64)
    values, total = np.unique(both), pairs * units
    return float(min(1.0, min(stats.count_p(int(value), total, event.sample_rate**2) for value in values) * both.size))
