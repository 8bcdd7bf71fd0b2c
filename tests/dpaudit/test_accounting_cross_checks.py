"""Every accountant under every relation: against the Gaussian's closed form, and against each other for Poisson."""

import math

import pytest

from dpaudit import accounting
from dpaudit.accounting import DpSgd
from dpaudit.documents import Relation

RELATIONS: tuple[Relation, ...] = ("add-remove", "zero-out", "replace")
MU = {"add-remove": 1.0, "zero-out": 1.0, "replace": 2.0}
DELTA = 1e-5


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("sigma, steps", [(1.3, 1), (6.0, 25)])
def test_every_accountant_against_the_closed_form(relation: Relation, sigma: float, steps: int) -> None:
    """T full-batch Gaussians are one with mu = (C or 2C) sqrt(T) / sigma; a wrong convention doubles or halves mu."""
    truth = accounting.gaussian_epsilon(MU[relation] * math.sqrt(steps) / sigma, DELTA)
    event = DpSgd(sigma, 1.0, steps, relation)
    assert truth - 1e-9 <= accounting.epsilon(event, DELTA) <= truth + 2e-4 * max(1.0, truth)
    prv = accounting.prv_epsilon(event, DELTA)
    assert prv is not None and truth <= prv <= truth + 0.013
    renyi = accounting.rdp_epsilon(event, DELTA)
    assert renyi is not None and truth - 1e-9 <= renyi <= 1.1 * truth + 0.1


@pytest.mark.parametrize("relation", ["add-remove", "zero-out"])
@pytest.mark.parametrize("sigma, rate, steps", [(1.0, 0.01, 1000), (4.0, 0.3, 80)])
def test_accountants_agree_on_poisson_batches(relation: Relation, sigma: float, rate: float, steps: int) -> None:
    event = DpSgd(sigma, rate, steps, relation)
    number = accounting.epsilon(event, DELTA)
    prv = accounting.prv_epsilon(event, DELTA)
    assert prv is not None and number - 1e-4 <= prv <= number + 0.011  # its bound lies 0.01 above its estimate
    renyi = accounting.rdp_epsilon(event, DELTA)
    assert renyi is not None and number <= renyi <= 1.3 * number


def test_what_an_accountant_does_not_know_it_does_not_answer() -> None:
    checks = {
        event: [(check.epsilon is None, bool(check.note)) for check in accounting.cross_check(event, DELTA)]
        for event in (
            DpSgd(1.0, 0.1, 10, "replace"),
            DpSgd(9.0, 0.1, 10, "add-remove", "laplace"),
            DpSgd(3.0, 0.1, 10, "replace", sampling="fixed"),
        )
    }
    assert list(checks.values()) == [[(True, True)] * 2, [(True, True)] * 2, [(False, False), (True, True)]]
    small = accounting.cross_check(DpSgd(0.05, 0.01, 1000), DELTA)[1]
    assert small.epsilon is None and "points" in small.note  # Opacus would ask for gigabytes here
    assert [check.epsilon for check in accounting.cross_check(DpSgd(0.0, 0.1, 10), DELTA)] == [math.inf, math.inf]
    assert [check.accountant.split()[-1] for check in accounting.cross_check(DpSgd(2.0, 1.0, 1), DELTA)] == [
        "RDP",
        "PRV",
    ]
