"""Second opinions on a PLD number, by other theories and other people's code: Rényi DP and PRV.

They are upper bounds too, so none may lie below the truth; the PLD stays the number. Where a theory says nothing about
a mechanism, the check says so instead of answering about another one.
"""

import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from dpaudit.accounting.events import DpSgd, check_delta, neighbouring, sensitivity, trivial
from dpaudit.accounting.pld import epsilon
from dpaudit.accounting.reference import reference_check
from dpaudit.accounting.schemes import composed_as
from dpaudit.documents import CrossCheck

PRV_ERROR = 0.01  # Opacus' default: the bound is this much above its estimate
_PRV_POINTS = 1_000_000  # of its grid; beyond (small noise), it takes minutes and gigabytes, so it is not asked


@lru_cache(maxsize=64)
def cross_check(event: DpSgd, delta: float) -> tuple[CrossCheck, ...]:
    """eps of `event` by every other accountant, or the reason why it has none."""
    others = (_rdp(event, delta), _prv(event, delta))
    if event.sampling != "allocation" or trivial(event) is not None:
        return others
    return (reference_check(event, delta, epsilon(event, delta)), *others)


def rdp_epsilon(event: DpSgd, delta: float) -> float | None:
    """eps by Rényi DP (dp-accounting), looser. None: it knows no Poisson sampling under replace or of Laplace noise.

    Subsets of fixed size: Wang, Balle and Kasiviswanathan 2019, valid for replace, which covers the other relations.
    """
    check_delta(delta)
    event = composed_as(event)
    known = trivial(event)
    if known is not None:
        return known
    if not _rdp_knows(event):
        return None
    with quiet():
        return float(_rdp_accountant(event).get_epsilon(delta))


@lru_cache(maxsize=8)
def _rdp_accountant(event: DpSgd) -> Any:
    """The Rényi curve of an event: half a second to compute, and asked at several deltas."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=rdp_relation(event))
    with quiet():
        accountant.compose(dp_accounting.SelfComposedDpEvent(rdp_step(event), event.steps))
    return accountant


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines about Rényi orders that don't converge: they are left out, which only loosens the bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _rdp_knows(event: DpSgd) -> bool:
    if event.sampling == "fixed" or event.sample_rate == 1:
        return True
    if event.sampling == "allocation":
        return False
    return event.relation != "replace" and event.noise == "gaussian"


def rdp_relation(event: DpSgd) -> Any:
    """The relation to ask dp-accounting's RDP for: it knows fixed-size subsets under replace only."""
    return neighbouring("replace" if event.sampling == "fixed" else event.relation)


def rdp_step(event: DpSgd) -> Any:
    """One step as dp-accounting's RDP wants it: noise over the sensitivity of the relation itself, 2C for replace."""
    import dp_accounting

    kind = dp_accounting.LaplaceDpEvent if event.noise == "laplace" else dp_accounting.GaussianDpEvent
    if event.sampling == "fixed":
        # Of n = 2^40 places, so that the rate is met to twelve digits, rounded up.
        places = 2**40
        step = kind(event.noise_multiplier / 2.0)
        return dp_accounting.SampledWithoutReplacementDpEvent(places, math.ceil(event.sample_rate * places), step)
    step = kind(event.noise_multiplier / sensitivity(event.relation))
    return step if event.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(event.sample_rate, step)


def _rdp(event: DpSgd, delta: float) -> CrossCheck:
    name = f"dp-accounting {importlib.metadata.version('dp-accounting')} RDP"
    value = rdp_epsilon(event, delta)
    scheme = "random allocation" if event.sampling == "allocation" else "Poisson sampling"
    note = "" if value is not None else f"knows no {scheme} of {event.noise} noise under {event.relation}"
    return CrossCheck(accountant=name, epsilon=value, note=note)


def prv_epsilon(event: DpSgd, delta: float) -> float | None:
    """eps by Opacus' PRV accountant (Gopi, Lee and Wutschitz 2021), an upper bound within `PRV_ERROR` of its estimate.

    None where it can't say: it knows one relation (add-remove, and with it zero-out) and Poisson batches of Gaussian
    noise; it can't resolve small noise or tiny delta.
    """
    return _prv(event, delta).epsilon


def _prv(event: DpSgd, delta: float) -> CrossCheck:
    check_delta(delta)
    name = f"opacus {importlib.metadata.version('opacus')} PRV"
    plain = composed_as(event)
    known = trivial(plain)
    if known is not None:
        return CrossCheck(accountant=name, epsilon=known)
    unknown = {"fixed": "subsets of fixed size", "allocation": "random allocation"}
    if plain.noise != "gaussian" or plain.sampling in unknown:
        what = "Laplace noise" if plain.noise != "gaussian" else unknown[plain.sampling]
        return CrossCheck(accountant=name, epsilon=None, note=f"knows no {what}")
    if plain.relation == "replace" and plain.sample_rate < 1:
        return CrossCheck(accountant=name, epsilon=None, note="knows no Poisson sampling under replace")
    # Without subsampling replace is the same Gaussian with half the noise.
    sigma = plain.noise_multiplier / sensitivity(plain.relation)
    points = _prv_points(replace(plain, noise_multiplier=sigma, relation="add-remove"), delta)
    if points > _PRV_POINTS:
        return CrossCheck(accountant=name, epsilon=None, note=f"not asked: noise this small needs {points:.1g} points")
    from opacus.accountants.prv import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, plain.sample_rate, plain.steps)]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            value = float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))
    except (RuntimeError, ValueError, IndexError, OverflowError) as error:
        return CrossCheck(accountant=name, epsilon=None, note=f"failed: {' '.join(str(error).split())[:120]}")
    if not math.isfinite(value):
        return CrossCheck(accountant=name, epsilon=None, note="failed: no finite number")
    return CrossCheck(accountant=name, epsilon=max(0.0, value))


def _prv_points(event: DpSgd, delta: float) -> float:
    """Points of the grid that Opacus would build: twice its safe range (an RDP eps, plus 3) over its mesh."""
    error = delta / 1000
    widest = rdp_epsilon(event, max(error / 4, 1e-12)) or 0.0
    mesh = PRV_ERROR / math.sqrt(event.steps * math.log(12 / error) / 2)
    return 2 * (widest + 3) / mesh
