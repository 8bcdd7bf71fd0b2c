"""The truth table: every case is decided by its test on a planted variant of the trainer; what the ledger then says."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from attacks.bugs.token_path import plant
from attacks.fusion import verdicts
from attacks.fusion.blocks import audit_blocks
from attacks.fusion.isolation import Isolation, audit_isolation
from attacks.fusion.noise import audit_noise
from attacks.fusion.path import TokenPath
from dpaudit.config import resolve
from dpaudit.documents import Check, LedgerRow, LedgerStatus, ReleaseAudit, Sensitivity, Stage, TruthCase
from dpaudit.ledger import tuning_row
from dpaudit.randomness import Key
from tests.attacks.fusion_paths import token_path
from tests.tiny import random_units, save_tiny_llava
from trainers.gradients import Gradient, UnitSum
from trainers.plan import make_plan
from trainers.records import Dataset, Unit
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

OWN, SHARED = verdicts.OWN, verdicts.SHARED
TOKEN_ROW = "token pruning and fusion"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def units() -> tuple[Unit, ...]:
    return random_units(3)


@pytest.fixture(scope="module")
def sound(tiny: Path, units: Sequence[Unit]) -> tuple[Isolation, tuple[Check, ...]]:
    path = token_path(tiny)
    return audit_isolation(path, units), audit_noise(path, units)


MASK = Check(name="update mask follows the noisy gradient", status="pass", measured="x", allowed="", explanation="")
RELEASED = ReleaseAudit(delta=1e-5, tokens=9, noiseless=6, epsilon=float("inf"), statement="6 of 9 carry no noise")


def row(stage: Stage, path: str, status: LedgerStatus, evidence: str) -> LedgerRow:
    return LedgerRow(path=path, stage=stage, status=status, explanation="", evidence=evidence)


ROWS = (
    row("token reduction", TOKEN_ROW, "per-example preprocessing", "by construction"),
    row("fusion noise", verdicts.NOISE_ROW, "per-example preprocessing", "std 0.1"),
    row("gradient pruning", verdicts.MASK_ROW, "post-processing", "keeps 0.8"),
    row("gradients", "gradients", "accounted", "sigma 1"),
)


def applying(table: Sequence[TruthCase]) -> set[str]:
    return {case.case for case in table if case.applies}


def findings(sound: tuple[Isolation, tuple[Check, ...]], **changes: object) -> verdicts.Findings:
    base: dict[str, object] = {
        "isolation": sound[0],
        "noise": sound[1],
        "mask": MASK,
        "sensitivity": (),
        "released": RELEASED,
    }
    return verdicts.Findings(**(base | changes))  # type: ignore[arg-type]


def test_dual_priv_as_published(sound: tuple[Isolation, tuple[Check, ...]]) -> None:
    """Covered in training; tokens that leave have no guarantee at all."""
    table = verdicts.cases(findings(sound))
    assert [case.case for case in table] == [
        verdicts.OWN,
        verdicts.SHARED,
        verdicts.TOO_FAR,
        verdicts.LEAVES,
        verdicts.ACCOUNTED_RELEASE,
        verdicts.NOISE_SHARED,
        verdicts.NOISE_COLLIDES,
        verdicts.CLEAN_MASK,
        verdicts.TUNED,
    ]
    assert applying(table) == {OWN, verdicts.LEAVES}
    assert verdicts.training_status(table) == "per-example preprocessing"
    assert verdicts.release_status(table) == "UNACCOUNTED"
    rows = {row.path: row for row in verdicts.ledger(ROWS, table)}
    assert rows["gradients"] == ROWS[3]
    token = rows[TOKEN_ROW]
    assert token.status == "per-example preprocessing"
    assert "by construction. Decided by isolation" in token.evidence and "comparisons" in token.evidence
    assert "correlation" in rows[verdicts.NOISE_ROW].evidence
    # What a release would rest on is cited where it would leave, and changes no status.
    assert token.evidence.endswith(f"If tokens left: UNACCOUNTED, {verdicts.LEAVES} (release game, mask leakage, "
                                   "reconstruction: 6 of 9 carry no noise)")  # fmt: skip
    assert f"not the case: {verdicts.NOISE_SHARED} (" in rows[verdicts.NOISE_ROW].evidence
    assert "fusion noise not seeded by content: pass" in rows[verdicts.NOISE_ROW].evidence
    assert rows[verdicts.MASK_ROW].status == "post-processing"
    # A second audit cites its own figures instead of piling them up.
    again = verdicts.ledger(verdicts.ledger(ROWS, table), table)
    assert again == verdicts.ledger(ROWS, table)


def test_a_sensitivity_above_its_bound_decides(sound: tuple[Isolation, tuple[Check, ...]]) -> None:
    """8 C where C is allowed, with isolation passed: training is not covered, and neither is accounted fusion."""
    fine = Sensitivity(
        relation="replace", max_grad_norm=1.0, largest=2.0, bound=2.0, holds=True, comparisons=4, how="a"
    )
    wrong = Sensitivity(
        relation="add-remove",
        max_grad_norm=0.3,
        largest=8.0,
        bound=1.0,
        holds=False,
        comparisons=4,
        how="a long record",
    )
    table = verdicts.cases(findings(sound, sensitivity=(fine, wrong), leaves=True))
    assert {verdicts.TOO_FAR, verdicts.ACCOUNTED_RELEASE} == applying(table)
    assert verdicts.training_status(table) == "UNACCOUNTED" and verdicts.release_status(table) == "UNACCOUNTED"
    row = {row.path: row for row in verdicts.ledger(ROWS, table)}[TOKEN_ROW]
    assert row.status == "UNACCOUNTED"
    assert "fails, up to 8.000 of its bound (add-remove, C = 0.3, a long record)" in row.evidence
    added = verdicts.ledger(ROWS[2:], table)[-1]  # a run without a reducer
    assert (
        added.path == "sensitivity of the clipped sum" and added.status == "UNACCOUNTED" and "8.000" in added.evidence
    )
    within = verdicts.cases(findings(sound, sensitivity=(fine,)))
    assert verdicts.TOO_FAR not in applying(within) and verdicts.training_status(within) == "per-example preprocessing"


@dataclass(frozen=True)
class Expected:
    """What the table must say of a planted variant."""

    case: str
    training: str
    rows: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch-count", Expected(SHARED, "UNACCOUNTED", {TOKEN_ROW: "UNACCOUNTED"})),
        ("padded-positions", Expected(SHARED, "UNACCOUNTED", {TOKEN_ROW: "UNACCOUNTED"})),
        (
            "noise-shared-over-batch",
            Expected(verdicts.NOISE_SHARED, "per-example preprocessing", {verdicts.NOISE_ROW: "per-example preproc"}),
        ),
        ("noise-seeded-by-content", Expected(verdicts.NOISE_SHARED, "per-example preprocessing")),
        (
            "noise-of-gradient-stream",
            Expected(verdicts.NOISE_COLLIDES, "UNACCOUNTED", {verdicts.NOISE_ROW: "UNACCOUNTED"}),
        ),
    ],
)
def test_planted_paths_are_put_into_their_row(
    tiny: Path, units: Sequence[Unit], sound: tuple[Isolation, tuple[Check, ...]], name: str, expected: Expected
) -> None:
    planted = plant(name)
    path: TokenPath = planted.apply(token_path(tiny))
    if planted.noise is None:
        found = findings(sound, isolation=audit_isolation(path, units))
    else:  # that isolation passes on these is shown in test_fusion_isolation
        found = findings(sound, noise=audit_noise(path, units))
    table = verdicts.cases(found)
    assert expected.case in applying(table)
    assert verdicts.training_status(table) == expected.training == planted.training
    assert verdicts.release_status(table) == "UNACCOUNTED"
    rows = {row.path: row for row in verdicts.ledger(ROWS, table)}
    for path_name, status in expected.rows.items():
        assert rows[path_name].status.startswith(status)
    case = next(case for case in table if case.case == expected.case)
    assert "fail" in case.evidence and any(figure.isdigit() for figure in case.evidence)
    if planted.stage is not None:
        assert f"first at {planted.stage}" in case.evidence


class CleanMask(Trainer):
    """Chooses the blocks to update by the clean gradient of the step."""

    clean: Gradient

    def clipped_sum(self, step: int, units: Sequence[int]) -> UnitSum:
        total = super().clipped_sum(step, units)
        self.clean = total.gradient
        return total

    def update(self, step: int, noisy: Gradient) -> set[str]:
        super().update(step, noisy)
        order = sorted(self.clean, key=lambda name: -float(self.clean[name].norm()))
        return set(order[: self.pruning.count])


def makers(tiny: Path, kind: type[Trainer], *settings: str):
    fixed = [f"model.path={tiny}", "model.device=cpu", "reducer.keep=4", "reducer.fuse=3", "privacy.delta=1e-3"]
    fixed += ["training.batch-size=3", "training.steps=9", "privacy.noise-multiplier=1", "pruning.keep=0.5", *settings]
    config = resolve({"method": "dual-priv"}, fixed)
    plan = make_plan(config, Dataset("random", "image", random_units(3), random_units(1)), 0)

    def make(units: Sequence[Unit]) -> Trainer:
        return kind.build(config, plan, Key.from_seed(0), VisionLanguageModel.load(str(tiny), device="cpu"), units)

    return make


@pytest.mark.parametrize("policy", ["magnitude", "magnitude-normalised", "random", "previous"])
def test_our_update_masks_see_noise_only(tiny: Path, units: Sequence[Unit], policy: str) -> None:
    assert audit_blocks(makers(tiny, Trainer, f"pruning.by={policy}"), units).status == "pass"


def test_a_mask_from_the_clean_gradient_is_unaccounted(
    tiny: Path, units: Sequence[Unit], sound: tuple[Isolation, tuple[Check, ...]]
) -> None:
    check = audit_blocks(makers(tiny, CleanMask), units)
    assert check.status == "fail" and "other blocks in" in check.measured
    table = verdicts.cases(findings(sound, mask=check))
    assert verdicts.CLEAN_MASK in applying(table) and verdicts.training_status(table) == "UNACCOUNTED"
    rows = {row.path: row for row in verdicts.ledger(ROWS, table)}
    assert rows[verdicts.MASK_ROW].status == "UNACCOUNTED"
    # A run whose ledger promised no pruning gets the row all the same.
    assert verdicts.MASK_ROW in {row.path for row in verdicts.ledger(ROWS[:2], table)}


def test_no_mask_to_judge_where_every_block_is_updated(tiny: Path, units: Sequence[Unit]) -> None:
    assert audit_blocks(makers(tiny, Trainer, "pruning.keep=1"), units).status == "not applicable"


GOOD = Check(
    name="published tokens tell no more than accounted", status="pass", measured="p = 1", allowed="", explanation=""
)


@pytest.mark.parametrize(("status", "release"), [("pass", "accounted"), ("fail", "UNACCOUNTED")])
def test_accounted_fusion_stands_and_falls_with_its_checks(
    sound: tuple[Isolation, tuple[Check, ...]], status: str, release: str
) -> None:
    check = GOOD.model_copy(update={"status": status})
    table = verdicts.cases(findings(sound, leaves=True, publishing=(check,)))
    assert applying(table) == {OWN, verdicts.ACCOUNTED_RELEASE}
    assert verdicts.release_status(table) == release
    assert verdicts.training_status(table) == "per-example preprocessing"
    row = LedgerRow(path="tokens", stage="released tokens", status="accounted", explanation="", evidence="mu = 1")
    assert verdicts.ledger([row], table)[0].status == release


def test_tuning_on_private_data_is_what_the_sweep_declared(sound: tuple[Isolation, tuple[Check, ...]]) -> None:
    table = verdicts.cases(findings(sound, tuning=tuning_row(5)))
    case = table[-1]
    assert case.applies and case.training == "UNACCOUNTED" and "5 runs compared" in case.evidence
    assert verdicts.training_status(table) == "per-example preprocessing"  # of the path; tuning has a row of its own
    assert not verdicts.cases(findings(sound))[-1].applies


def test_a_leak_without_a_reducer_gets_a_row(tiny: Path, units: Sequence[Unit], sound) -> None:
    found = findings(sound, isolation=audit_isolation(plant("token-mean").apply(token_path(tiny)), units))
    rows = verdicts.ledger([ROWS[3]], verdicts.cases(found))
    assert [row.path for row in rows] == ["gradients", "isolation of records"]
    assert rows[1].status == "UNACCOUNTED" and "first at loss" in rows[1].evidence
