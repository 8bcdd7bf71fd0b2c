"""The claim test: p-values against closed forms and published feasibility figures, labels, coverage, power."""

import numpy as np
import pytest

from dpaudit.analysis import claim as claims
from dpaudit.analysis import simulate
from dpaudit.analysis.claim import Game, claim_test
from dpaudit.bounds import order_statistic
from dpaudit.bounds.profile import GaussianProfile
from dpaudit.documents import Claim
from dpaudit.errors import UsageError


def make(sigma: float | None = 1.0, q: float = 1.0, steps: int = 1, **other: object) -> Claim:
    fields: dict[str, object] = {
        "epsilon": 4.377,
        "delta": 1e-5,
        "relation": "add-remove",
        "unit": "image",
        "noise_multiplier": sigma,
        "sampling": "poisson",
        "sample_rate": q,
        "steps": steps,
    }
    return Claim.model_validate({**fields, **other})


def game(mu: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    scores, inside = simulate.gaussian(1, n, mu, np.random.default_rng(seed))
    return scores[0], inside[0]


# references/auditing.md 7.6: sigma = 1, q = 0.05, T = 200 claimed, errors at their expectation under a true sigma.
@pytest.mark.parametrize(("true_sigma", "value"), [(0.9, 0.041), (0.8, 2.7e-5), (0.7, 6.4e-13)])
def test_published_p_values(true_sigma: float, value: float) -> None:
    claim = make(1.0, 0.05, 200)
    truth = claims.alternative_profile(claim, true_sigma)
    assert truth is not None
    errors = int(1000 * float(truth.error_above(np.array([0.5]))[0]))
    p = [
        Game(1000, 500, 500 - errors - shift).read_by(separate=True).p_value(claims.null_profile(claim))
        for shift in (0, 1)
    ]
    # The expectation is not a whole number of errors: the published value lies about between its neighbours.
    assert 0.8 * p[0] <= value <= 1.25 * p[1]


def test_exactly_one_test_decides_and_says_what_it_states() -> None:
    scores, inside = game(1.0, 1000, 1)
    for separate, bound in ((False, "f-dp"), (True, "order-statistic")):
        tests = claim_test(
            scores, inside, claim=make(), top=250, bottom=250, rng=np.random.default_rng(0), separate=separate
        )
        deciding = [test for test in tests if test.decides]
        assert [test.bound for test in deciding] == [bound]
        assert deciding[0].p_value is not None and deciding[0].assumes == "claimed-mechanism"
        assert all(test.statement for test in tests)
        assert all(test.p_value is None or 0 <= test.p_value <= 1 for test in tests)
        bounds = [test for test in tests if test.epsilon_lower is not None]
        assert {test.assumes for test in bounds} == {"dp-sgd(q,T)"}
        for test in bounds:
            assert test.ceiling is not None and test.epsilon_lower is not None and test.epsilon_lower <= test.ceiling
        statements = [test.statement or "" for test in tests]
        assert any("however the canaries interfere" in text for text in statements) != separate
        assert any("noise multipliers up to" in text for text in statements)
        # No power without a control, and an e-value that refutes by itself exactly when the p-value is clear.
        assert deciding[0].power is None and deciding[0].e_value is not None


def test_single_gaussian_equals_the_closed_form() -> None:
    tests = claim_test(
        *game(1.0, 1000, 2), claim=make(), top=250, bottom=250, rng=np.random.default_rng(0), separate=True
    )
    ordered = next(test for test in tests if test.bound == "order-statistic" and test.p_value is not None)
    assert ordered.guesses is not None and ordered.correct is not None
    direct = order_statistic.p_value(
        GaussianProfile(1.0), canaries=1000, guesses=500, errors=ordered.guesses - ordered.correct
    )
    assert ordered.p_value == pytest.approx(direct, rel=1e-3)


def test_level_and_power() -> None:
    """1,000 ideal canaries, n/2 guesses: a claimed sigma 1.25 times the true one falls in 9 of 10 audits."""
    rng = np.random.default_rng(3)
    claim, null = make(), claims.null_profile(make())
    for ratio, low, high in ((1.0, 0.0, 0.0812), (1.25, 0.88, 1.0)):
        scores, inside = simulate.gaussian(2000, 1000, ratio, rng)
        right = simulate.right_guesses(scores, inside, 250, 250, rng)
        refuted = {int(v): Game(1000, 500, int(v)).read_by(separate=True).p_value(null) < 0.05 for v in set(right)}
        share = np.mean([refuted[int(v)] for v in right])
        # 0.0812: P[Binomial(2000, 0.05) > 162] < 1e-8; 0.88 is five standard errors below the 0.93 expected.
        assert low <= share <= high
    expected = claims.ideal_power(claim, canaries=1000, guesses=500, alpha=0.05, separate=True, alternative=0.8)
    assert expected == pytest.approx(0.93, abs=0.015)


def test_sigma_limit_covers() -> None:
    """True sigma 1: the largest unrefuted sigma lies below it in at most 5 % of games (2000, false alarm < 1e-6)."""
    rng = np.random.default_rng(4)
    scores, inside = simulate.gaussian(2000, 200, 1.0, rng)
    right = simulate.right_guesses(scores, inside, 50, 50, rng)
    event = claims.claimed_event(make())
    assert event is not None
    limits = {
        int(v): claims.dp_sgd.sigma_upper(1.0, 1, Game(200, 100, int(v)).read_by(separate=True), confidence=0.95)
        for v in set(right)
    }
    assert sum(limits[int(v)] < 1.0 for v in right) <= 152


def test_claims_without_a_mechanism() -> None:
    """(eps, delta) alone, or noise that the accountant has no law for: one test that assumes nothing."""
    for claim in (make(None), make(1.0, mechanism="correlated")):
        tests = claim_test(*game(0.0, 200, 5), claim=claim, top=20, bottom=20, rng=np.random.default_rng(0))
        assert [test.assumes for test in tests] == ["none"] and tests[0].decides and tests[0].power is None
        assert tests[0].p_value is not None and tests[0].p_value > 0.001
    with pytest.raises(UsageError, match="epsilon"):
        claim_test(
            *game(0.0, 200, 5),
            claim=make(None, epsilon="inf"),
            top=20,
            bottom=20,
            rng=np.random.default_rng(0),
        )


def test_pure_leak_is_refuted_by_every_route() -> None:
    inside = np.random.default_rng(6).random(400) < 0.5
    for separate in (False, True):
        tests = claim_test(
            inside.astype(float),
            inside,
            claim=make(1.0, 0.05, 200),
            top=100,
            bottom=100,
            rng=np.random.default_rng(0),
            separate=separate,
        )
        assert all(test.p_value < 1e-3 for test in tests if test.p_value is not None)
        lower = [test.epsilon_lower for test in tests if test.epsilon_lower is not None]
        assert min(lower) > 4.766


def test_relations() -> None:
    """Under replace one unit moves 2C, so the same scores speak less against the claim."""
    scores, inside = game(1.4, 600, 7)
    values = []
    for relation in ("add-remove", "zero-out", "replace"):
        tests = claim_test(
            scores, inside, claim=make(relation=relation), top=150, bottom=150, rng=np.random.default_rng(0)
        )
        values.append([test.p_value for test in tests if test.p_value is not None])
    assert values[0] == pytest.approx(values[1])
    assert all(low < high for low, high in zip(values[0], values[2], strict=True))


def test_bad_arguments() -> None:
    scores, inside = game(0.0, 100, 8)
    for field, change in (("alpha", {"alpha": 0.0}), ("top", {"top": 101})):
        arguments = {"claim": make(), "top": 10, "bottom": 10, "rng": np.random.default_rng(0), **change}
        with pytest.raises(UsageError, match=field):
            claim_test(scores, inside, **arguments)  # type: ignore[arg-type]
