"""One-run bound for f-DP with any trade-off function.

Mahloujifar, Melis, Chaudhuri, "Auditing f-Differential Privacy in One Run" (ICML 2025, arXiv 2410.22235): the theorem
on adversaries with bounded guesses and its recursion.

m canaries with independent fair coins, c' guesses, c of them right. Let p_l be the probability of exactly l right. Take
the event "the guess on canary j is right and at least i + 1 are": with coin j flipped the same outputs make that guess
wrong and at least i right. The trade-off curve bounds the first probability by the second; averaging over j (the curve
is concave) gives, for every i,

    r_{i+1} <= blow-up(h_i),   r_i = sum_{l >= i} (l / m) p_l,   h_i = sum_{l >= i} ((c' - l) / m) p_l.

So if at least c right has probability tau, then h_i >= F(r_{i+1}) with F the inverse of the blow-up, all the way down,
and the total r_0 + h_0 = c' / m caps how large tau can be. The p-value is the largest tau that fits.

Valid for EVERY mechanism whose single coins satisfy the curve, however the canaries interfere, since only one coin is
flipped at a time; needs independent fair coins and guesses fixed in number beforehand. With the curve of a family (say
Gaussian) the bound assumes that family; with the curve of the claimed mechanism it tests the claim itself; with the
(eps, delta) curve it assumes nothing.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from dpaudit import validate
from dpaudit.bounds.gdp import epsilon_from_mu
from dpaudit.bounds.profile import Profile

Floats = npt.NDArray[np.float64]

LANES = 16  # candidates tried in one pass of the recursion: numpy's cost per call hardly grows with them
SMALLEST_P = 1e-300


def _refuted(
    wrong_for: Callable[[Floats], Floats], tau: Floats, m: int, guesses: int, correct: int
) -> npt.NDArray[np.bool_]:
    """Whether "at least `correct` right with probability tau" breaks the curve. tau, result: (lanes,).

    `wrong_for` is F, lane by lane. Starts with all of tau at exactly `correct` right (any other way needs more mass).
    """
    right = tau * (correct / m)
    wrong = tau * ((guesses - correct) / m)
    most = guesses / m * (1 + 1e-12)
    for i in range(correct - 1, -1, -1):
        needed = np.maximum(wrong, wrong_for(right))
        right = np.minimum(1.0, right + (i / (guesses - i)) * (needed - wrong))
        settled = needed <= wrong
        wrong = needed
        # A lane that stands still stays so; one beyond the total can't come back.
        if np.all(settled | (right + wrong > most)):
            break
    return np.asarray(right + wrong > most)


def p_value(profile: Profile, *, canaries: int, guesses: int, correct: int) -> float:
    """p-value of "every coin satisfies this profile's trade-off curve"; rounded up by at most 0.1 %."""
    m, c_all, c = validate.one_run(canaries, guesses, correct)
    if c == 0 or not _refuted(profile.wrong_for, np.ones(1), m, c_all, c)[0]:
        return 1.0
    low, high = np.log(SMALLEST_P), 0.0
    while high - low > 1e-3:
        logs = np.linspace(low, high, LANES + 2)
        fits = ~_refuted(profile.wrong_for, np.exp(logs[1:-1]), m, c_all, c)
        # Monotone in tau: the smallest refuted candidate bounds the p-value from above.
        first = int(np.argmin(fits)) if not fits.all() else LANES
        low, high = logs[first], logs[first + 1]
    return float(np.exp(high))


def parameter_lower(
    wrong_for: Callable[[Floats, Floats], Floats],
    *,
    canaries: int,
    guesses: int,
    correct: int,
    confidence: float,
    most: float,
    tolerance: float = 1e-7,
) -> float:
    """The largest parameter in [0, most] whose curve is refuted at `confidence`; 0 if none.

    `wrong_for(right, parameter)` is F of an increasingly leaky family, vectorised over both, shapes (lanes,).
    """
    m, c_all, c = validate.one_run(canaries, guesses, correct)
    tau = np.full(LANES, 1.0 - validate.confidence(confidence))

    def refuted(parameters: Floats) -> npt.NDArray[np.bool_]:
        return _refuted(lambda right: wrong_for(right, parameters), tau[: parameters.size], m, c_all, c)

    if c == 0 or not refuted(np.zeros(1))[0]:
        return 0.0
    low, high = 0.0, most
    # Geometric candidates first: the answer may lie anywhere between 0.01 and the hundreds.
    first = np.r_[np.geomspace(most * 1e-4, most, LANES)]
    while high - low > tolerance * max(1.0, low):
        candidates = first if low == 0.0 and high == most else np.linspace(low, high, LANES + 2)[1:-1]
        bad = refuted(candidates)
        count = LANES if bad.all() else int(np.argmin(bad))
        if count == LANES and candidates[-1] >= most:
            return most
        low, high = (candidates[count - 1] if count else low), (candidates[count] if count < LANES else high)
    return float(low)


def _gaussian_wrong(right: Floats, mu: Floats) -> Floats:
    return np.asarray(ndtr(ndtri(right) - mu), dtype=np.float64)


@lru_cache(maxsize=1 << 14)
def mu_lower(*, canaries: int, guesses: int, correct: int, confidence: float) -> float:
    """Lower bound on mu within the Gaussian family. Memoised on counts."""
    return parameter_lower(
        _gaussian_wrong, canaries=canaries, guesses=guesses, correct=correct, confidence=confidence, most=100.0
    )


def epsilon_lower(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` within the Gaussian family (`assumes: gaussian`)."""
    validate.delta(delta)
    return epsilon_from_mu(mu_lower(canaries=canaries, guesses=guesses, correct=correct, confidence=confidence), delta)


def ceiling(*, canaries: int, guesses: int, delta: float, confidence: float) -> float:
    """The largest bound that this game can show: every guess right."""
    return epsilon_lower(canaries=canaries, guesses=guesses, correct=guesses, delta=delta, confidence=confidence)


@lru_cache(maxsize=1 << 14)
def epsilon_lower_any(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` that assumes nothing: the recursion with the (eps, delta) curve.

    The curve: right <= delta + e^eps wrong, so F(x) = max(0, (x - delta) e^-eps). Tighter than Steinke's theorem where
    the delta term of that one bites, slightly looser where delta hardly matters.
    """
    d = validate.delta(delta)

    def wrong_for(right: Floats, eps: Floats) -> Floats:
        return np.maximum(0.0, right - d) * np.exp(-eps)

    return parameter_lower(
        wrong_for, canaries=canaries, guesses=guesses, correct=correct, confidence=confidence, most=700.0
    )
