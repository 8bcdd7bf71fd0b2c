"""eps from (sigma, q, T), sigma from eps, and the privacy-loss distributions behind both.

The number is that of a privacy-loss distribution and never below the truth (`steps`, `moments`, `composition`, `pld`,
`search`); dp-accounting's Rényi DP and Opacus' PRV are cross-checks (`cross_checks`). Poisson, fixed-size and shuffled
batches are each accounted as what they are (`schemes`), randomly allocated ones too (`allocation`), and so is the
choice of the best of several runs (`repetition`) and a release beside the training (`joint`). docs/accounting.md says
it all for users.

This package owns the conventions of the neighbouring relations. `noise_multiplier` is always sigma / C: the noise's
standard deviation on the *sum* over the clip norm, whatever the relation. What one unit can move is

    add-remove, zero-out: C     (mu = 1 / sigma for one step on everybody)
    replace:             2C     (mu = 2 / sigma)

dp-accounting 0.6 holds two conventions: its PLD takes sigma / C and doubles the sensitivity itself under REPLACE_ONE,
its RDP takes sigma over the relation's own sensitivity and never doubles; dpaudit asks its RDP alone. Opacus knows no
relation at all: its PRV is asked with the noise over what one unit moves. Tests hold every relation and accountant
against the Gaussian's closed form. No module outside may import dp-accounting or read its private attributes.
"""

from dpaudit.accounting.cross_checks import cross_check, prv_epsilon, rdp_epsilon
from dpaudit.accounting.events import Direction, DpSgd, Noise, PrivacyLosses, Scheme, sensitivity
from dpaudit.accounting.gaussian import gaussian_delta, gaussian_epsilon
from dpaudit.accounting.groups import GroupLoss, best_guess, group_loss, stated_group_loss
from dpaudit.accounting.joint import (
    joint_after,
    joint_curve,
    joint_epsilon,
    noise_multiplier_beside,
    release_event,
)
from dpaudit.accounting.pld import (
    COARSE,
    FINE,
    accountant_name,
    curve,
    discrete_losses,
    epsilon,
    epsilon_after,
)
from dpaudit.accounting.reference import require_reference
from dpaudit.accounting.repetition import Repetitions, TunedEpsilon, draw_runs, tuning
from dpaudit.accounting.search import noise_multiplier_for
from dpaudit.accounting.tradeoff import largest_tpr, stated_largest_tpr

__all__ = [
    "COARSE",
    "FINE",
    "Direction",
    "DpSgd",
    "GroupLoss",
    "Noise",
    "PrivacyLosses",
    "Repetitions",
    "Scheme",
    "TunedEpsilon",
    "accountant_name",
    "best_guess",
    "cross_check",
    "curve",
    "discrete_losses",
    "draw_runs",
    "epsilon",
    "epsilon_after",
    "gaussian_delta",
    "gaussian_epsilon",
    "group_loss",
    "joint_after",
    "joint_curve",
    "joint_epsilon",
    "largest_tpr",
    "noise_multiplier_beside",
    "noise_multiplier_for",
    "prv_epsilon",
    "rdp_epsilon",
    "release_event",
    "require_reference",
    "sensitivity",
    "stated_group_loss",
    "stated_largest_tpr",
    "tuning",
]
