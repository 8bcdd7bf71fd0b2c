"""The statement under audit, and the ledger of the places where private data is touched."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpaudit import checksums
from dpaudit.documents.base import Document, Number, Part
from dpaudit.errors import UsageError
from dpaudit.untrusted import read_json

Relation = Literal["add-remove", "zero-out", "replace"]
LedgerStatus = Literal["accounted", "post-processing", "per-example preprocessing", "UNACCOUNTED"]
# Which part of a training a ledger row speaks of; readers branch on this and never on the row's name.
Stage = Literal[
    "gradients",
    "canaries",
    "token reduction",
    "fusion noise",
    "released tokens",
    "gradient pruning",
    "tuning",
    "preprocessing",
    "data size",
    "report",
    "other",
]
# Version 1 had names only. These are all that dpaudit gave to rows; any other row stays without a stage.
_STAGES_OF_VERSION_1: dict[str, Stage] = {
    "gradients": "gradients",
    "training steps": "gradients",
    "planted fault": "gradients",
    "canaries": "canaries",
    "token pruning and fusion": "token reduction",
    "fusion noise": "fusion noise",
    "released visual tokens": "released tokens",
    "gradient-update pruning": "gradient pruning",
    "hyper-parameter tuning": "tuning",
    "grouping into units": "preprocessing",
    "size of the training set": "data size",
    "limit on the training set": "data size",
    "report: training curves": "report",
    "report: pictures": "report",
}


MOST_CURVE = 64  # points; each is priced wherever the claim is read


class EpsilonAt(Part):
    """One point of the privacy curve."""

    delta: float
    epsilon: Number


class CrossCheck(Part):
    """eps of the same mechanism by another accountant; the claim never quotes it."""

    accountant: str = Field(description="Name and version.")
    epsilon: Number | None = Field(description="At the claim's delta; null: this accountant has no answer.")
    note: str = Field(default="", description="Why it has none.")


class Claim(Part):
    """The statement under audit: eps at delta, for which unit, relation, sampling and mechanism."""

    epsilon: Number = Field(description="Claimed eps at `delta`.")
    delta: float
    relation: Relation
    unit: str = Field(description="What one person contributes, e.g. 'image (with all its questions)'.")
    mechanism: Literal["gaussian", "laplace", "zeroth-order", "correlated"] = "gaussian"
    noise: Literal["gaussian", "laplace"] = Field(default="gaussian", description="Law of the noise on the sum.")
    noise_multiplier: Number | None = Field(
        default=None, description="sigma: noise std (Laplace: scale) of the sum / max_grad_norm."
    )
    max_grad_norm: float | None = Field(default=None, description="C: of the L2 norm (Laplace: L1) of one unit.")
    sampling: Literal["poisson", "fixed", "shuffle", "full", "allocation"] | None = None
    sample_rate: float | None = None
    epoch_steps: int | None = Field(
        default=None, description="t of allocation: a unit is in sample_rate * t of the t steps of an epoch."
    )
    steps: int | None = None
    expected_batch_size: float | None = None
    candidates: int | None = Field(default=None, description="n + m: declared records plus canary candidates.")
    accountant: str | None = Field(default=None, description="Name and version, e.g. 'dp-accounting 0.6.0 PLD'.")
    token_multiplier: float | None = Field(
        default=None, description="z: noise std of released visual tokens / their clip norm; eps covers them too."
    )
    release: str = Field(default="final weights", description="What leaves the trust boundary.")
    curve: tuple[EpsilonAt, ...] = Field(default=(), max_length=MOST_CURVE, description="eps at other deltas.")


class ClaimDocument(Document):
    """`release/claim.json`: the claim of a run, or `claim: null` for a run that makes none."""

    kind: Literal["claim"] = "claim"
    claim: Claim | None
    releasable: bool = Field(default=True, description="False: the noise key came from --seed.")
    reasons: tuple[str, ...] = Field(default=(), description="Why there is no claim, or why it is not releasable.")
    cross_checks: tuple[CrossCheck, ...] = Field(default=(), description="Upper bounds by other accountants.")


class LedgerRow(Part):
    """One place where private data is touched."""

    path: str = Field(description="Short name, e.g. 'gradients', 'token fusion', 'vocabulary'.")
    status: LedgerStatus
    explanation: str = Field(description="One or two sentences for a reader who is no expert.")
    evidence: str = Field(description="The test, formula or setting that decides the status, with its figures.")
    stage: Stage | None = Field(default=None, description="Which part of the training it is about.")


def with_stages(tree: Any, field: str) -> Any:
    """A document's JSON with the stages that version 1 did not write; other versions are returned as they are."""
    if not isinstance(tree, dict) or tree.get("schema_version") != 1 or not isinstance(tree.get(field), list | tuple):
        return tree
    rows = [
        {"stage": _STAGES_OF_VERSION_1.get(str(row.get("path"))), **row} if isinstance(row, dict) else row
        for row in tree[field]
    ]
    return {**tree, field: rows}


class Spent(Part):
    """Privacy budget spent so far; written before the noisy gradient of a step is used, and never decreases."""

    steps_started: int
    steps_planned: int
    epsilon: Number | None
    delta: float


class LedgerDocument(Document):
    """`release/ledger.json`."""

    kind: Literal["ledger"] = "ledger"
    coins_sha256: str | None = Field(description="Hash of private/coins.parquet, taken before the first step.")
    rows: tuple[LedgerRow, ...]
    spent: Spent | None
    config_sha256: str | None = Field(default=None, description="Hash of release/config.yaml when training started.")
    sha256: str | None = Field(default=None, description="Hash of all the rest: a damaged ledger can't be taken up.")

    @model_validator(mode="before")
    @classmethod
    def _version_1(cls, tree: Any) -> Any:
        return with_stages(tree, "rows")

    def sealed(self) -> Self:
        """This ledger with the hash of its content."""
        return self.model_copy(update={"sha256": checksums.seal(json.loads(self.to_json()))})

    @classmethod
    def read(cls, path: Path) -> Self:
        """See Document.read; UsageError for a ledger whose own hash does not fit."""
        found = super().read(path)
        if found.sha256 is not None and found.sha256 != checksums.seal(read_json(path)):
            raise UsageError(f"{path}: damaged (its content does not have the SHA-256 in it); restore it from a copy")
        return found
