"""Faults of one size, one moment, one delta: each is there, and the check that it was written for sees it."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from attacks.bugs import unusual
from attacks.contract import accounting, independence, influence, liveness, noise, production, sampling
from attacks.contract.bench import Bench
from attacks.contract.noise_table import Tables
from attacks.contract.probe import Probe
from attacks.contract.seeds import Draws
from dpaudit.documents import Check
from trainers.adapters.compact import Compact

Checks = Callable[[Bench], Iterable[Check]]


def over_steps(bench: Bench) -> list[Check]:
    return [independence.over_steps(Draws(bench), tables=Tables(Draws(bench)))]


def level(bench: Bench) -> list[Check]:
    return [noise.level(Draws(bench))]


def law(bench: Bench) -> list[Check]:
    return [noise.law(Draws(bench), tables=Tables(Draws(bench)))]


def one(function: Callable[[Bench], Check]) -> Checks:
    return lambda bench: [function(bench)]


EXPECTED: list[tuple[type[Compact], Checks, str]] = [
    (unusual.LateAnneal, level, "all blocks, from step"),
    (unusual.BiasNoiseKept, over_steps, "b1"),
    (unusual.SizesKept, over_steps, "sizes of"),
    (unusual.RowOfTheStepBefore, over_steps, "numbers of noise are those of another place"),
    (unusual.NoiseClamped, law, "values at the largest, 3"),
    (unusual.NoiseOnAGrid, law, "distinct values"),
    (unusual.ToleratedExcess, one(influence.influence), "all parameters times"),
    (unusual.OneSizeDividesByLess, one(influence.additivity), "a batch of 3"),
    (unusual.StaleCopy, one(liveness.gradients_live), "stayed the same"),
    (unusual.BodyDetached, one(liveness.gradients_live), "no unit ever moved b1, w1"),
    (unusual.BlockLost, one(liveness.moves), "w1 after step 7"),
    (unusual.EpsilonEveryTen, one(accounting.epsilon), "after 19 steps"),
    (unusual.EpsilonTableEnds, one(accounting.epsilon), "after 200 steps"),
    (unusual.EpsilonAtOneDelta, one(accounting.epsilon), "at delta = 1e-07"),
    (unusual.PoolInProduction, one(production.unseeded), "the same noise again"),
    (unusual.BiasNoiseKeptInProduction, one(production.unseeded), "numbers are those of another place"),
    (unusual.RowsShareNoiseInProduction, one(production.unseeded), "numbers are those of another place"),
    (unusual.BucketsInProduction, sampling.checks, "without a noise seed"),
]


@pytest.mark.parametrize(("factory", "checks", "words"), EXPECTED, ids=lambda value: getattr(value, "__name__", ""))
def test_its_check_sees_it_and_names_it(factory: Any, checks: Checks, words: str) -> None:
    failed = [check for check in checks(Bench(Probe(factory, seed=1))) if check.status == "fail"]
    assert failed and any(words in check.measured for check in failed), [check.measured for check in failed]


@pytest.mark.parametrize("checks", [over_steps, level, law], ids=lambda value: value.__name__)
def test_a_correct_trainer_passes_the_same(checks: Checks) -> None:
    assert [check.status for check in checks(Bench(Probe(Compact, seed=1)))] == ["pass"]


def test_every_planted_bug_has_a_row_here() -> None:
    assert {factory for factory, *_ in EXPECTED} == {bug.factory for bug in unusual.BUGS}
