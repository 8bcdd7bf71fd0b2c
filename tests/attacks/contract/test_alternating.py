"""Faults between draws and steps, between two units, in production behind the release: each is seen, by its check."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from attacks.bugs import alternating, correct_updates
from attacks.contract import (
    CORE,
    accounting,
    equal,
    liveness,
    resume,
    rules,
    sampling,
    training,
    units,
    updates,
    verdict,
)
from attacks.contract.bench import Bench
from attacks.contract.probe import Probe
from attacks.contract.result import judged, skipped
from dpaudit.documents import Check
from trainers.adapters.compact import SHAPES, Adam, Compact, FixedSize, Pruned

Checks = Callable[[Bench], Iterable[Check]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine may not decide what is looked at."""
    monkeypatch.setattr(training, "FAST", 10.0)
    monkeypatch.setattr(equal, "SECONDS", 1e6)


def one(function: Callable[[Bench], Check]) -> Checks:
    return lambda bench: [function(bench)]


EXPECTED: list[tuple[type[Compact], Checks, str, str]] = [
    (alternating.LargestComesAgain, sampling.checks, sampling.EPOCH, "while it trains"),
    (alternating.RateGrowsWithSteps, sampling.checks, sampling.MARGINALS, "while it trains"),
    (alternating.CoupledPair, sampling.checks, sampling.SPREAD, "units 1 and 2 together in"),
    (alternating.RateOfPrivateSize, sampling.checks, sampling.MARGINALS, "with half of the records: mean rate"),
    (alternating.CleanMeanInProduction, one(updates.update_rule), updates.RULE, "without a noise seed"),
    (alternating.CleanMaskInProduction, one(updates.mask), updates.MASK, "of 19 were not applied"),
    (alternating.StandsStillInProduction, one(liveness.moves), liveness.MOVES, "without a noise seed"),
    (alternating.OtherEpsilonInProduction, accounting.checks, accounting.EPSILON, "without a noise seed and"),
    (alternating.ResumedNoiseAgain, resume.checks, resume.RESUME_NOISE, "without a seed correlation 1 "),
    (alternating.LionOfCleanSums, one(updates.update_rule), updates.RULE, "after equal releases"),
    (alternating.AdagradOfCleanSums, one(updates.update_rule), updates.RULE, "after equal releases"),
    (alternating.LessNoiseApplied, one(updates.update_rule), updates.RULE, "after equal releases"),
    (alternating.EpsilonEndsWithThePlan, accounting.checks, accounting.EPSILON, "after 240 steps"),
]


