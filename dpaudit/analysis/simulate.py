"""Many simulated one-run games at once, for coverage tests and the benchmark: scores in, right guesses out."""

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from dpaudit.bounds.profile import DiscreteProfile

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]


def coins(audits: int, n: int, rng: np.random.Generator) -> Coins:
    """Fair independent coins, (audits, n); True = in training."""
    return rng.random((audits, n)) < 0.5


def gaussian(audits: int, n: int, mu: float, rng: np.random.Generator) -> tuple[Floats, Coins]:
    """Canaries on separate directions: score N(mu, 1) in, N(0, 1) out."""
    inside = coins(audits, n, rng)
    return rng.normal(size=(audits, n)) + mu * inside, inside


def right_guesses(
    scores: Floats, inside: Coins, top: int, bottom: int, rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Right guesses per audit, ties broken at random; scores, inside: (audits, n)."""
    # Tied scores are shuffled by shuffling the columns first (a stable sort keeps the shuffled order).
    columns = rng.permutation(scores.shape[1])
    scores, inside = scores[:, columns], inside[:, columns]
    order = np.argsort(scores, axis=1, kind="stable")
    found = np.take_along_axis(inside, order[:, scores.shape[1] - top :], axis=1).sum(axis=1)
    cleared = (~np.take_along_axis(inside, order[:, :bottom], axis=1)).sum(axis=1)
    return np.asarray(found + cleared, dtype=np.intp)


def meeting(audits: int, directions: Floats, sigma: float, rng: np.random.Generator) -> tuple[Floats, Coins]:
    """One full-batch step in which canary gradients, rows of `directions` (n, d) of norm <= 1, meet in one noisy sum.

    Score: inner product of (sum - its mean) with the canary's own direction.
    """
    n, d = directions.shape
    inside = coins(audits, n, rng)
    noisy = (inside - 0.5) @ directions + sigma * rng.normal(size=(audits, d))
    return noisy @ directions.T, inside


def unit_rows(n: int, d: int, shared: float, rng: np.random.Generator) -> Floats:
    """n unit vectors in d dimensions with a common component: pairwise inner product about `shared`."""
    own = rng.normal(size=(n, d))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    common = np.zeros(d)
    common[0] = 1.0
    rows = np.sqrt(shared) * common + np.sqrt(1.0 - shared) * own
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def common_fate(
    audits: int, n: int, leaks: list[tuple[float, float]], rng: np.random.Generator
) -> tuple[Floats, Coins]:
    """One hidden die per audit picks the error probability of every canary's randomised response.

    leaks: (probability, error) pairs. Each single coin sees exactly this mixture, yet all canaries share their fate.
    """
    inside = coins(audits, n, rng)
    weights = np.array([weight for weight, _ in leaks])
    errors = np.array([error for _, error in leaks])
    fate = errors[rng.choice(len(leaks), size=audits, p=weights / weights.sum())]
    wrong = rng.random((audits, n)) < fate[:, None]
    return np.where(wrong, ~inside, inside).astype(np.float64), inside


def from_profile(audits: int, n: int, profile: DiscreteProfile, rng: np.random.Generator) -> tuple[Floats, Coins]:
    """Ideal canaries of any discrete mechanism: score = log-likelihood ratio of an independent draw of its pair."""
    order = np.argsort(profile.confidence)
    mass = np.cumsum(profile.mass[order])
    at = np.searchsorted(mass / mass[-1], rng.random((audits, n)), side="right")
    confidence = profile.confidence[order][np.minimum(at, mass.size - 1)]
    inside = coins(audits, n, rng)
    right = rng.random((audits, n)) < expit(confidence)
    # An infinite ratio is certainty; ranks only need it to be the largest.
    size = np.where(np.isinf(confidence), 1e9, confidence)
    return np.where(right == inside, size, -size), inside


def dp_sgd_sums(
    audits: int, directions: Floats, *, sigma: float, rate: float, steps: int, gate: float, rng: np.random.Generator
) -> tuple[Floats, Coins]:
    """T Poisson-subsampled steps of meeting canaries, rows of `directions` (n, d).

    With probability 1 - `gate` a step's gradients of all canaries vanish together (a state that they share). Score: sum
    over steps of the inner product of the noisy sum with the canary's direction.
    """
    n, d = directions.shape
    inside = coins(audits, n, rng)
    scores = np.zeros((audits, n))
    for _ in range(steps):
        batch = inside & (rng.random((audits, n)) < rate) & (rng.random((audits, 1)) < gate)
        noisy = (batch - 0.5 * rate * gate) @ directions + sigma * rng.normal(size=(audits, d))
        scores += noisy @ directions.T
    return scores, inside
