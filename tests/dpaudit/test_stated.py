"""A claim is computed again from its own parts."""

import time

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dpaudit import stated
from dpaudit.config import resolve
from dpaudit.documents import Claim, EpsilonAt, LedgerDocument, Spent
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
        sampling="poisson", sample_rate=256 / 1000, steps=78, candidates=1000,
        relation=config.privacy.relation, delta=config.privacy.delta,
        max_grad_norm=config.privacy.max_grad_norm, expected_batch_size=float(config.training.batch_size),
    )  # fmt: skip
    assert stated.differences(mine, config) == ()
    other = mine.model_copy(update={"noise_multiplier": 2.0, "relation": "replace"})
    assert [text.partition(":")[0] for text in stated.differences(other, config)] == ["relation", "noise-multiplier"]
    assert stated.rows(other, config)[-1].path == stated.CONFIGURATION_ROW
    spent = Spent(steps_started=3, steps_planned=4, epsilon=None, delta=1e-5)
    row = stated.rows(mine, config, ledger=LedgerDocument(coins_sha256=None, rows=(), spent=spent))[-1]
    assert "78 are claimed, the ledger plans 4" in row.evidence
    assert stated.differences(mine, resolve({"method": "non-private"})) != ()


CONFIGURED = ["privacy.epsilon=8", "training.steps=6", "training.batch-size=256"]
WHOLE = {
    "sampling": "poisson", "sample_rate": 256 / 1000, "steps": 6, "expected_batch_size": 256.0, "candidates": 1000,
    "noise_multiplier": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"mechanism": "correlated"}, "mechanism"), ({"mechanism": "zeroth-order"}, "mechanism"),
     ({"mechanism": "laplace"}, "mechanism"), ({"noise": "laplace"}, "noise"), ({"sample_rate": None}, "sample-rate"),
     ({"sample_rate": 0.02}, "sample-rate"), ({"sample_rate": 0.0}, "sample-rate"),
     ({"sample_rate": 5.0}, "sample-rate"),
     ({"sample_rate": 1e-300}, "sample-rate"), ({"candidates": None}, "candidates"), ({"candidates": 3}, "candidates"),
     ({"candidates": 12800, "steps": 6}, "sample-rate"), ({"token_multiplier": 1e-9}, "token-multiplier"),
     ({"steps": 10**12}, "steps"), ({"steps": None}, "steps"), ({"sampling": "full"}, "sampling")],
    ids=str,
)  # fmt: skip
def test_every_part_of_a_claim_is_the_configured_one(fields: dict[str, object], field: str) -> None:
    config = resolve({"method": "dp-sgd"}, CONFIGURED)
    assert stated.rows(claim(**WHOLE), config) == ()
    found = stated.rows(claim(**(WHOLE | fields)), config)
    assert any(row.path == stated.CONFIGURATION_ROW and f"{field}: " in row.evidence for row in found), found


@pytest.mark.parametrize("sigma", [None, "inf", -3.0])
def test_a_claim_without_a_price_is_unsupported(sigma: object) -> None:
    """eps is what the configuration wants, and nothing says that the noise pays for it."""
    config = resolve({"method": "dp-sgd"}, CONFIGURED)
    stating = claim(**(WHOLE | {"noise_multiplier": sigma}))
    (row,) = stated.rows(stating, config)
    assert row.path == stated.COST_ROW and "can't be computed" in row.explanation and row.evidence
    assert decide(claim=stating, alpha=0.001, games=[], ledger=(row,))[0] == "unsupported"
    assert stated.rows(stating) == (), "the claim of a foreign trainer may be an eps alone"


def test_declared_sizes_and_epochs_decide_q_and_t() -> None:
    config = resolve({"method": "dp-sgd"}, ["data.public-size=940", "canaries.count=60", "training.epochs=2"])
    assert stated.differences(claim(**(WHOLE | {"steps": 8})), config) == ()
    assert "steps: 6 is claimed" in "; ".join(stated.differences(claim(**WHOLE), config))
    more = claim(**(WHOLE | {"candidates": 2000, "sample_rate": 256 / 2000, "steps": 16}))
    assert [text.partition(":")[0] for text in stated.differences(more, config)] == [
        "candidates",
        "sample-rate",
        "steps",
    ]


def test_a_claim_taken_out_is_missed() -> None:
    private, plain = resolve({"method": "dp-sgd"}), resolve({"method": "non-private"})
    assert stated.rows(None, plain) == stated.rows(None) == ()
    for found in (stated.rows(None, private), stated.rows(None, plain, named=True), stated.rows(None, named=True)):
        assert decide(claim=None, alpha=0.001, games=[], ledger=found)[0] == "unsupported"
    assert decide(claim=None, alpha=0.001, games=[], ledger=())[0] == "no claim"


@pytest.mark.parametrize("fields", [{"steps": 10**8}, {"sample_rate": 1e-300, "sampling": "poisson"}], ids=str)
def test_figures_beyond_any_accountant_end_in_words(fields: dict[str, object]) -> None:
    found = stated.cost(claim(**fields))
    assert (found.epsilon is None and found.why) or found.epsilon >= 0  # type: ignore[operator]


def test_a_curve_has_few_points() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        claim(curve=[{"delta": 1e-5, "epsilon": 8.0}] * 65)