@pytest.mark.parametrize(
    ("factory", "checks", "name", "words"), EXPECTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_its_check_sees_it_and_names_it(factory: Any, checks: Checks, name: str, words: str) -> None:
    failed = {check.name: check.measured for check in checks(Bench(Probe(factory, seed=1))) if check.status == "fail"}
    assert words in failed.get(name, ""), failed


def test_every_planted_bug_has_a_row_here() -> None:
    assert {factory for factory, *_ in EXPECTED} == {bug.factory for bug in alternating.BUGS}


MODULES: list[Checks] = [sampling.checks, resume.checks, accounting.checks, one(updates.mask), one(liveness.moves)]


def test_a_correct_trainer_passes_the_same() -> None:
    bench = Bench(Probe(Pruned, seed=1))
    assert {check.status for checks in MODULES for check in checks(bench)} <= {"pass", "not applicable"}


def test_fixed_batches_of_coupled_units_are_seen() -> None:
    """Two units that are always in or out together, in batches of one size; independent ones pass."""

    class Coupled(FixedSize):
        def sample(self) -> list[int]:
            size, pair = int(self.expected_batch_size), self.sampler.random() < 0.1
            others = self.sampler.choice(np.arange(2, len(self.records)), size=size - 2 * pair, replace=False)
            return sorted([0, 1] * pair + [int(index) for index in others])

    for factory, status in ((Coupled, "fail"), (FixedSize, "pass")):
        found = {check.name: check for check in sampling.checks(Bench(Probe(factory, seed=1)))}
        assert found[sampling.SPREAD].status == status, found[sampling.SPREAD].measured


def test_pairs_are_counted_as_by_hand() -> None:
    """p against all pairs one by one, with the two-sided binomial tail."""
    bench = Bench(Probe(Compact, seed=1))
    drawn = np.random.default_rng(3).random((300, 12)) < 0.2
    p, _ = sampling.together(bench, drawn, 0.04)
    tails = []
    for a, b in itertools.combinations(range(12), 2):
        count = int((drawn[:, a] & drawn[:, b]).sum())
        tails.append(2 * min(binom.cdf(count, 300, 0.04), binom.sf(count - 1, 300, 0.04)))
    assert p == pytest.approx(min(1.0, 66 * min(1.0, *tails)))


class Lion(Compact):
    """Correct, and a rule that is not learned."""

    def update(self, noisy: torch.Tensor, clean_sum: torch.Tensor) -> None:
        self.updated = set(SHAPES)
        self.weights = self.weights - 0.01 * torch.sign(0.9 * self.velocity + 0.1 * noisy)
        self.velocity = 0.99 * self.velocity + 0.01 * noisy


class NoInjection(Lion):
    """Nothing can be injected: no two trainings have equal releases."""

    inject = None  # type: ignore[assignment]


class ClippedAgain(Adam):
    """Correct: the whole noisy mean is clipped to 1 before Adam, as a Trainer with max_grad_norm does."""

    inject = None  # type: ignore[assignment]

    def update(self, noisy: torch.Tensor, clean_sum: torch.Tensor) -> None:
        super().update(noisy * min(1.0, 1.0 / float(noisy.norm())), clean_sum)


@pytest.mark.parametrize("factory", [Lion, correct_updates.RateFollowsNoisy, ClippedAgain])
def test_rules_of_any_kind_are_judged_late_in_the_training(factory: Any) -> None:
    found = updates.update_rule(Bench(Probe(factory, seed=1)))
    assert found.status == "pass" and "steps 1 to 24" in found.measured, found.measured


def test_releases_of_the_second_training_are_those_of_the_first() -> None:
    """What is compared is worth it: every step of all trainings is reached, for all blocks."""
    bench = Bench(Probe(Lion, seed=1))
    found = list(equal.misses(bench, covered=False))
    assert len(found) == 3 * len(SHAPES) and {miss.last for miss in found} <= set(range(rules.LATE, 25))
    assert max(miss.gap for miss in found) < 0.5


def test_a_rule_that_was_judged_in_its_first_step_alone_is_no_pass() -> None:
    found = updates.update_rule(Bench(Probe(NoInjection, seed=1)))
    assert found.status == "not applicable" and "step 1 alone" in found.measured, found.measured
    core = [judged(name, True, "", "", "") for name in CORE]
    line = skipped(updates.LINE, "not a zeroth-order mechanism", "")
    assert verdict((*core, found, line)) == "inconclusive"
    assert verdict((*core, found, judged(updates.LINE, True, "", "", ""))) == "pass"


def test_a_trainer_that_clips_below_c_is_no_failure() -> None:
    class Half(Compact):
        def clip(self, gradients: torch.Tensor) -> torch.Tensor:
            return super().clip(2 * gradients) / 2

    class Lost(Compact):
        def inject(self, gradient: Any) -> None:
            """Nothing arrives."""

    assert units.injected(Bench(Probe(Half, seed=1))).status == "not applicable"
    assert units.injected(Bench(Probe(Lost, seed=1))).status == "fail"


def test_a_trainer_that_stops_at_its_plan_is_no_failure() -> None:
    """A budget may end where the training was planned to end: its eps there is what counts."""

    class Stops(Compact):
        def step(self, indices: Any) -> None:
            if self.step_count == self.steps:
                raise RuntimeError("budget spent")
            super().step(indices)

    assert accounting.epsilon(Bench(Probe(Stops, seed=1))).status == "pass"
