"""Joint-Beta credible bound on eps: an estimate, never a verdict.

Zanella-Béguelin et al., "Bayesian Estimation of Differential Privacy" (ICML 2023, arXiv 2206.05199): with Jeffreys
priors FNR ~ Beta(1/2 + fn, 1/2 + tp) and FPR ~ Beta(1/2 + fp, 1/2 + tn) a posteriori, independent. The (eps, delta)-DP
region is {fpr between lo(fnr) and hi(fnr)}; the bound is the eps whose region holds posterior mass 1 - confidence.

A statement about belief under a prior (`assumes: prior`, `estimate`): it has no guaranteed coverage. Two-sided, so a
tiny positive value at the null is normal.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaincinv

from dpaudit import validate
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.roots import largest_below

Floats = npt.NDArray[np.float64]

NODES = 4000  # quantile mid-points of the FNR: the values of references/auditing.md to 4 digits


def region_mass(epsilon: float, fnr: Floats, fpr_shape: tuple[float, float], delta: float) -> float:
    """Posterior mass of the (eps, delta)-DP region; `fnr`: equally likely nodes, shape (k,)."""
    grow, shrink = math.exp(min(epsilon, 700.0)), math.exp(-epsilon)
    low = np.maximum(0.0, np.maximum(1.0 - delta - grow * fnr, shrink * (1.0 - delta - fnr)))
    high = np.minimum(1.0, np.minimum(1.0 + (delta - fnr) * shrink, delta + (1.0 - fnr) * grow))
    below_high, below_low = betainc(*fpr_shape, np.clip(high, 0, 1)), betainc(*fpr_shape, np.clip(low, 0, 1))
    return float(np.mean(np.maximum(below_high - below_low, 0.0)))


@lru_cache(maxsize=1 << 14)
def epsilon_lower(counts: Counts, *, delta: float, confidence: float) -> float:
    """The eps below which the posterior puts 1 - confidence."""
    level = 1.0 - validate.confidence(confidence)
    d = validate.delta(delta)
    middle = (np.arange(NODES) + 0.5) / NODES
    fnr = np.asarray(betaincinv(0.5 + counts.fn, 0.5 + counts.tp, middle), dtype=np.float64)
    shape = (0.5 + counts.fp, 0.5 + counts.tn)
    return largest_below(lambda eps: region_mass(eps, fnr, shape, d), level, most=700.0, tolerance=1e-7)


def ceiling(counts: Counts, *, delta: float, confidence: float) -> float:
    """The estimate if every run had been told apart."""
    return epsilon_lower(counts.perfect(), delta=delta, confidence=confidence)
