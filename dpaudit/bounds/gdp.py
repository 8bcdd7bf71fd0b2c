"""Gaussian DP: mu from error rates of independent runs, and eps from mu.

Nasr et al., "Tight Auditing of Differentially Private Machine Learning" (USENIX Security 2023, arXiv 2302.07956), with
Dong, Roth, Su (2022): if the training is mu-GDP, every test has Phi^-1(1 - FPR) - Phi^-1(FNR) <= mu.

Assumes the Gaussian family (`assumes: gaussian`): outside it the bound can be far above the truth (randomised response
with eps 1 reads as eps 4.8). The runs must be independent and the threshold fixed beforehand. FPR and FNR are bounded
from above by Clopper-Pearson at (1 - confidence) / 2 each, so both hold with the confidence asked, and mu is read from
them, never from an absolute value: swapping the roles of the two data sets needs its own share of the error.
"""

import math

from scipy.special import log_ndtr, ndtr, ndtri

from dpaudit import validate
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.roots import largest_below


def delta_from_mu(mu: float, epsilon: float) -> float:
    """delta(eps) of N(0, 1) against N(mu, 1): Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang 2018)."""
    if mu <= 0.0 or epsilon == math.inf:
        return 0.0
    if mu == math.inf:
        return 1.0
    second = math.exp(min(0.0, epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))))
    return max(0.0, float(ndtr(mu / 2 - epsilon / mu)) - second)


def epsilon_from_mu(mu: float, delta: float) -> float:
    """The eps at which the mu-Gaussian mechanism is (eps, delta)-DP; inf for mu = inf or delta = 0 with mu > 0.

    Rounded down by less than 1e-9: it converts lower bounds.
    """
    size = validate.real("mu", mu, low=0.0, high=math.inf)
    d = validate.delta(delta)
    if size == 0.0:
        return 0.0
    if size == math.inf or d == 0.0:
        return math.inf
    return largest_below(lambda eps: -delta_from_mu(size, eps), -d, most=1e12)


def mu_lower(counts: Counts, *, confidence: float) -> float:
    """Lower bound on mu; 0 when the errors show nothing, inf never (both error bounds are positive)."""
    fpr, fnr = counts.upper_rates(confidence)
    # 1 - FPR through the upper tail: -Phi^-1(FPR) keeps its digits for a tiny FPR.
    return max(0.0, -float(ndtri(fpr)) - float(ndtri(fnr)))


def epsilon_lower(counts: Counts, *, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta`, within the Gaussian family."""
    validate.delta(delta)
    return epsilon_from_mu(mu_lower(counts, confidence=confidence), delta)


def ceiling(counts: Counts, *, delta: float, confidence: float) -> float:
    """The bound if every run had been told apart."""
    return epsilon_lower(counts.perfect(), delta=delta, confidence=confidence)
