"""Planted bugs are caught by the check that is meant for them; correct trainers are not, and the game agrees."""

import functools
import inspect

import pytest
from scipy.stats import binom

from attacks.bugs import (
    accounting,
    alternating,
    clipping,
    dead,
    hidden_state,
    isolation,
    late_clipping,
    late_noise,
    noise,
    physical_batches,
    probes,
    production,
    sampling,
    structured,
    unusual,
    updates,
)
from attacks.bugs.bases_opacus import OpacusLoop
from attacks.bugs.benchmark import BugRow, document, run_bug
from attacks.bugs.controls import CONTROLS
from attacks.bugs.game import ALPHA, release_game
from attacks.bugs.table import BUGS, bug
from attacks.contract import check_names
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe
from tests.contract import one
from trainers.adapters import compact, zeroth_order
from trainers.adapters.compact import Compact

# One bug a check at least, with the check that exists for it. benchmarks/planted_bugs.py runs all of them.
EXPECTED = {
    "batch-mean-clipped": "clipping per unit",
    "microbatch-clipped": "influence of one unit",
    "clipped-upwards": "clipping never scales up",
    "per-layer-clipped": "injected gradient",
    "half-precision-norm": "influence of one unit",
    "nan-passes": "extreme record contained",
    "nan-replaced-too-late": "influence of a replaced unit",
    "questions-clipped": "influence of one unit",
    "repeats-counted": "repeated unit",
    "token-mean-loss": "others unmoved",
    "data-set-statistics": "records outside the batch",
    "stale-gradient": "nothing carried over",
    "sigma-without-c": "noise level",
    "same-noise-every-step": "noise over steps",
    "same-noise-every-block": "noise over parameters",
    "broadcast-noise": "noise within a parameter",
    "uniform-noise": "noise law",
    "noise-follows-data": "noise independent of data",
    "head-without-noise": "every trained parameter noised",
    "actual-batch-size": "normalisation",
    "private-size": "claim is public",
    "empty-faked": "empty batch",
    "resume-replays-noise": "noise after a resume",
    "clean-mask": "update mask sees noise only",
    "clean-mask-hidden": "update mask leaks no more than claimed",
    "only-kept-noised": "noised blocks don't follow data",
    "clean-second-moment": "update follows the released gradient",
    "clean-momentum": "update follows the released gradient",
    "shuffled-as-poisson": "repeats within an epoch",
    "fixed-as-poisson": "spread of batch sizes",
    "with-replacement": "repeats within a batch",
    "sampler-sees-data": "sampling rate of each unit",
    "one-step-less": "eps reported",
    "poisson-epsilon-for-shuffle": "eps reported",
    "shuffled-as-allocated": "spread of batch sizes",
    "allocation-epsilon-for-shuffle": "eps reported",
    "allocated-once-more": "repeats within an epoch",
    "shared-allocation": "repeats within an epoch",
    "allocated-for-good": "sampling rate of each unit",
    "rotated-allocation": "repeats within an epoch",
    "resume-forgets": "eps after a resume",
}


@pytest.mark.filterwarnings("ignore")  # a bug may divide by zero
@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_bug_is_caught_by_its_check(name: str) -> None:
    row = bug(name)
    assert one(row.factory, EXPECTED[name], target=row.target).status == "fail"


@functools.cache
def found(name: str) -> BugRow:
    """By the whole contract, in this process."""
    return run_bug(bug(name), game=False)


def test_a_row_says_which_checks_found_it() -> None:
    row = found("batch-mean-clipped")
    assert "clipping per unit" in row.contract and row.verdict == "fail"
    assert row.caught and row.why_not is None


def test_every_other_check_has_a_bug_that_only_it_was_made_for() -> None:
    """The others have their faults in tests/attacks/contract."""
    elsewhere = {
        "moves along the public line",
        "equal parameters, equal release",
        "noise without a seed",
        "batches without a seed",
        "every released block moves",
        "gradients follow the parameters",
        "parameters after a resume",
        "eps claimed",
    }
    assert set(check_names()) - set(EXPECTED.values()) <= elsewhere


@pytest.mark.parametrize("name", [row.name for row in BUGS if row.out_of_reach])
def test_what_is_out_of_reach_is_reported_as_missed(name: str) -> None:
    row = found(name)
    assert not row.caught and row.why_not


def test_the_table_holds_every_planted_class_once_with_a_source() -> None:
    first = (clipping, isolation, noise, updates, sampling)
    rare = (probes, accounting, unusual, alternating, structured)
    later = (late_noise, late_clipping, physical_batches, production, hidden_state, dead, *rare)
    planted = {
        value
        for module in (*first, *later)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Compact | OpacusLoop) and value.__module__ == module.__name__
    }
    listed = [row.factory for row in BUGS if not row.slow]
    assert set(listed) == planted and len(listed) == len(set(listed))
    assert len({row.name for row in BUGS}) == len(BUGS) >= 150
    for row in BUGS:
        assert row.source and row.what.endswith(".") and row.catalogue.startswith("B") and row.kind
    for row in (row for module in later for row in module.BUGS):
        assert row.effect and row.seen_by and row.factory.__module__ in {module.__name__ for module in later}
    assert {row.kind for row in BUGS if not row.violation} == {
        "nothing happened",
        "one size, one moment, one delta",
        "between draws and steps, between two units, behind the release",
    }
    assert len(CONTROLS) >= 5


def test_document_counts_what_was_caught() -> None:
    rows = [found(name) for name in ("batch-mean-clipped", "weak-generator")]
    result = document(rows)
    assert (result.caught, result.caught_by_contract, len(result.bugs)) == (1, 1, 2)
    assert type(result).model_validate_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("violation", "outcome", "contract", "stopped"),
    [
        (True, "fail", ("noise level",), True),
        (True, "inconclusive", (), False),
        (True, "pass", (), False),
        (False, "inconclusive", (), True),
        (False, "pass", (), False),
        (False, None, (), False),
    ],
)
def test_where_nothing_leaks_only_a_pass_is_a_miss(
    violation: bool, outcome: str | None, contract: tuple[str, ...], stopped: bool
) -> None:
    row = BugRow(
        name="one",
        catalogue="B41",
        what="Nothing.",
        source="test",
        violation=violation,
        verdict=outcome,
        caught=stopped,
        contract=contract,
        isolation=False,
        game_p=None,
        game=False,
        seconds=0.0,
    )
    assert row.stopped is stopped and document([row]).caught_by_contract == stopped


@pytest.mark.parametrize(
    ("name", "caught"), [("no-noise", True), ("per-layer-clipped", True), ("one-step-less", False)]
)
def test_the_release_game_sees_steps_and_nothing_else(name: str, caught: bool) -> None:
    probe = Probe(bug(name).factory)
    assert release_game(probe, Bench(probe)).caught is caught


@pytest.mark.parametrize("factory", [compact.dp_sgd, compact.laplace, zeroth_order.dp_zo])
def test_the_release_game_is_valid_on_correct_trainers(factory: type) -> None:
    """Level 1e-3 a game; 3 games each: more than 2 alarms have probability below 1e-6."""
    results = []
    for seed in range(3):
        probe = Probe(factory, seed=seed)
        results.append(release_game(probe, Bench(probe), seed=seed))
    assert all(result.played for result in results)
    assert sum(result.caught for result in results) <= binom.ppf(1 - 1e-6, 3, ALPHA)
