"""Second opinions on a PLD number, by other theories. Upper bounds too, so none may lie below the truth."""

from typing import Any

from dpaudit.accounting.events import DpSgd, check_delta, neighbouring, sensitivity
from dpaudit.accounting.pld import trivial


def rdp_epsilon(event: DpSgd, delta: float) -> float | None:
    """Cross-check by Rényi DP (an upper bound too, looser).

    None: RDP knows no Poisson sampling under replace, and none of Laplace noise.
    """
    check_delta(delta)
    known = trivial(event)
    if known is not None:
        return known
    if event.sample_rate < 1 and (event.relation == "replace" or event.noise == "laplace"):
        return None
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    # This accountant wants sigma over the sensitivity of the relation itself, which is 2C for replace.
    kind = dp_accounting.LaplaceDpEvent if event.noise == "laplace" else dp_accounting.GaussianDpEvent
    step: Any = kind(event.noise_multiplier / sensitivity(event.relation))
    if event.sample_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(event.sample_rate, step)
    accountant = RdpAccountant(neighboring_relation=neighbouring(event.relation))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    return float(accountant.get_epsilon(delta))
