"""Trainers that end where their claim does, and what is paid for after a resume."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from attacks.bugs.accounting import ResumeCountsOnce
from attacks.contract import noise, production, resume, sampling
from attacks.contract.bench import NOTHING_STATED, Bench
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Probe
from dpaudit.claims import StepClaim
from tests.attacks.contract.test_training import made
from trainers.adapters.compact import Compact


class Planned(Compact):
    """Refuses a step beyond those it was planned for, as a learning-rate schedule or a loader does."""

    planned = 30

    @property
    def claim(self) -> StepClaim:
        return replace(super().claim, steps=self.planned)

    def step(self, indices: Sequence[int]) -> None:
        if self.step_count >= self.planned:
            raise RuntimeError("the plan is over")
        super().step(indices)


class PlannedShort(Planned):
    """Fewer steps than the contract needs."""

    planned = 10


def test_a_trainer_may_end_where_its_claim_does() -> None:
    bench = Bench(Probe(Planned), NOTHING_STATED)
    found = {check.name: check.status for module in (noise, sampling, production) for check in module.checks(bench)}
    assert "fail" not in found.values()
    passed = {noise.LEVEL, sampling.MARGINALS, sampling.SPREAD, sampling.EPOCH, production.UNSEEDED}
    assert {found[name] for name in passed} == {"pass"}


def test_a_trainer_that_ends_too_early_is_told_how_many_steps_are_needed() -> None:
    with pytest.raises(MethodFailure, match=r"plan is over.*in step 11, and the contract takes 24 steps"):
        made(PlannedShort, noise)


class Forgetful(Planned):
    """Refuses a step that its claim names: that is an error, however far it came."""

    planned = 60

    @property
    def claim(self) -> StepClaim:
        return replace(Compact.claim.fget(self), steps=100)  # type: ignore[attr-defined]


def test_a_claimed_step_that_is_refused_is_an_error() -> None:
    with pytest.raises(MethodFailure, match="in step 61, and the contract takes 100 steps"):
        made(Forgetful, noise)


def test_steps_after_a_resume_are_paid_for() -> None:
    assert made(ResumeCountsOnce, resume)[resume.RESUME_EPSILON].status == "fail"
    assert made(Compact, resume)[resume.RESUME_EPSILON].status == "pass"
