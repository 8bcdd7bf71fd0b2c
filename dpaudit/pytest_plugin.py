"""The step contract in a test suite: the fixture `dp_trainer`, there as soon as dpaudit is installed.

    def test_the_step_keeps_the_contract(dp_trainer):
        dp_trainer(factory)            # a list of what failed, if anything did

It works in a repository that has packages named `trainers`, `attacks` or `reports` of its own, and imports nothing but
this module until a test uses it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from dpaudit import extras, packages

if TYPE_CHECKING:
    from dpaudit.documents import CheckDocument


packages.give_way()


class Asserts(Protocol):
    """What the fixture is."""

    def __call__(self, factory: Callable[..., Any], *, seed: int = 0, time_limit: float = 30.0) -> "CheckDocument": ...


def assert_contract(factory: Callable[..., Any], *, seed: int = 0, time_limit: float = 30.0) -> "CheckDocument":
    """Run the step contract; AssertionError with a line a failed check, or when a core check could not be made."""
    with extras.named("dp_trainer"), packages.ours():
        from attacks.contract import check

        document = check(factory, seed=seed, time_limit=time_limit)
    failed = [item for item in document.checks if item.status == "fail"]
    lines = [f"{item.name}: measured {item.measured}; allowed {item.allowed}. {item.explanation}" for item in failed]
    assert not failed, "the step contract fails:\n" + "\n".join(lines)
    assert document.verdict == "pass", (
        "the step contract is inconclusive: a core check could not be made:\n"
        + "\n".join(f"{item.name}: {item.measured}" for item in document.checks if item.status == "not applicable")
    )
    return document


@pytest.fixture
def dp_trainer() -> Asserts:
    """`dp_trainer(factory, *, seed=0, time_limit=30.0)` asserts the step contract and returns its document."""
    return assert_contract
