"""What a trainer may claim about its steps."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dpaudit import accounting
from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError


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
        ("epoch_steps", [0, 1.5, True, 10]),  # the last: for Poisson batches
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
    allocated = accounting.DpSgd(1.1, 0.2, 10, "add-remove", sampling="allocation")
    assert step_claim(sampling="allocation").event() == allocated
    assert step_claim(sampling="allocation", epoch_steps=10).event() == replace(allocated, epoch=10)
    for change in ({"sample_rate": 0.3}, {"relation": "replace"}, {"epoch_steps": 7}):
        with pytest.raises(UsageError):
            step_claim(sampling="allocation", **change)
    # Poisson eps must never be quoted for other samplers or mechanisms.
    for change in ({"sampling": "shuffle"}, {"sampling": "fixed"}, {"mechanism": "laplace"}, {"steps": None}):
        assert step_claim(**change).event() is None
