"""Random allocation in training: draws, plan, claim and ledger, a resumed run, contract and white box."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, chisquare

from attacks.audit import Options
from attacks.games.twins import play_white_box
from attacks.options import prepare
from attacks.training import resume_run, start_run
from dpaudit import accounting, stated
from dpaudit.accounting import DpSgd
from dpaudit.analysis.claim import claimed_event
from dpaudit.config import resolve
from dpaudit.documents import ClaimDocument, LedgerDocument
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.randomness import Key
from tests.trainers.test_sampling import sampled_and_accounted, settings, small
from trainers.plan import make_plan
from trainers.sampling import Sampler, allocated

KEY = Key.from_seed(12)


@pytest.mark.parametrize(("draws", "size"), [(1, 5), (2, 8), (4, 10), (5, 17)])
def test_every_unit_is_in_exactly_k_steps_of_every_epoch(draws: int, size: int) -> None:
    sampler = Sampler("allocation", places=17, size=size, draws=draws)
    steps = sampler.batches
    assert steps == -(-17 * draws // size) and sampler.rate == draws / steps
    for epoch in range(20):
        batches = [sampler.batch(KEY, step=epoch * steps + turn + 1, units=17) for turn in range(steps)]
        assert (np.bincount(np.concatenate(batches), minlength=17) == draws).all()
        assert all((np.diff(batch) > 0).all() for batch in batches)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_subsets_are_uniform_and_units_and_epochs_independent(draws: int) -> None:
    """10,000 subsets of 5 steps; chi-square at 1e-8 for the subsets, and for those of neighbours and of successors."""
    drawn = np.stack([np.sort(allocated(KEY, epoch, 500, 5, draws), axis=1) for epoch in range(20)])
    subsets = {subset: place for place, subset in enumerate(itertools.combinations(range(5), draws))}
    codes = np.array([[subsets[tuple(row)] for row in epoch] for epoch in drawn.tolist()])
    assert chisquare(np.bincount(codes.ravel(), minlength=len(subsets))).pvalue > 1e-8
    for one, two in ((codes[:, ::2], codes[:, 1::2]), (codes[::2], codes[1::2])):
        pairs = np.bincount((one * len(subsets) + two).ravel(), minlength=len(subsets) ** 2)
        assert chisquare(pairs).pvalue > 1e-8


def test_a_unit_draws_the_same_whoever_else_is_there_and_a_step_alone_says_who() -> None:
    sampler = Sampler("allocation", places=30, size=7, draws=2)
    whole = [sampler.batch(KEY, step=step, units=30) for step in range(1, 30)]
    for step in (29, 3, 17, 3):  # in any order
        batch = sampler.batch(KEY, step=step, units=30)
        assert batch.tolist() == whole[step - 1].tolist()
        assert sampler.batch(KEY, step=step, units=20).tolist() == [unit for unit in batch if unit < 20]
    sizes = np.array([batch.size for batch in whole])
    assert sizes.std() > 0 and sampler.batch(KEY, step=1, units=0).size == 0


def test_sizes_vary_as_binomial_ones_do() -> None:
    sampler = Sampler("allocation", places=400, size=40)
    sizes = np.array([sampler.batch(KEY, step=step, units=400).size for step in range(1, 1001, 10)])
    assert (sizes >= binom.ppf(1e-9, 400, 0.1)).all() and (sizes <= binom.ppf(1 - 1e-9, 400, 0.1)).all()
    assert 0.4 < sizes.var() / 36 < 2.0


def test_steps_are_whole_epochs_and_a_draw_needs_a_step() -> None:
    assert Sampler("allocation", 100, 10).steps(3.0) == 30
    assert Sampler("allocation", 100, 10).steps(2.5) == 30
    assert Sampler("allocation", 100, 10, 2).steps(3.0) == 40  # two epochs of twenty steps
    assert Sampler("allocation", 100, 10).steps(0.1) == 10


def test_plan_claim_and_ledger_say_what_is_done(tiny: Path, tmp_path: Path) -> None:
    plan = make_plan(resolve({}, settings(tiny, "allocation")), small(), 4)  # 28 candidates, batches of 8: t = 4
    assert plan.event == DpSgd(plan.noise_multiplier, 1 / 4, 6, sampling="allocation", epoch=4)
    assert plan.claim is not None and plan.claim.epoch_steps == 4
    assert accounting.epsilon(plan.event, 1e-5) <= 8 and plan.epsilon_after(5) == plan.epsilon_after(6)
    others = [
        make_plan(resolve({}, settings(tiny, scheme)), small(), 4).noise_multiplier for scheme in ("shuffle", "fixed")
    ]
    assert plan.noise_multiplier < min(others)
    twice = make_plan(resolve({}, settings(tiny, "allocation", "training.draws=2")), small(), 4)
    assert twice.event == DpSgd(twice.noise_multiplier, 2 / 7, 6, sampling="allocation", epoch=7)
    run = start_run(resolve({}, settings(tiny, "allocation", "training.draws=2")), tmp_path / "run", dataset=small())
    document, ledger = ClaimDocument.read(run.claim), LedgerDocument.read(run.ledger)
    row = next(row for row in ledger.rows if row.path == "gradients")
    assert "random allocation: each unit by itself in 2 of the 6 steps of an epoch" in row.evidence
    assert document.claim is not None and claimed_event(document.claim) == DpSgd(
        float(document.claim.noise_multiplier or 0), 1 / 3, 6, sampling="allocation", epoch=6
    )
    assert next(check.accountant.split()[0] for check in document.cross_checks) == "PLD_accounting"
    assert stated.rows(document.claim, run.read_config()) == ()
    assert ledger.spent is not None and float(ledger.spent.epsilon or 0) <= 8.0
    changed = document.claim.model_copy(update={"sample_rate": 1 / 6})
    assert any("costs" in row.explanation or "draws" in row.evidence for row in stated.rows(changed, run.read_config()))


def test_a_resumed_run_is_the_run(tiny: Path, tmp_path: Path) -> None:
    config = resolve({}, settings(tiny, "allocation", "training.checkpoint-every=2", "privacy.noise-multiplier=1"))
    whole = start_run(config, tmp_path / "whole", dataset=small())

    class Stop(Exception):
        """In the middle of an epoch."""

    def stop(step: int, *_: object) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        start_run(config, tmp_path / "run", dataset=small(), after_step=stop)
    resumed = resume_run(tmp_path / "run", dataset=small())
    lines = [[json.loads(line) for line in run.metrics.read_text().splitlines()] for run in (whole, resumed)]
    sizes = [{line["step"]: line["batch"] for line in part} for part in lines]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 6
    weights = [sorted(run.model.glob("*.safetensors"))[0].read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_what_has_no_proof_is_refused_before_training(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra, line in (
        (["privacy.relation=replace"], r"^privacy.relation: got 'replace'; accepted: add-remove or zero-out with"),
        (["method=dp-zo", "zeroth-order.noise=laplace"], r"^training.sampling: got 'allocation'; accepted: poisson or"),
    ):
        with pytest.raises(UsageError, match=line):
            resolve({}, settings(tiny, "allocation", *extra))
    with pytest.raises(UsageError, match=r"^training.draws: got 2; accepted: only with training.sampling=allocation"):
        resolve({}, settings(tiny, "poisson", "training.draws=2"))
    most = make_plan(
        resolve({}, settings(tiny, "allocation", "training.draws=9", "training.batch-size=24")), small(), 0
    )
    assert most.sample_rate == 1.0  # everybody in every step
    from dpaudit.accounting import reference

    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFailure, match=r"^training.sampling=allocation: needs PLD_accounting.*allocation\]'$"
    ):
        make_plan(resolve({}, settings(tiny, "allocation")), small(), 0)


def test_dp_zo_is_accounted_alike(tiny: Path) -> None:
    words = settings(tiny, "allocation", "method=dp-zo", "privacy.noise-multiplier=2")
    claim = make_plan(resolve({}, words), small(), 0).claim
    assert claim is not None and claim.mechanism == "zeroth-order"
    event = DpSgd(2.0, 1 / 3, 6, sampling="allocation", epoch=3)
    assert float(claim.epsilon) == accounting.epsilon(event, claim.delta)


def test_the_step_contract_passes_on_our_sampler_and_finds_poisson_claimed_as_allocation(tiny: Path) -> None:
    found = sampled_and_accounted(tiny, "allocation")
    assert all(entry.status == "pass" for entry in found.values()), found


def test_the_white_box_game_is_played(tiny: Path, tmp_path: Path) -> None:
    config = resolve({}, settings(tiny, "allocation", "privacy.noise-multiplier=1", "training.draws=2"))
    run = start_run(config, tmp_path / "run", dataset=small())
    prepare(run, Options(audits=("white-box",)))
    played, claim = play_white_box(config, tmp_path / "twin", count=12, confidence=0.95, alpha=0.001)
    assert played.validity.sound and claim.epoch_steps == math.ceil(2 * (claim.candidates or 0) / 8)  # two draws
    exact = [test for test in played.tests if test.bound == "exact likelihood"]
    assert {test.assumes for test in exact} == {"claimed-mechanism", "dp-sgd(q,T)"}
    assert all((test.e_value or 0.0) < 1000 for test in played.tests)
    assert any(f"allocated over epochs of {claim.epoch_steps} steps" in (test.statement or "") for test in exact)
