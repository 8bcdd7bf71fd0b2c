"""Anytime-valid tests: stop a multi-trial audit as soon as it is decided, and merge repeated gates.

An e-value is a non-negative statistic with mean at most 1 under the claim; an e-process is a running product of them.
By Ville's inequality P[it ever reaches 1/alpha] <= alpha, so looking after every trial is free. Averages of e-values
are e-values under any dependence (merge several attacks on one run so); products only of independent runs.

The bet of one trial (a fair coin, a training, a guess that may abstain): if the training is (eps, delta)-DP, then
P[right] = (P_in[E1] + P_out[E0]) / 2 <= e^eps P[wrong] + delta, so the payoff X = 1 if right, -e^eps if wrong, 0 if
abstained has mean at most delta, and 1 + b (X - delta) with 0 <= b < 1 / (e^eps + delta) is an e-value. The fraction b
is Kelly's for the accuracy seen so far (Krichevsky-Trofimov, so it only uses the past): no effect size is needed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dpaudit import validate
from dpaudit.errors import rejected

CAUTION = 0.95  # of the largest admissible bet, so that one wrong guess never ends the game


@dataclass(frozen=True)
class Betting:
    """State of an e-process against "(epsilon, delta)-DP"; `after(outcome)` returns the next state."""

    epsilon: float
    delta: float = 0.0
    right: int = 0
    wrong: int = 0
    log_wealth: float = 0.0
    best_log_wealth: float = 0.0

    def __post_init__(self) -> None:
        validate.real("epsilon", self.epsilon, low=0.0, high=500.0)
        validate.delta(self.delta)

    @property
    def fraction(self) -> float:
        """b for the next trial: Kelly at the smoothed accuracy of the past guesses, 0 without an edge."""
        loss = math.exp(self.epsilon)
        accuracy = (self.right + 0.5) / (self.right + self.wrong + 1.0)
        edge = accuracy - (1.0 - accuracy) * loss
        return min(max(edge / loss, 0.0), CAUTION / (loss + self.delta))

    def after(self, outcome: int) -> "Betting":
        """The state after one independent trial: outcome 1 = right, -1 = wrong, 0 = abstained."""
        if outcome not in (-1, 0, 1):
            raise rejected("outcome", outcome, "1 (right), -1 (wrong) or 0 (abstained)")
        payoff = {1: 1.0, -1: -math.exp(self.epsilon), 0: 0.0}[outcome]
        wealth = self.log_wealth + math.log1p(self.fraction * (payoff - self.delta))
        return replace(
            self,
            right=self.right + (outcome == 1),
            wrong=self.wrong + (outcome == -1),
            log_wealth=wealth,
            best_log_wealth=max(self.best_log_wealth, wealth),
        )

    @property
    def e_value(self) -> float:
        """Evidence against the claim now."""
        return math.exp(min(self.log_wealth, 700.0))

    @property
    def p_value(self) -> float:
        """Anytime-valid: 1 / (largest wealth so far)."""
        return math.exp(-self.best_log_wealth)


def play(outcomes: Iterable[int], *, epsilon: float, delta: float = 0.0) -> Betting:
    """Feed outcomes one by one."""
    state = Betting(epsilon, delta)
    for outcome in outcomes:
        state = state.after(outcome)
    return state


def calibrate(p_value: float) -> float:
    """An e-value from a p-value: 1 / (2 sqrt(p)) (Shafer et al. 2011 with kappa = 1/2): mean 1 for a uniform p.

    For repeated runs of one gate: each run's p-value becomes an e-value, and independent runs multiply.
    """
    p = validate.real("p_value", p_value, low=0.0, high=1.0)
    return math.inf if p == 0.0 else 0.5 / math.sqrt(p)


def merge_by_averaging(e_values: Sequence[float]) -> float:
    """One e-value from several on the same run, under any dependence between them (Vovk and Wang 2021)."""
    return sum(_checked(e_values)) / len(e_values)


def merge_by_multiplying(e_values: Sequence[float]) -> float:
    """One e-value from independent runs."""
    values = _checked(e_values)
    return 0.0 if 0.0 in values else math.prod(values)


def _checked(e_values: Sequence[float]) -> list[float]:
    if not e_values:
        raise rejected("e_values", "none", "at least one")
    return [validate.real("e_values", value, low=0.0, high=math.inf) for value in e_values]
