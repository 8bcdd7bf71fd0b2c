"""The audit of a run: everything that was played against it, and the verdict."""

from typing import ClassVar, Literal

from pydantic import Field

from dpaudit.documents.base import Document, Part
from dpaudit.documents.claim import Claim, LedgerRow
from dpaudit.documents.games import Check, ScoreSummary, Test, Validity, Verdict
from dpaudit.documents.token_path import FusionAudit


class ContractAudit(Part):
    """The step contract on this run's trainer."""

    verdict: Literal["pass", "fail", "inconclusive"]
    checks: tuple[Check, ...]


class RunInfo(Part):
    """Which run was audited."""

    name: str
    method: str
    config_sha256: str
    audits: str = Field(default="these weights", description="Or: 'the training procedure, not these weights'.")
    coins_sha256: str | None = None
    command: str | None = None


class AttackRow(Part):
    """One membership attack on the records on which attacks were compared: descriptive, no bound comes from it."""

    name: str
    description: str
    source: str = Field(description="Where it was published.")
    level: Literal["text", "logits", "weights"] = Field(description="What the attacker sees of the target.")
    cost: str
    n: int = Field(description="Records on the development half.")
    auc: float
    auc_low: float
    auc_high: float
    chosen: bool = Field(description="Whether it reports on the other half.")


class Extraction(Part):
    """Exposure of inserted secrets of one kind, in bits: log2(secrets compared) - log2(rank)."""

    kind: str
    members: int
    others: int
    most_bits: float = Field(description="Exposure of a secret that ranks first.")
    bits_members: float
    bits_others: float
    bits_members_base: float = Field(description="The base model's, on the same records.")
    first_members: int = Field(description="Members whose secret ranks first.")
    first_others: int
    p_value: float = Field(description="Of 'members reach 3 bits no more often than secrets that nobody saw'.")


class Regeneration(Part):
    """Questions answered exactly from half of the record, as shares."""

    half: str = Field(description="'picture alone' or 'question alone'.")
    questions_members: int
    questions_others: int
    members: float
    members_low: float
    members_high: float
    others: float
    members_base: float = Field(description="The base model's, on the same questions.")
    others_base: float
    similarity_members: float = Field(description="Mean similarity of the answer, 1 = exact.")
    similarity_others: float


class Thumbnail(Part):
    """A small picture for the gallery; only synthetic ones without `--show-examples`."""

    caption: str
    kind: str
    png_base64: str
    question: str
    answer: str


class AuditDocument(Document):
    """`release/audit.json`, and what `dpaudit audit --json` prints."""

    kind: ClassVar[str] = "audit"
    verdict: Verdict
    reasons: tuple[str, ...] = Field(description="Why this verdict, in plain sentences.")
    claim: Claim | None
    alternative: str | None = Field(description="The wrong claim that the audit had to be able to find.")
    alpha: float = Field(description="Level of the claim test.")
    family_confidence: float = Field(description="All tests of this document together.")
    tests: tuple[Test, ...]
    validity: Validity
    ledger: tuple[LedgerRow, ...] = ()
    fusion: FusionAudit | None = None
    contract: ContractAudit | None = None
    scores: tuple[ScoreSummary, ...] = ()
    gallery: tuple[Thumbnail, ...] = ()
    attacks: tuple[AttackRow, ...] = Field(default=(), description="Membership attacks compared before one was chosen.")
    exposure: tuple[Extraction, ...] = Field(default=(), description="Of inserted secrets; descriptive.")
    regeneration: tuple[Regeneration, ...] = Field(default=(), description="From half of a record; descriptive.")
    run: RunInfo | None = None
