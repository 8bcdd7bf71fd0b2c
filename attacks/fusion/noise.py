"""Is the fusion noise a stream of its own? Independent over pictures and steps, blind to content, keyed, and apart
from the gradient noise.

What hangs on it:

- shared over pictures or steps, seeded by content, or not keyed: differences of two released tokens cancel it, or
  anyone can replay it. That voids a *release*. The training guarantee does not rest on this noise: given any noise
  vector, each gradient still is a function of one record, and clipping bounds it.
- the same values as the *gradient* noise: then the noise that hides the sum is no longer independent of the sum. That
  voids the training guarantee.

What is tested is the difference between a noisy and a noiseless use of the trainer's own path, not its source.

Correlations r of n Gaussian values are judged by Student's t of r sqrt((n-2)/(1-r^2)), exact under independence, with
n-2 degrees of freedom; the level 1e-9 is shared by all pairs (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from attacks.fusion.path import TokenPath
from dpaudit.documents import Check
from dpaudit.randomness import Key
from trainers.records import Unit

Floats = npt.NDArray[np.float64]

LEVEL = 1e-9
STEPS = (1, 2, 3)

PICTURES = "fusion noise independent over pictures"
OVER_STEPS = "fusion noise independent over steps"
CONTENT = "fusion noise not seeded by content"
KEYED = "fusion noise from the secret key"
APART = "fusion noise apart from the gradient noise"
RELEASE_CHECKS = (PICTURES, OVER_STEPS, CONTENT, KEYED)

WHY = {
    PICTURES: "Noise shared by two pictures cancels in their difference. It matters to a release of tokens only: given "
    "the noise, each gradient still depends on one record.",
    OVER_STEPS: "Noise used again for another step cancels too, or averages out if it is only partly new. It matters "
    "to a release of tokens only.",
    CONTENT: "Equal pictures under two names must get different noise; otherwise anyone who guesses the picture can "
    "replay it. It matters to a release of tokens only.",
    KEYED: "Another key must give other noise; otherwise anyone can compute it and take it away. It matters to a "
    "release of tokens only.",
    APART: "Fusion noise that repeats the gradient noise makes the noise on the sum depend on the sum: the training "
    "guarantee is lost, not only that of a release.",
}


@dataclass(frozen=True)
class WatchedKey(Key):
    """A key that notes every address (use, purpose, step, name, rank) that numbers were drawn from."""

    used: set[tuple[str, str, int, str, int]] = field(default_factory=set, compare=False, repr=False)

    def _subkey(self, use: str, purpose: str, step: int, name: str, rank: int) -> bytes:
        self.used.add((use, purpose, step, name, rank))
        return super()._subkey(use, purpose, step, name, rank)

    @classmethod
    def like(cls, key: Key) -> "WatchedKey":
        """The same numbers as `key`."""
        return cls(key.material, key.seeded)


def limit(values: int, pairs: int) -> float:
    """The |r| that none of `pairs` correlations of `values` independent Gaussians exceeds, but with probability LEVEL.

    1 (nothing can exceed it) below three values.
    """
    if values < 3:
        return 1.0
    t = float(stats.t.isf(LEVEL / (2 * max(pairs, 1)), values - 2))
    return t / math.sqrt(values - 2 + t * t)


def residuals(path: TokenPath, units: Sequence[Unit], *, step: int, key: Key | None = None) -> Floats:
    """(pictures, values) of the noise really added at `step`, in units of its standard deviation, one row a picture."""
    inputs = path.encode(units)
    first = [inputs.ids.index(name) for name in dict.fromkeys(inputs.ids)]  # one row a picture, however many it has
    everybody = range(len(units))
    with torch.no_grad():
        noisy = inputs.select(everybody, key=key or path.key, step=step, fusion_std=path.fusion_std).tokens
        plain = inputs.select(everybody).tokens
    gap = (noisy.double() - plain.double())[first].flatten(1).cpu().numpy() / path.fusion_std
    touched = (gap != 0).any(axis=0)
    return np.asarray(gap[:, touched], dtype=np.float64)


def correlations(rows: Floats) -> Floats:
    """(pairs,) |correlation| of every two rows."""
    if len(rows) < 2:
        return np.zeros(0)
    return np.abs(_cross(rows, rows)[np.triu_indices(len(rows), 1)])


def _judged(name: str, worst: float, pairs: int, values: int) -> Check:
    most = limit(values, pairs)
    return Check(
        name=name,
        status="pass" if worst <= most else "fail",
        measured=f"largest correlation {worst:.3f} over {pairs} pairs of {values} values",
        allowed=f"at most {most:.3f} (false alarm {LEVEL:g})",
        explanation=WHY[name],
    )


def over_pictures(draws: Sequence[Floats]) -> Check:
    """Within each step, every two pictures. draws: one (pictures, values) array a step."""
    found = np.concatenate([correlations(rows) for rows in draws])
    return _judged(PICTURES, float(found.max(initial=0.0)), len(found), draws[0].shape[1])


def over_steps(draws: Sequence[Floats]) -> Check:
    """Every picture with every picture of another step."""
    found = [np.abs(_cross(one, two)).ravel() for place, one in enumerate(draws) for two in draws[place + 1 :]]
    joined = np.concatenate(found) if found else np.zeros(0)
    return _judged(OVER_STEPS, float(joined.max(initial=0.0)), len(joined), draws[0].shape[1])


def _cross(one: Floats, two: Floats) -> Floats:
    """(pictures, pictures) correlations of the rows of two arrays."""

    def standard(rows: Floats) -> Floats:
        centred = rows - rows.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.asarray(centred / np.where(norms > 0, norms, 1.0))

    return np.asarray(standard(one) @ standard(two).T)


def renamed(units: Sequence[Unit]) -> list[Unit]:
    """The same units and pictures under other names."""
    return [
        replace(
            unit,
            id=f"{unit.id}/double",
            pictures=tuple(item.derived(id=f"{item.id}/double") for item in unit.pictures),
        )
        for unit in units
    ]


def another(key: Key) -> Key:
    """A key that has nothing to do with `key`."""
    return Key.from_seed(int.from_bytes(key.material[:4], "big") + 1)


def matched(name: str, one: Floats, two: Floats) -> Check:
    """Every row of one set with every row of another that should have nothing in common with it."""
    found = np.abs(_cross(one, two)).ravel()
    return _judged(name, float(found.max(initial=0.0)), len(found), one.shape[1])


def not_by_content(path: TokenPath, units: Sequence[Unit]) -> Check:
    """The same pictures under other names, in one batch with the first ones."""
    rows = residuals(path, [*units, *renamed(units)], step=STEPS[0])
    half = len(rows) // 2
    return matched(CONTENT, rows[:half], rows[half:])


def keyed(path: TokenPath, units: Sequence[Unit]) -> Check:
    """The same batch and step under another key."""
    other = residuals(path, units, step=STEPS[0], key=another(path.key))
    return matched(KEYED, residuals(path, units, step=STEPS[0]), other)


def apart(path: TokenPath, units: Sequence[Unit], draws: Sequence[Floats]) -> Check:
    """Each picture's noise against the gradient noise of the same step, and the addresses both were drawn from.

    Equal values show up at some offset as a correlation (searched by FFT). Equal addresses of the key's streams are a
    collision even where other shapes make other values of them.
    """
    worst, tried, shared = 0.0, 0, set()
    for step, rows in zip(STEPS, draws, strict=False):
        of_tokens, of_gradient = WatchedKey.like(path.key), WatchedKey.like(path.key)
        path.rows(units, step=step, key=of_tokens)
        blocks = path.noise(of_gradient, step)
        shared |= of_tokens.used & of_gradient.used
        flat = np.concatenate([blocks[name].detach().double().flatten().cpu().numpy() for name in sorted(blocks)])
        for row in rows:
            found = _sliding(row, flat)
            worst, tried = max(worst, float(found.max(initial=0.0))), tried + found.size
    check = _judged(APART, worst, tried, draws[0].shape[1])
    if not shared:
        return check.model_copy(update={"measured": f"{check.measured}; no address of the key's streams in common"})
    return check.model_copy(
        update={
            "status": "fail",
            "measured": f"{check.measured}; {len(shared)} addresses of the key's streams in common",
        }
    )


def _sliding(needle: Floats, hay: Floats) -> Floats:
    """|correlation| of `needle` with every stretch of its length in `hay`; the shorter of the two slides."""
    if needle.size > hay.size:
        needle, hay = hay, needle
    n = needle.size
    centred = needle - needle.mean()
    size = 1 << int(np.ceil(np.log2(hay.size + n)))
    products = np.fft.irfft(np.fft.rfft(hay, size) * np.conj(np.fft.rfft(centred, size)), size)[: hay.size - n + 1]
    sums, squares = np.cumsum(np.r_[0.0, hay]), np.cumsum(np.r_[0.0, hay**2])
    mean = (sums[n:] - sums[:-n]) / n
    spread = np.sqrt(np.maximum(squares[n:] - squares[:-n] - n * mean**2, 1e-12))
    return np.asarray(np.abs(products) / (spread * np.linalg.norm(centred)))


def audit_noise(path: TokenPath, units: Sequence[Unit]) -> tuple[Check, ...]:
    """All noise checks; nothing where the path adds no fusion noise."""
    if path.fusion_std <= 0:
        return ()
    draws = [residuals(path, units, step=step) for step in STEPS]
    if not draws[0].size:
        return ()
    return (
        over_pictures(draws),
        over_steps(draws),
        not_by_content(path, units),
        keyed(path, units),
        apart(path, units, draws),
    )
