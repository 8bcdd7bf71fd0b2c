"""The truth table of the token path: which of its cases a run is, what each means, and which test decided it.

Every case is decided by a test and by nothing else; `docs/fusion-path.md` explains the cases. A case that does not
apply is listed too, with the test that ruled it out, so that a reader sees what was asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpaudit.documents import (
    Check,
    FusionAudit,
    LedgerRow,
    LedgerStatus,
    ReleaseAudit,
    Sensitivity,
    Stage,
    TruthCase,
)

if TYPE_CHECKING:  # a reader of documents merges ledgers without torch
    from attacks.fusion.isolation import Isolation

PER_EXAMPLE: LedgerStatus = "per-example preprocessing"
ACCOUNTED: LedgerStatus = "accounted"
UNACCOUNTED: LedgerStatus = "UNACCOUNTED"

OWN = "each picture pruned and fused from itself"
SHARED = "something shared over the batch"
TOO_FAR = "one unit moves the clipped sum further than the noise was scaled to"
LEAVES = "tokens leave with the paper's noise, or none"
ACCOUNTED_RELEASE = "all tokens clipped to R and noised once"
NOISE_SHARED = "fusion noise shared, replayable or seeded by content"
NOISE_COLLIDES = "fusion noise taken from the gradient noise"
CLEAN_MASK = "blocks chosen from the clean gradient"
TUNED = "K, layer or noise tuned on private data"

NOISE_ROW = "fusion noise"
MASK_ROW = "gradient-update pruning"
ISOLATION_ROW = "isolation of records"
DECIDED = ". Decided by "


@dataclass(frozen=True)
class Findings:
    """All answers of the tests on one run. `leaves`: the run publishes tokens through accounted fusion."""

    isolation: "Isolation"
    noise: tuple[Check, ...]
    mask: Check
    sensitivity: tuple[Sensitivity, ...]
    released: ReleaseAudit | None
    publishing: tuple[Check, ...] = ()
    leaves: bool = False
    tuning: LedgerRow | None = None

    @property
    def within_sensitivity(self) -> bool:
        """No unit was found to move the clipped sum further than the noise was scaled to."""
        return all(row.holds for row in self.sensitivity)

    @property
    def own(self) -> bool:
        """Whether every test says that a record's part of the sum comes from itself, and is bounded."""
        return self.isolation.passed and self.within_sensitivity


def failed(checks: Sequence[Check], names: Sequence[str] | None = None) -> list[Check]:
    """Those that failed, out of `names` or of all."""
    return [check for check in checks if check.status == "fail" and (names is None or check.name in names)]


def cited(checks: Sequence[Check]) -> str:
    """Names and figures of checks, for a ledger."""
    return "; ".join(f"{check.name}: {check.status} ({check.measured})" for check in checks)


def cases(found: Findings) -> tuple[TruthCase, ...]:
    """Every row of the truth table, in its order."""
    return (*_of_tokens(found), *_of_noise(found))


def _of_tokens(found: Findings) -> tuple[TruthCase, ...]:
    leak = found.isolation.leak
    isolation, sensitivity = _isolation_figures(found), _sensitivity_figures(found)
    published = found.leaves and not failed(found.publishing) and found.own
    return (
        TruthCase(
            case=OWN,
            applies=found.own,
            training=PER_EXAMPLE,
            release=None,
            decided_by="isolation by exact replay, searched partner, padding, permutation, batch size; sensitivity",
            evidence=isolation,
        ),
        TruthCase(
            case=SHARED,
            applies=not found.isolation.passed,
            training=UNACCOUNTED,
            release=UNACCOUNTED,
            decided_by="the same isolation tests",
            evidence=isolation if leak is None else f"first at {leak.stage}; {isolation}",
        ),
        TruthCase(
            case=TOO_FAR,
            applies=not found.within_sensitivity,
            training=UNACCOUNTED,
            release=None,
            decided_by="empirical sensitivity of the run's own clipped sum",
            evidence=sensitivity or "the path does not clip, or there are too few units",
        ),
        TruthCase(
            case=LEAVES,
            applies=not found.leaves,
            training=None,
            release=UNACCOUNTED,
            decided_by="release game, mask leakage, reconstruction",
            evidence="not examined" if found.released is None else found.released.statement,
        ),
        TruthCase(
            case=ACCOUNTED_RELEASE,
            applies=found.leaves,
            training=ACCOUNTED if published else None,  # the weights' guarantee does not rest on the published noise
            release=ACCOUNTED if published else UNACCOUNTED,
            decided_by="release game against the formula, checks of the published noise, the ledger",
            evidence=cited(found.publishing) if found.leaves else "fusion.release=none: no tokens are published",
        ),
    )


