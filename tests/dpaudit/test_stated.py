"""A claim is computed again from its own parts."""

import time

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dpaudit import stated
from dpaudit.config import resolve
from dpaudit.documents import Claim, EpsilonAt
from dpaudit.verdict import decide


def claim(**fields: object) -> Claim:
    plain = {
        "epsilon": 8.0, "delta": 1e-5, "relation": "add-remove", "unit": "image", "noise_multiplier": 1.0,
        "max_grad_norm": 1.0, "sampling": "full", "sample_rate": 1.0, "steps": 1, "expected_batch_size": 8.0,
    }  # fmt: skip
    return Claim.model_validate(plain | fields)


def gaussian(mu: float, delta: float) -> float:
    """eps of one Gaussian mechanism by its closed form (Balle and Wang 2018), solved here by itself."""
    cost: float = brentq(
        lambda e: norm.cdf(mu / 2 - e / mu) - 2.718281828459045**e * norm.cdf(-mu / 2 - e / mu) - delta, 1e-9, 60
    )
    return cost


@pytest.mark.parametrize(
    ("sigma", "steps", "relation", "mu"),
    [(1.0, 1, "add-remove", 1.0), (2.0, 16, "zero-out", 2.0), (1.5, 9, "replace", 4.0)],
)
def test_cost_is_the_closed_form(sigma: float, steps: int, relation: str, mu: float) -> None:
    exact = gaussian(mu, 1e-5)
    found = stated.cost(claim(noise_multiplier=sigma, steps=steps, relation=relation))
    assert found.epsilon == pytest.approx(exact, rel=2e-3) and found.epsilon >= exact * (1 - 1e-6)
    for factor, fits in ((1.0, True), (0.995, True), (0.98, False), (0.1, False), (2.0, True)):
        stating = claim(noise_multiplier=sigma, steps=steps, relation=relation, epsilon=factor * exact)
        assert (stated.rows(stating) == ()) == fits, factor


def test_every_point_of_the_curve_counts() -> None:
    exact = {delta: gaussian(1.0, delta) for delta in (1e-4, 1e-5, 1e-6)}
    whole = tuple(EpsilonAt(delta=delta, epsilon=1.001 * value) for delta, value in exact.items())
    assert stated.rows(claim(epsilon=1.001 * exact[1e-5], curve=whole)) == ()
    short = (*whole[:2], EpsilonAt(delta=1e-6, epsilon=0.9 * exact[1e-6]))
    (row,) = stated.rows(claim(epsilon=1.001 * exact[1e-5], curve=short))
    assert "delta = 1e-06" in row.evidence and row.status == "UNACCOUNTED"


def test_tokens_that_leave_cost_too() -> None:
    both = gaussian((1.0**2 + 0.5**2) ** 0.5, 1e-5)
    fields = {"relation": "zero-out", "token_multiplier": 2.0}
    assert stated.cost(claim(**fields)).epsilon == pytest.approx(both, rel=2e-3)
    assert stated.rows(claim(epsilon=gaussian(1.0, 1e-5), **fields)) != ()


@pytest.mark.parametrize(
    "fields",
    [{"noise_multiplier": None}, {"steps": None}, {"sampling": None}, {"mechanism": "correlated"},
     {"sampling": "poisson", "sample_rate": None}, {"sampling": "shuffle", "sample_rate": 0.3},
     {"noise": "laplace", "relation": "replace", "sampling": "poisson", "sample_rate": 0.5},
     {"noise_multiplier": -1.0}, {"sample_rate": 7.0, "sampling": "poisson"}, {"noise_multiplier": "inf"},
     {"delta": 1e-300}, {"steps": 10**12}, {"token_multiplier": 1.0}],
    ids=str,
)  # fmt: skip
def test_what_has_no_number_says_why(fields: dict[str, object]) -> None:
    found = stated.cost(claim(**fields))
    assert found.epsilon is None and found.why and found.understated == ()


@pytest.mark.parametrize(
    "fields",
    [{"noise_multiplier": 0.0}, {"noise_multiplier": 1e-9, "steps": 10**6},
     {"noise_multiplier": 0.3, "steps": 10**7, "sampling": "poisson", "sample_rate": 1e-6},
     {"noise_multiplier": 0.01, "steps": 10**6, "sampling": "poisson", "sample_rate": 0.999}],
    ids=str,
)  # fmt: skip
def test_absurd_mechanisms_cost_a_lot_and_no_time(fields: dict[str, object]) -> None:
    began = time.process_time()
    assert stated.rows(claim(epsilon=0.1, **fields))
    assert time.process_time() - began < 30


def test_the_judge_calls_it_unsupported() -> None:
    small = claim(epsilon=2.0)
    verdict, reasons = decide(claim=small, alpha=0.001, games=[], ledger=stated.rows(small))
    assert verdict == "unsupported" and "costs more than the eps" in " ".join(reasons)


def test_a_claim_of_another_configuration() -> None:
    config = resolve({"method": "dp-sgd"}, ["privacy.epsilon=null", "privacy.noise-multiplier=1.0"])
    mine = claim(
        sampling="poisson", sample_rate=0.01, steps=10, relation=config.privacy.relation, delta=config.privacy.delta,
        max_grad_norm=config.privacy.max_grad_norm, expected_batch_size=float(config.training.batch_size),
    )  # fmt: skip
    assert stated.differences(mine, config) == ()
    other = mine.model_copy(update={"noise_multiplier": 2.0, "relation": "replace"})
    assert [text.partition(":")[0] for text in stated.differences(other, config)] == ["relation", "noise-multiplier"]
    assert stated.rows(other, config)[-1].path == stated.CONFIGURATION_ROW
    assert stated.differences(mine, resolve({"method": "non-private"})) != ()
