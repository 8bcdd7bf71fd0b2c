"""The price of trying hyper-parameters on private data and keeping the best: Papernot and Steinke 2022.

Running k configurations and publishing the best one costs more than one run, and how many were tried is itself chosen.
What is proven (arXiv 2110.03620): draw the number of repetitions K at random *before* anything runs, independently of
the data, repeat the private run K times, each time with hyper-parameters drawn from a public list, and publish the best
run alone. With K from a truncated negative binomial distribution (shape eta > -1; geometric is eta = 1, logarithmic is
eta = 0) and a run that is (lambda, e(lambda))-RDP at every order (theorem 2)

    e'(lambda) = e(lambda) + (1 + eta) min over l of ((1 - 1/l) e(l) + ln(1/gamma) / l) + ln E[K] / (lambda - 1)

and for K from a Poisson distribution (theorem 6; K = 0 publishes nothing) with d(lambda) the run's delta at
eps = ln(1 + 1/(lambda - 1))

    e'(lambda) = e(lambda) + E[K] d(lambda) + ln E[K] / (lambda - 1).

"Best" must be decided by something that the run itself publishes: a score on *public* data, or one that is part of the
private run and accounted in it. A score on a private validation set touches those people's data once more.

The evaluation is dp-accounting's (RepeatAndSelectDpEvent); tests re-derive it and hold it against a brute-force
computation of the whole procedure for a small mechanism.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dpaudit.accounting.cross_checks import quiet, rdp_epsilon, rdp_relation, rdp_step
from dpaudit.accounting.events import DpSgd, check_delta, trivial
from dpaudit.accounting.schemes import composed_as
from dpaudit.errors import UsageError, rejected

Repetitions = Literal["geometric", "logarithmic", "poisson"]
_SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@dataclass(frozen=True)
class TunedEpsilon:
    """eps at delta of "repeat at random and publish the best". mean_runs: E[K]. single: eps of one run, by RDP too."""

    epsilon: float
    delta: float
    mean_runs: float
    repetitions: Repetitions
    single: float

    def sentence(self) -> str:
        """The statement for a ledger."""
        return (
            f"eps <= {self.epsilon:.4g} at delta = {self.delta:g} for the published best of K runs, K "
            f"{self.repetitions} with mean {self.mean_runs:g}, drawn beforehand (Papernot and Steinke 2022; one run by "
            f"RDP: {self.single:.4g})"
        )


def tuning(event: DpSgd, delta: float, *, mean_runs: float, repetitions: Repetitions = "geometric") -> TunedEpsilon:
    """eps of publishing the best of K runs of `event`, K drawn by `draw_runs` beforehand.

    event: the run that costs most, when the tried configurations differ in (sigma, q, T). mean_runs: E[K] >= 1.
    Raises UsageError where RDP says nothing about `event` (Poisson batches under replace, subsampled Laplace noise).
    """
    check_delta(delta)
    _check(mean_runs, repetitions)
    plain = composed_as(event)
    single = rdp_epsilon(plain, delta)
    if single is None:
        raise UsageError(
            f"tuning: no Rényi bound is known for {plain.sampling} batches of {plain.noise} noise under "
            f"{plain.relation}; accepted: relation add-remove or zero-out, or full batches"
        )
    if trivial(plain) is not None:
        return TunedEpsilon(single, delta, mean_runs, repetitions, single)
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=_orders(), neighboring_relation=rdp_relation(plain))
    run = dp_event.SelfComposedDpEvent(rdp_step(plain), plain.steps)
    with quiet():
        accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean_runs, _SHAPES[repetitions]))
        return TunedEpsilon(float(accountant.get_epsilon(delta)), delta, mean_runs, repetitions, single)


def draw_runs(mean_runs: float, repetitions: Repetitions, rng: np.random.Generator) -> int:
    """K: how many runs to do. `rng` must be independent of the data; K stays secret (the bound is for its law).

    Geometric and logarithmic start at 1; Poisson may be 0: then nothing is published.
    """
    _check(mean_runs, repetitions)
    if repetitions == "poisson":
        return int(rng.poisson(mean_runs))
    if mean_runs == 1:
        return 1
    if repetitions == "geometric":
        return int(rng.geometric(1.0 / mean_runs))
    return int(rng.logseries(1.0 - _logarithmic_gamma(mean_runs)))


def _logarithmic_gamma(mean: float) -> float:
    """gamma with (1 / gamma - 1) / ln(1 / gamma) = mean."""
    from scipy.optimize import brentq

    def excess(log_gamma: float) -> float:
        return math.expm1(-log_gamma) / -log_gamma - mean

    return math.exp(brentq(excess, -60.0, -1e-9, xtol=1e-14))


def _check(mean_runs: float, repetitions: Repetitions) -> None:
    if not (math.isfinite(mean_runs) and mean_runs >= 1):
        raise rejected("mean-runs", mean_runs, "a finite number >= 1")
    if repetitions not in get_args(Repetitions):
        raise rejected("repetitions", repetitions, get_args(Repetitions))


def _orders() -> list[float]:
    """Rényi orders, denser near 1 than dp-accounting's own: a large eps has its best order there."""
    return [
        *(1 + np.geomspace(1e-3, 0.1, 20)[:-1]).tolist(),
        *(1 + x / 10.0 for x in range(1, 100)),
        *range(11, 64),
        *(80, 96, 128, 256, 512, 1024),
    ]
