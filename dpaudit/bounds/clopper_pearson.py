"""(eps, delta) from the error rates of independent runs: Clopper-Pearson.

Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning" (NeurIPS 2020, arXiv 2006.07709); delta as
in Nasr et al. (2021). If the training is (eps, delta)-DP, every test satisfies (Kairouz, Oh, Viswanath 2015)

    FPR e^eps + FNR >= 1 - delta   and   FNR e^eps + FPR >= 1 - delta.

Each rate is bounded from above by Clopper-Pearson at (1 - confidence) / 2, so the bound

    max{ ln((1 - delta - FNR_ub) / FPR_ub), ln((1 - delta - FPR_ub) / FNR_ub), 0 }

exceeds the truth with probability at most 1 - confidence. Assumes nothing about the mechanism, but that the runs are
independent and the threshold was fixed before looking. Canaries of one run are not independent runs.
"""

import math
from dataclasses import dataclass

from scipy.special import betaincinv

from dpaudit import validate


@dataclass(frozen=True)
class Counts:
    """Outcomes of a threshold test: members found (tp) and missed (fn), non-members accused (fp) and cleared (tn)."""

    tp: int
    fn: int
    fp: int
    tn: int

    def __post_init__(self) -> None:
        for name in ("tp", "fn", "fp", "tn"):
            object.__setattr__(self, name, validate.count(name, getattr(self, name)))
        validate.count("tp + fn", self.tp + self.fn, least=1)
        validate.count("fp + tn", self.fp + self.tn, least=1)

    def upper_rates(self, confidence: float) -> tuple[float, float]:
        """Upper limits of (FPR, FNR), each at (1 - confidence) / 2."""
        tail = 0.5 * (1.0 - validate.confidence(confidence))
        return upper_rate(self.fp, self.fp + self.tn, tail), upper_rate(self.fn, self.tp + self.fn, tail)

    def perfect(self) -> "Counts":
        """The same numbers of runs without an error."""
        return Counts(self.tp + self.fn, 0, 0, self.fp + self.tn)


def upper_rate(errors: int, trials: int, tail: float) -> float:
    """One-sided Clopper-Pearson upper limit at error `tail`: the rate at which <= `errors` has probability `tail`."""
    return 1.0 if errors == trials else float(betaincinv(errors + 1, trials - errors, 1.0 - tail))


def epsilon_of_rates(fpr: float, fnr: float, delta: float) -> float:
    """The smallest eps >= 0 at which error rates (fpr, fnr) are possible under (eps, delta)-DP; may be inf."""
    best = 0.0
    for gain, cost in ((1.0 - delta - fnr, fpr), (1.0 - delta - fpr, fnr)):
        if gain > 0.0:
            best = max(best, math.inf if cost == 0.0 else math.log(gain / cost))
    return best


def epsilon_lower(counts: Counts, *, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta`."""
    fpr, fnr = counts.upper_rates(confidence)
    return epsilon_of_rates(fpr, fnr, validate.delta(delta))


def ceiling(counts: Counts, *, delta: float, confidence: float) -> float:
    """The bound if every run had been told apart."""
    return epsilon_lower(counts.perfect(), delta=delta, confidence=confidence)
