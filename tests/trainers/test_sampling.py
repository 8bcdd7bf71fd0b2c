"""Batches of every scheme: laws, empty places, what a claim and a ledger say, and the step contract on the result."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy.stats import binom

from attacks.audit import Options
from attacks.contract import sampling
from attacks.contract.accounting import EPSILON, epsilon
from attacks.contract.bench import Bench
from attacks.contract.draws import draw
from attacks.contract.guard import TIME_LIMIT
from attacks.contract.probe import Probe
from attacks.games.twins import play_white_box
from attacks.options import prepare
from attacks.training import start_run
from dpaudit import accounting
from dpaudit.accounting import DpSgd, Scheme
from dpaudit.analysis.claim import claimed_event
from dpaudit.config import resolve
from dpaudit.documents import Check, ClaimDocument, LedgerDocument
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.adapters.vlm import VlmTrainer, factory_for
from trainers.plan import make_plan
from trainers.protocol import Trainer
from trainers.records import Dataset, Unit
from trainers.sampling import Sampler

KEY = Key.from_seed(11)
SIGMA = "privacy.noise-multiplier=1"


def small(units: int = 24) -> Dataset:
    return Dataset("random", "image (with all its questions)", random_units(units), random_units(4, seed=9, prefix="t"))


def settings(tiny: Path, scheme: str, *extra: str) -> list[str]:
    return [
        f"model.path={tiny}", "seed=1", "training.batch-size=8", "training.steps=6", "model.lora.rank=2",
        "model.device=cpu", f"training.sampling={scheme}", *extra,
    ]  # fmt: skip


def test_a_fixed_batch_is_a_uniform_subset_of_the_places() -> None:
    sampler, draws = Sampler("fixed", places=5, size=2), 4000
    seen = [tuple(sampler.batch(KEY, step=step, units=5).tolist()) for step in range(1, draws + 1)]
    for pair in itertools.combinations(range(5), 2):  # false alarm below 1e-6 in all
        low, high = binom.ppf(5e-9, draws, 0.1), binom.ppf(1 - 5e-9, draws, 0.1)
        assert low <= seen.count(pair) <= high
    assert len(set(seen)) == 10


def test_a_shuffled_epoch_takes_every_unit_once_in_an_order_of_its_own() -> None:
    sampler = Sampler("shuffle", places=10, size=4)
    assert (sampler.batches, sampler.rate, sampler.steps(2.0)) == (3, 1 / 3, 6)
    orders = []
    for epoch in range(200):
        batches = [sampler.batch(KEY, step=3 * epoch + turn + 1, units=10) for turn in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(np.concatenate(batches).tolist()) == list(range(10))
        orders.append(tuple(batches[0].tolist()))
    first = np.array([0 in order for order in orders])
    assert binom.ppf(5e-8, 200, 0.4) <= first.sum() <= binom.ppf(1 - 5e-8, 200, 0.4)


@pytest.mark.parametrize("scheme", ["fixed", "shuffle"])
def test_an_absent_unit_leaves_its_place_empty_and_moves_nobody(scheme: Scheme) -> None:
    sampler = Sampler(scheme, places=12, size=5)
    for step in range(1, 40):
        whole = sampler.batch(KEY, step=step, units=12)
        assert sampler.batch(KEY, step=step, units=11).tolist() == [unit for unit in whole if unit != 11]
        assert sampler.batch(KEY, step=step, units=0).size == 0
    with pytest.raises(ValueError, match="13 units don't fit"):
        sampler.batch(KEY, step=1, units=13)


def test_the_plan_accounts_for_its_scheme_and_says_so(tiny: Path, tmp_path: Path) -> None:
    sigmas = {}
    for scheme in ("poisson", "fixed", "shuffle"):
        plan = make_plan(resolve({}, settings(tiny, scheme)), small(), 4)  # 28 candidates, batches of 8
        assert plan.claim is not None and plan.claim.sampling == scheme
        rate = 1 / 4 if scheme == "shuffle" else 8 / 28
        assert plan.event == DpSgd(plan.noise_multiplier, rate, 6, sampling=scheme)
        assert accounting.epsilon(plan.event, 1e-5) <= 8 and plan.epsilon_after(6) == accounting.epsilon(
            plan.event, 1e-5
        )
        sigmas[scheme] = plan.noise_multiplier
    assert sigmas["poisson"] < sigmas["shuffle"] < sigmas["fixed"]
    run = start_run(resolve({}, settings(tiny, "shuffle")), tmp_path / "run", dataset=small())
    document = ClaimDocument.read(run.claim)
    row = next(row for row in LedgerDocument.read(run.ledger).rows if row.path == "gradients")
    assert document.claim is not None and document.claim.sampling == "shuffle"
    assert "shuffled epochs of 3 batches" in row.evidence and "without amplification" in row.evidence
    assert [check.accountant.split()[-1] for check in document.cross_checks] == ["RDP", "PRV"]
    assert all(check.epsilon is not None and check.epsilon >= 7.99 for check in document.cross_checks)


@pytest.mark.parametrize("scheme", ["fixed", "shuffle"])
def test_games_that_rest_on_poisson_batches_refuse(tiny: Path, tmp_path: Path, scheme: Scheme) -> None:
    config = resolve({}, settings(tiny, scheme, SIGMA))
    run = start_run(config, tmp_path / "run", dataset=small())
    with pytest.raises(UsageError, match=f"^--white-box: training.sampling={scheme}; accepted: poisson"):
        prepare(run, Options(audits=("white-box",)))
    with pytest.raises(UsageError, match=r"^--white-box: training.sampling"):
        few = config.model_copy(update={"data": config.data.model_copy(update={"limit": 10})})
        play_white_box(few, tmp_path / "twin", count=4, confidence=0.95, alpha=0.001)
    claim = ClaimDocument.read(run.claim).claim
    assert claim is not None
    event = claimed_event(claim)
    # The claim test knows shuffled epochs as full batches, and fixed-size batches as (eps, delta) alone.
    sigma = claim.noise_multiplier
    assert event == (DpSgd(float(sigma or 0), 1.0, 2) if scheme == "shuffle" else None)
    assert claimed_event(claim.model_copy(update={"sample_rate": 0.3, "sampling": "shuffle"})) is None


def test_a_declared_size_below_the_data_is_refused_where_places_are_public(tiny: Path) -> None:
    for scheme in ("fixed", "shuffle"):
        with pytest.raises(UsageError, match=r"^data.public-size: got 20; accepted: at least 24"):
            make_plan(resolve({}, settings(tiny, scheme, "data.public-size=20", SIGMA)), small(), 0)
    assert make_plan(resolve({}, settings(tiny, "poisson", "data.public-size=20", SIGMA)), small(), 0).candidates == 20
    with pytest.raises(UsageError, match=r"^training.sampling: got 'fixed'"):
        resolve({"method": "dp-zo"}, ["zeroth-order.noise=laplace", "training.sampling=fixed"])


def sampled_and_accounted(tiny: Path, scheme: str, claimed: Scheme | None = None) -> dict[str, Check]:
    """The checks of the step contract that know schemes, on our trainer; `claimed`: eps quoted as if it were that."""
    text = settings(tiny, scheme, "privacy.noise-multiplier=1", "privacy.delta=1e-3", "training.batch-size=4")
    factory = factory_for(resolve({}, text), small(20))

    def build(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> Trainer:
        trainer = factory(records, seed=seed, noise_seed=noise_seed)
        assert isinstance(trainer, VlmTrainer) and trainer.plan.event is not None
        if claimed is not None:
            trainer.plan = replace(trainer.plan, sampling=claimed)
            trainer.sample = lambda: drawn.sample()  # type: ignore[method-assign]
            drawn = cast("VlmTrainer", factory(records, seed=seed, noise_seed=noise_seed))
        return trainer

    probe = Probe(build, seed=0, limit=TIME_LIMIT)
    training = SimpleNamespace(noise=[], quick=False, quick_batches=False)
    known = {"probe": probe, "picks": SimpleNamespace(anchor=0), "empty_problem": None}
    bench = cast("Bench", SimpleNamespace(**known, draws=draw(probe), training=training))
    return {entry.name: entry for entry in (*sampling.checks(bench), epsilon(bench))}


@pytest.mark.parametrize("scheme", ["fixed", "shuffle"])
def test_the_step_contract_passes_on_every_scheme(tiny: Path, scheme: Scheme) -> None:
    found = sampled_and_accounted(tiny, scheme)
    assert all(entry.status != "fail" for entry in found.values()), found
    for name in (sampling.TWICE, sampling.MARGINALS, sampling.EPOCH, EPSILON):
        assert found[name].status == "pass", found[name]
    assert found[sampling.SPREAD].status == ("pass" if scheme == "fixed" else "not applicable")


def test_the_contract_finds_shuffled_batches_that_are_claimed_as_poisson(tiny: Path) -> None:
    found = sampled_and_accounted(tiny, "shuffle", claimed="poisson")
    assert found[sampling.SPREAD].status == found[sampling.EPOCH].status == "fail"
