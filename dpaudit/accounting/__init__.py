"""eps from (sigma, q, T), sigma from eps, and the privacy-loss distributions behind both.

The number is dp-accounting's privacy-loss distribution (`pld`); other accountants are cross-checks (`cross_checks`).

This package owns the conventions of the neighbouring relations. `noise_multiplier` is always sigma / C: the noise's
standard deviation on the *sum* over the clip norm, whatever the relation. What one unit can move is

    add-remove, zero-out: C     (mu = 1 / sigma for one step on everybody)
    replace:             2C     (mu = 2 / sigma)

dp-accounting 0.6 holds two conventions: its PLD takes sigma / C and doubles the sensitivity itself under REPLACE_ONE,
its RDP takes sigma over the relation's own sensitivity and never doubles. Tests hold every relation and accountant
against the Gaussian's closed form. No module outside may import dp-accounting or read its private attributes.
"""

from dpaudit.accounting.cross_checks import rdp_epsilon
from dpaudit.accounting.events import Direction, DpSgd, Noise, PrivacyLosses
from dpaudit.accounting.gaussian import gaussian_delta, gaussian_epsilon
from dpaudit.accounting.pld import (
    accountant_name,
    curve,
    discrete_losses,
    epsilon,
    epsilon_after,
    noise_multiplier_for,
)

__all__ = [
    "Direction",
    "DpSgd",
    "Noise",
    "PrivacyLosses",
    "accountant_name",
    "curve",
    "discrete_losses",
    "epsilon",
    "epsilon_after",
    "gaussian_delta",
    "gaussian_epsilon",
    "noise_multiplier_for",
    "rdp_epsilon",
]
