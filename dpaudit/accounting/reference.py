"""PLD_accounting, the reference implementation of random allocation: the second opinion on every allocated run.

Its bounds are rounded the other way at every stage, so each costs a grid step: with the points that are allowed here
they lie some per cent apart. Its lower bound is one of the same pair of distributions (dpaudit.accounting.allocation),
so an eps of ours below it would be wrong. The package is the extra `allocation`; a run is not trained without it.
"""

import importlib.metadata
import importlib.util
import math
import warnings
from functools import lru_cache

from scipy.special import ndtri

from dpaudit.accounting.events import DpSgd
from dpaudit.accounting.schemes import moved
from dpaudit.documents import CrossCheck
from dpaudit.errors import EnvironmentFailure

_POINTS = 1500  # of the reference's grid for one step: about a second for both bounds
_TAIL = 1e-3  # of delta that it may cut off
_WIDEST = 0.3  # of eps that its grid may cost; beyond, it is not asked


def require_reference() -> None:
    """EnvironmentFailure, in one line, without the package."""
    if importlib.util.find_spec("PLD_accounting") is None:
        raise EnvironmentFailure(
            "training.sampling=allocation: needs PLD_accounting, which checks its eps and is not installed: "
            "pip install 'dpaudit[allocation]'"
        )


def name() -> str:
    """Name and version, e.g. 'PLD_accounting 2.0'."""
    return f"PLD_accounting {importlib.metadata.version('PLD_accounting')}"


@lru_cache(maxsize=64)
def reference_range(event: DpSgd, delta: float, epsilon: float) -> tuple[float, float] | str:
    """(lower, upper) bound on eps of an allocated event, or why there is none. epsilon: about what to expect."""
    from PLD_accounting import gaussian_allocation_epsilon_configurable
    from PLD_accounting.types import AllocationSchemeConfig, BoundType, PrivacyParams

    sigma, steps = event.noise_multiplier, event.epoch_steps // event.draws
    shift, epochs = moved(event) / sigma, event.epochs * event.draws
    stages = 2 * (steps + 1).bit_length()
    reach = float(-ndtri(_TAIL * delta / (9 * epochs * steps)))
    cost = shift * (shift + 2 * reach) / _POINTS * stages * epochs
    if not cost <= _WIDEST * epsilon:
        return f"not asked: {_POINTS} points cost it more than {_WIDEST:.0%} of eps"
    config = AllocationSchemeConfig(loss_discretization=max(cost, 0.01 * epsilon), tail_truncation=_TAIL * delta)
    params = PrivacyParams(
        sigma=sigma, num_steps=event.epoch_steps, num_selected=event.draws, num_epochs=event.epochs, delta=delta
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            low, high = (
                gaussian_allocation_epsilon_configurable(params=params, config=config, bound_type=bound)
                for bound in (BoundType.IS_DOMINATED, BoundType.DOMINATES)
            )
        except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            return f"failed: {' '.join(str(error).split())[:120]}"
    return max(0.0, low), high


def reference_check(event: DpSgd, delta: float, epsilon: float) -> CrossCheck:
    """The reference's upper bound. Raises ArithmeticError when `epsilon` lies below its lower bound: one is wrong."""
    if importlib.util.find_spec("PLD_accounting") is None:
        return CrossCheck(accountant="PLD_accounting", epsilon=None, note="not installed: the extra `allocation`")
    found = reference_range(event, delta, epsilon)
    if isinstance(found, str):
        return CrossCheck(accountant=name(), epsilon=None, note=found)
    low, high = found
    if epsilon < low * (1 - 1e-9):
        raise ArithmeticError(f"allocation: eps = {epsilon:g} lies below the {low:g} that {name()} proves")
    return CrossCheck(accountant=name(), epsilon=high if math.isfinite(high) else None, note=f"at least {low:.4g}")
