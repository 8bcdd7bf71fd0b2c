"""Second opinions on a PLD number, by other theories. Upper bounds too, so none may lie below the truth."""

from typing import Any

from dpaudit.accounting.events import DpSgd, check_delta, neighbouring, sensitivity
from dpaudit.accounting.pld import trivial


def rdp_epsilon(event: DpSgd, delta: float) -> float | None:
    """Cross-check by Rényi DP (an upper bound too, looser). None: RDP knows no Poisson sampling under replace."""
    check_delta(delta)
    known = trivial(event)
    if known is not None:
        return known
    if event.relation == "replace" and event.sample_rate < 1:
        return None
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    # This accountant wants sigma over the sensitivity of the relation itself, which is 2C for replace.
    step: Any = dp_accounting.GaussianDpEvent(event.noise_multiplier / sensitivity(event.relation))
    if event.sample_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(event.sample_rate, step)
    accountant = RdpAccountant(neighboring_relation=neighbouring(event.relation))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    return float(accountant.get_epsilon(delta))