def _of_noise(found: Findings) -> tuple[TruthCase, ...]:
    from attacks.fusion.noise import APART, RELEASE_CHECKS
    from attacks.fusion.published import published_name

    row = found.tuning
    shared = failed(found.noise, RELEASE_CHECKS)
    apart = [check for check in (*found.noise, *found.publishing) if check.name in (APART, published_name(APART))]
    return (
        TruthCase(
            case=NOISE_SHARED,
            applies=bool(shared),
            training=PER_EXAMPLE,
            release=UNACCOUNTED,
            decided_by="correlation of the noise over pictures and steps, replay under other names and another key",
            evidence=cited(shared or found.noise) or "the run adds no fusion noise",
        ),
        TruthCase(
            case=NOISE_COLLIDES,
            applies=bool(failed(apart)),
            training=UNACCOUNTED,
            release=None,
            decided_by="correlation with the gradient noise at every offset, and the addresses of the key's streams",
            evidence=cited(apart) or "the run adds no fusion noise",
        ),
        TruthCase(
            case=CLEAN_MASK,
            applies=found.mask.status == "fail",
            training=UNACCOUNTED,
            release=None,
            decided_by="equal noisy gradients on neighbouring data",
            evidence=cited([found.mask]),
        ),
        TruthCase(
            case=TUNED,
            applies=row is not None,
            training=UNACCOUNTED if row is None else row.status,
            release=None,
            decided_by="the ledger row that a sweep writes into each of its runs",
            evidence="no sweep declared this run as one of its own" if row is None else row.evidence,
        ),
    )


def _isolation_figures(found: Findings) -> str:
    text = cited(failed(found.isolation.checks) or found.isolation.checks)
    figures = _sensitivity_figures(found)
    return f"{text}; {figures}" if figures else text


def _sensitivity_figures(found: Findings) -> str:
    if not found.sensitivity:
        return ""
    worst = max(found.sensitivity, key=lambda row: row.largest / row.bound)
    return (
        f"empirical sensitivity {'at most' if found.within_sensitivity else 'fails, up to'} "
        f"{worst.largest / worst.bound:.3f} of its bound ({worst.relation}, C = {worst.max_grad_norm:.3g}, {worst.how})"
    )


def training_status(table: Sequence[TruthCase]) -> LedgerStatus:
    """What the table says of the path in training; the tuning has a row of its own."""
    mine = [case.training for case in table if case.applies and case.case != TUNED]
    return UNACCOUNTED if UNACCOUNTED in mine else PER_EXAMPLE


def release_status(table: Sequence[TruthCase]) -> LedgerStatus:
    """What it would mean if tokens left the trust boundary."""
    mine = [case.release for case in table if case.applies]
    return ACCOUNTED if ACCOUNTED in mine and UNACCOUNTED not in mine else UNACCOUNTED


def _if_released(case: TruthCase) -> str:
    """What a row cites about a release, where a test looked at it."""
    if case.case == LEAVES and not case.applies:
        return ""
    told = f"{UNACCOUNTED}, {case.case}" if case.applies else f"not the case: {case.case}"
    return f". If tokens left: {told} ({case.decided_by}: {case.evidence})"


