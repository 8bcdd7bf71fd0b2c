"""The precedence of verdicts, table by table; what may refute, and what may say 'not refuted'."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpaudit import accounting
from dpaudit.claims import StepClaim, claimed_epsilon, decide
from dpaudit.documents import Check, Claim, EpsilonAt, LedgerRow, Test, Validity, Verdict
from dpaudit.errors import UsageError

CLAIM = Claim(epsilon=8.0, delta=1e-5, relation="add-remove", unit="image")
SOUND = Validity(sound=True, checks=())
UNSOUND = Validity(
    sound=False,
    checks=(
        Check(name="blind baseline", status="fail", measured="p=0", allowed="0.001", explanation="It beat chance."),
    ),
)
GAP = LedgerRow(path="vocabulary", status="UNACCOUNTED", explanation="From private answers.", evidence="-")
FINE = LedgerRow(path="gradients", status="accounted", explanation="Clipped and noised.", evidence="-")
BROKEN = Check(name="clipping", status="fail", measured="2C", allowed="C", explanation="Per tile.")
GOOD = Check(name="clipping", status="pass", measured="C", allowed="C", explanation="Per unit.")


def bound(**changes: Any) -> Test:
    """A bound far below the claim, with a ceiling above it and full power."""
    fields: dict[str, Any] = {
        "name": "canaries",
        "statistic": "loss difference",
        "bound": "steinke",
        "assumes": "none",
        "selection": "fixed",
        "confidence": 0.95,
        "delta": 1e-5,
        "n": 1000,
        "guesses": 100,
        "epsilon_lower": 1.0,
        "ceiling": 10.0,
        "power": 0.9,
    }
    return Test(**{**fields, **changes})


def claim_test(p_value: float, **changes: Any) -> Test:
    return bound(bound="claim test", epsilon_lower=None, ceiling=None, p_value=p_value, **changes)


def verdict(tests: list[Test], **changes: Any) -> Verdict:
    arguments: dict[str, Any] = {
        "claim": CLAIM,
        "alpha": 0.001,
        "family_confidence": 0.95,
        "validity": SOUND,
        "tests": tests,
    }
    return decide(**{**arguments, **changes})[0]


REFUTING, QUIET, WEAK = bound(epsilon_lower=9.0), bound(), bound(power=0.5)


@pytest.mark.parametrize(
    "sound, claimed, test, ledger, checks",
    itertools.product(
        (True, False), (True, False), (REFUTING, QUIET, WEAK, None), ([FINE], [FINE, GAP]), ([GOOD], [GOOD, BROKEN])
    ),
)
def test_precedence(
    sound: bool, claimed: bool, test: Test | None, ledger: list[LedgerRow], checks: list[Check]
) -> None:
    """All 64 combinations against the order written in design.md."""
    expected: Verdict
    if not sound:
        expected = "invalid"
    elif not claimed:
        expected = "no claim"
    elif test is REFUTING:
        expected = "refuted"
    elif GAP in ledger or BROKEN in checks:
        expected = "unsupported"
    elif test is QUIET:
        expected = "not refuted"
    else:
        expected = "inconclusive"
    got, reasons = decide(
        claim=CLAIM if claimed else None,
        alpha=0.001,
        family_confidence=0.95,
        validity=SOUND if sound else UNSOUND,
        tests=[test] if test else [],
        ledger=ledger,
        checks=checks,
    )
    assert got == expected
    assert reasons and all(reason and "\n" not in reason for reason in reasons)
    if expected == "invalid":
        assert any("blind baseline" in reason for reason in reasons)
    if expected == "unsupported":
        assert ("vocabulary" in " ".join(reasons)) == (GAP in ledger)
        assert ("clipping" in " ".join(reasons)) == (BROKEN in checks)


@pytest.mark.parametrize(
    "tests, expected",
    [
        ([], "inconclusive"),
        # A bound at its claim does not refute; one above does.
        ([bound(epsilon_lower=8.0)], "not refuted"),
        ([bound(epsilon_lower=8.01)], "refuted"),
        ([bound(epsilon_lower=math.inf, ceiling=math.inf)], "refuted"),
        # Neither estimates nor informative tests decide, in either direction.
        ([bound(epsilon_lower=9.0, estimate=True)], "inconclusive"),
        ([bound(epsilon_lower=9.0, decides=False)], "inconclusive"),
        ([claim_test(0.0, estimate=True)], "inconclusive"),
        ([claim_test(0.0, decides=False)], "inconclusive"),
        # Assumptions beyond the claim's own don't refute it.
        ([bound(epsilon_lower=9.0, assumes="gaussian")], "inconclusive"),
        ([bound(epsilon_lower=9.0, assumes="prior")], "inconclusive"),
        ([bound(epsilon_lower=9.0, assumes="claimed-mechanism")], "refuted"),
        ([bound(epsilon_lower=9.0, assumes="dp-sgd(q,T)")], "refuted"),
        # p-values share alpha.
        ([claim_test(0.001)], "refuted"),
        ([claim_test(0.0011)], "not refuted"),
        ([claim_test(0.0006), claim_test(0.5)], "not refuted"),
        ([claim_test(0.0005), claim_test(0.5)], "refuted"),
        ([claim_test(0.0006), claim_test(0.5, decides=False)], "refuted"),
        ([claim_test(0.0006), bound()], "refuted"),
        # Bounds share 1 - family confidence, evenly or not.
        ([bound(epsilon_lower=9.0), bound()], "not refuted"),
        ([bound(epsilon_lower=9.0, confidence=0.975), bound(confidence=0.975)], "refuted"),
        ([bound(epsilon_lower=9.0, confidence=0.96), bound(confidence=0.99)], "refuted"),
        ([bound(epsilon_lower=9.0, confidence=0.94)], "not refuted"),
        ([bound(epsilon_lower=9.0, confidence=0.99), *[bound(confidence=0.5)] * 4], "refuted"),
        # delta: (eps, delta) holds at larger delta too, and says nothing at a smaller one.
        ([bound(epsilon_lower=9.0, delta=1e-4)], "refuted"),
        ([bound(epsilon_lower=9.0, delta=1e-6)], "inconclusive"),
        # Power and ceilings.
        ([bound(power=None)], "inconclusive"),
        ([bound(power=0.79)], "inconclusive"),
        ([bound(power=0.8)], "not refuted"),
        ([bound(power=0.99, ceiling=8.0)], "inconclusive"),
        ([bound(power=0.99, ceiling=None)], "inconclusive"),
        ([bound(power=0.1), claim_test(0.3, power=0.95)], "not refuted"),
        ([bound(power=0.9, decides=False)], "inconclusive"),
    ],
)
def test_what_decides(tests: list[Test], expected: Verdict) -> None:
    assert verdict(tests) == expected


def test_reasons_tell_the_numbers() -> None:
    arguments: dict[str, Any] = {"claim": CLAIM, "alpha": 0.001, "family_confidence": 0.95, "validity": SOUND}
    _, reasons = decide(**arguments, tests=[bound(epsilon_lower=9.5), claim_test(1e-9)], ledger=[GAP])
    text = " ".join(reasons)
    assert "9.50" in text and "8.00" in text and "1e-09" in text and "vocabulary" in text
    _, reasons = decide(**arguments, tests=[bound(ceiling=2.5)])
    assert "2.50" in " ".join(reasons) and "more canaries" in " ".join(reasons)
    _, reasons = decide(**arguments, tests=[bound()])
    assert "no proof of privacy" in " ".join(reasons)


def test_claimed_epsilon_takes_the_curve() -> None:
    claim = CLAIM.model_copy(update={"curve": (EpsilonAt(delta=1e-7, epsilon=9.5), EpsilonAt(delta=1e-3, epsilon=5.0))})
    assert claimed_epsilon(claim, 1e-8) is None
    assert claimed_epsilon(claim, 1e-7) == 9.5
    assert claimed_epsilon(claim, 1e-5) == 8.0
    assert claimed_epsilon(claim, 1e-3) == 5.0
    assert verdict([bound(epsilon_lower=6.0, delta=1e-3)], claim=claim) == "refuted"
    assert verdict([bound(epsilon_lower=9.0, delta=1e-6)], claim=claim) == "not refuted"


@given(
    st.lists(
        st.builds(
            bound,
            epsilon_lower=st.none() | st.floats(0, 8),
            p_value=st.none() | st.floats(0.0011, 1),
            power=st.none() | st.floats(0, 1),
            confidence=st.floats(0.5, 0.999),
            ceiling=st.none() | st.floats(0, 20),
            decides=st.booleans(),
            estimate=st.booleans(),
        ),
        max_size=6,
    )
)
def test_nothing_below_the_claim_ever_refutes(tests: list[Test]) -> None:
    assert verdict(tests) in ("not refuted", "inconclusive")


def step_claim(**changes: Any) -> StepClaim:
    fields: dict[str, Any] = {
        "mechanism": "gaussian",
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.1,
        "sampling": "poisson",
        "sample_rate": 0.2,
        "expected_batch_size": 32,
        "relation": "add-remove",
        "unit": "image",
        "steps": 10,
        "delta": 1e-5,
    }
    return StepClaim(**{**fields, **changes})


@pytest.mark.parametrize(
    "field, values",
    [
        ("mechanism", ["Gaussian", None, 3]),
        ("sampling", ["shuffled", None]),
        ("relation", ["add/remove", None]),
        ("max_grad_norm", [0, -1, math.inf, math.nan, "1", None, True]),
        ("noise_multiplier", [-0.1, math.nan, math.inf, None]),
        ("sample_rate", [0, 1.01, math.nan, None]),
        ("expected_batch_size", [0, -3, math.inf, None]),
        ("unit", ["", None, 3]),
        ("steps", [0, -1, 1.5, True]),
        ("delta", [0, 1, math.nan, "1e-5"]),
    ],
)
def test_a_foreign_claim_is_checked_field_by_field(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UsageError) as caught:
            step_claim(**{field: value})
        message = str(caught.value)
        assert message.startswith(f"claim.{field}: got") and "accepted" in message and "\n" not in message


def test_the_event_of_a_step_claim() -> None:
    assert step_claim().event() == accounting.DpSgd(1.1, 0.2, 10, "add-remove")
    assert step_claim().event(3) == accounting.DpSgd(1.1, 0.2, 3, "add-remove")
    assert step_claim(sampling="full").event() == accounting.DpSgd(1.1, 1.0, 10, "add-remove")
    # Poisson eps must never be quoted for other samplers or mechanisms.
    for change in ({"sampling": "shuffle"}, {"sampling": "fixed"}, {"mechanism": "laplace"}, {"steps": None}):
        assert step_claim(**change).event() is None
