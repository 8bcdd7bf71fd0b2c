"""One-run bound for (eps, delta)-DP: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run"
(NeurIPS 2023, arXiv 2305.08846), theorem 5.2 and its corollary on abstaining guessers.

The game: `canaries` records (m), each inserted by an independent fair coin; one training; the auditor guesses the coins
of `guesses` records (r) and abstains on the rest; `correct` guesses (v) are right. If the training is (eps, delta)-DP
with respect to each canary, then for every guesser, with W ~ Binomial(r, q), q = e^eps / (1 + e^eps),

    P[at least v right] <= P[W >= v] + 2 m delta max_{1 <= i <= m} P[v - i <= W < v] / i.

Assumes nothing else: canaries may interfere and the guesser may be anything, as long as r is fixed before the scores
are seen (a guesser that decides by looking how often to guess is covered only at the r that it fixed) and the coins
are independent. With coins that are exactly half heads the theorem does not apply.

The right-hand side at any eps' >= eps is valid too, so the bound below (the largest eps whose p-value is at most
1 - confidence) exceeds the truth with probability at most 1 - confidence.
"""

import math
from functools import lru_cache

from scipy.special import betainc

from dpaudit import validate
from dpaudit.bounds.roots import largest_below


def _at_least(k: int, trials: int, q: float) -> float:
    """P[Binomial(trials, q) >= k], precise in the upper tail."""
    if k <= 0:
        return 1.0
    if k > trials:
        return 0.0
    return float(betainc(k, trials - k + 1, q))


def _largest_average(v: int, trials: int, q: float, tail: float) -> float:
    """max_{i >= 1} P[v - i <= W < v] / i, with `tail` = P[W >= v].

    The binomial is unimodal, so the running average from v-1 downwards first rises, then falls: its top is found by
    bisection on "the next average is no larger" instead of a scan over all i.
    """

    def average(i: int) -> float:
        return (_at_least(v - i, trials, q) - tail) / i

    low, high = 1, v  # i beyond v adds nothing to the probability
    while low < high:
        middle = (low + high) // 2
        here = average(middle)
        if here > 0 and average(middle + 1) <= here:
            high = middle
        else:
            low = middle + 1
    # The last digits of the comparison are noise near the flat top: the neighbours are as good.
    return max(average(i) for i in range(max(1, low - 1), min(v, low + 1) + 1))


def _p_value(eps: float, m: int, r: int, v: int, delta: float) -> float:
    if v == 0:
        return 1.0
    q = 1.0 / (1.0 + math.exp(-eps))
    tail = _at_least(v, r, q)
    if delta == 0.0 or tail >= 1.0:
        return min(1.0, tail)
    return min(1.0, tail + 2.0 * m * delta * _largest_average(v, r, q, tail))


def p_value(epsilon: float, *, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """p-value of "the training is (epsilon, delta)-DP" from a one-run game.

    `canaries`: records with a coin (m), not only those guessed; `guesses`: r <= m, fixed beforehand; `correct`: v <= r.
    Raises UsageError outside that domain.
    """
    m, r, v = validate.one_run(canaries, guesses, correct)
    return _p_value(validate.epsilon(epsilon), m, r, v, validate.delta(delta))


@lru_cache(maxsize=1 << 16)
def epsilon_lower(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` with the given confidence; 0 when the game shows nothing. Memoised on counts."""
    m, r, v = validate.one_run(canaries, guesses, correct)
    level = 1.0 - validate.confidence(confidence)
    d = validate.delta(delta)
    return largest_below(lambda eps: _p_value(eps, m, r, v, d), level)


def ceiling(*, canaries: int, guesses: int, delta: float, confidence: float) -> float:
    """The largest bound that this game can show: every guess right. At delta = 0: logit((1 - confidence)^(1/r))."""
    return epsilon_lower(canaries=canaries, guesses=guesses, correct=guesses, delta=delta, confidence=confidence)