def ledger(rows: Sequence[LedgerRow], table: Sequence[TruthCase]) -> tuple[LedgerRow, ...]:
    """The run's ledger with every row of the token path as its test decided it, citing test and figures.

    What only a release rests on (noiseless tokens, fusion noise shared or replayable) is cited in the row of the thing
    that would leave; it does not change that row's status, which is about the weights. A row that a run has no place
    for (a leak in a run without a reducer) is added.
    """
    by_name = {case.case: case for case in table}  # a table from elsewhere, or of an earlier version, may have gaps
    shared, too_far, own = (by_name.get(name) for name in (SHARED, TOO_FAR, OWN))
    collides, masked, published = (by_name.get(name) for name in (NOISE_COLLIDES, CLEAN_MASK, ACCOUNTED_RELEASE))
    token = next((case for case in (shared, too_far) if case is not None and case.applies), own)
    decided: dict[Stage | None, tuple[TruthCase, LedgerStatus]] = {}
    if token is not None:
        decided["token reduction"] = (token, token.training or PER_EXAMPLE)
    if collides is not None:
        decided["fusion noise"] = (collides, UNACCOUNTED if collides.applies else PER_EXAMPLE)
    if masked is not None:
        decided["gradient pruning"] = (masked, UNACCOUNTED if masked.applies else "post-processing")
    if published is not None:
        decided["released tokens"] = (published, published.release or UNACCOUNTED)
    beside: dict[Stage | None, TruthCase | None] = {
        "token reduction": by_name.get(LEAVES),
        "fusion noise": by_name.get(NOISE_SHARED),
    }
    out = []
    for row in rows:
        if row.stage not in decided:
            out.append(row)
            continue
        case, status = decided[row.stage]
        evidence = f"{row.evidence.split(DECIDED)[0]}{DECIDED}{case.decided_by}: {case.evidence}"
        released = beside.get(row.stage)
        if released is not None:
            evidence += _if_released(released)
        out.append(row.model_copy(update={"status": status, "evidence": evidence}))
    # Where the row of a stage is missing: the row to add, and what it says of itself.
    missing: tuple[tuple[TruthCase | None, Stage, str, Stage, str], ...] = (
        (shared, "token reduction", ISOLATION_ROW, "other", "One record reaches what the model computes of another."),
        (
            too_far,
            "token reduction",
            "sensitivity of the clipped sum",
            "other",
            "One unit moves the sum further than its clip norm.",
        ),
        (collides, "fusion noise", NOISE_ROW, "fusion noise", "The fusion noise repeats the gradient noise."),
        (
            masked,
            "gradient pruning",
            MASK_ROW,
            "gradient pruning",
            "The update mask follows the gradient before the noise.",
        ),
    )
    there = {row.stage for row in rows}
    for found, needed, path, stage, explanation in missing:
        if found is not None and found.applies and needed not in there:
            evidence = f"{found.decided_by}: {found.evidence}"
            out.append(_unaccounted(path, stage, explanation, evidence))
    return tuple(out)


def run_ledger(rows: Sequence[LedgerRow], fusion: FusionAudit | None) -> tuple[LedgerRow, ...]:
    """A run's ledger with the token path as its tests decided it instead of as construction promises."""
    if fusion is None:
        return tuple(rows)
    decided = ledger(rows, fusion.cases) if fusion.cases else tuple(rows)
    if fusion.training != UNACCOUNTED or any(row.status == UNACCOUNTED for row in decided):
        return decided
    # Whatever a part of the audit found, the verdict must see it.
    explanation = f"One record reaches what the model computes about another, first at {fusion.first_leaking_stage}."
    evidence = "; ".join(f"{check.name}: {check.measured}" for check in fusion.checks if check.status == "fail")
    return (*decided, _unaccounted(ISOLATION_ROW, "other", explanation, evidence))


def _unaccounted(path: str, stage: Stage, explanation: str, evidence: str) -> LedgerRow:
    return LedgerRow(path=path, stage=stage, status=UNACCOUNTED, explanation=explanation, evidence=evidence)
