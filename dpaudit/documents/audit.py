"""The audit of a run: everything that was played against it, and the verdict."""

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from dpaudit import checksums
from dpaudit.documents.base import Document, Number, Part
from dpaudit.documents.claim import Claim, LedgerRow, with_stages
from dpaudit.documents.games import Check, Control, ScoreSummary, Test, Validity, Verdict
from dpaudit.documents.token_path import FusionAudit


class ContractAudit(Part):
    """The step contract on this run's trainer."""

    verdict: Literal["pass", "fail", "inconclusive"]
    checks: tuple[Check, ...]


About = Literal["weights", "procedure"]
ABOUT: dict[str, str] = {"weights": "these weights", "procedure": "the training procedure, not these weights"}


class RunInfo(Part):
    """Which run was audited."""

    name: str
    method: str
    config_sha256: str
    about: About = Field(default="weights", description="What the evidence is about, where all games agree.")
    coins_sha256: str | None = None
    command: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _version_1(cls, tree: Any) -> Any:
        """Version 1 said it in prose, under another name."""
        if isinstance(tree, dict) and "audits" in tree and "about" not in tree:
            rest = {name: value for name, value in tree.items() if name != "audits"}
            return {**rest, "about": "weights" if tree["audits"] == ABOUT["weights"] else "procedure"}
        return tree


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


TOKEN_PATH: Final = "token path"
STEP_CONTRACT: Final = "step contract"
WITHOUT_COINS = (TOKEN_PATH, STEP_CONTRACT)  # checks that toss no coins and so hold no evidence


class GameDocument(Document):
    """`release/games/NAME.json`: one game, as it was played. Written once, never edited.

    Games with the same `coins_sha256` share their coins: their evidence is added with the shares that were fixed with
    the coins. Games with other coins multiply. `previous_sha256` chains the documents, so that one that is taken out or
    changed is noticed.
    """

    kind: Literal["game"] = "game"
    game: Literal[
        "canaries",
        "membership",
        "white-box",
        "many runs",
        "owner's coins",
        "scores",
        "earlier audit",
        "token path",
        "step contract",
    ]
    number: int = Field(description="Position in the order of play, from 1.")
    previous_sha256: str | None = Field(description="SHA-256 of the game document before this one.")
    about: About
    claim: Claim | None = Field(description="Claim of what was attacked: a twin has its own sigma, q and T.")
    alternative: str | None = Field(default=None, description="The wrong claim that this game looked for.")
    coins_sha256: str | None
    coins: str = Field(
        default="records", description="Which coins of that file; games on the same ones share evidence."
    )
    alpha: float = Field(description="Level that the evidence was calibrated for.")
    tests: tuple[Test, ...] = ()
    kept: float = Field(default=0.1, description="Share of the coins' evidence that is not staked on any test.")
    validity: Validity = Validity(sound=True, checks=())
    controls: tuple[Control, ...] = ()
    supplied: bool = Field(default=False, description="True: a twin that lay there, not trained by this audit.")
    scores: tuple[ScoreSummary, ...] = ()
    gallery: tuple[Thumbnail, ...] = ()
    attacks: tuple[AttackRow, ...] = ()
    exposure: tuple[Extraction, ...] = ()
    regeneration: tuple[Regeneration, ...] = ()
    fusion: FusionAudit | None = Field(default=None, description="Token path only: what its tests found.")
    contract: ContractAudit | None = Field(default=None, description="Step contract only: what its checks found.")
    command: str | None = None

    def sha256(self) -> str:
        """Of the document as it is written."""
        return checksums.digest(self.to_json().encode())

    @property
    def name(self) -> str:
        """File name without ending: '02-white-box'."""
        return f"{self.number:02d}-{self.game.replace(' ', '-').replace(chr(39), '')}"


class GameEntry(Part):
    """A game of an audit: where it stands, what it speaks of, and how the evidence stood after it."""

    name: str
    game: str
    sha256: str | None = Field(description="Of its document; null: the game has no document of its own.")
    about: About
    claim: Claim | None
    alternative: str | None = None
    coins_sha256: str | None = None
    sound: bool
    supplied: bool = False
    log_evidence: Number = Field(description="Of this game: log of the shares of its tests times their e-values.")
    log_product: Number = Field(description="Log of the product over all games up to this one.")
    power: float | None = Field(default=None, description="Largest earned power of its tests.")


class AuditDocument(Document):
    """`release/audit.json`, and what `dpaudit audit --json` prints: a function of the games, the token path, the
    contract and the ledger, made by dpaudit.verdict."""

    kind: Literal["audit"] = "audit"
    verdict: Verdict
    reasons: tuple[str, ...] = Field(description="Why this verdict, in plain sentences.")
    claim: Claim | None
    alternative: str | None = Field(description="The wrong claim that the audit had to be able to find.")
    alpha: float = Field(description="Level of the claim test.")
    family_confidence: float = Field(description="All tests of this document together.")
    games: tuple[GameEntry, ...] = Field(default=(), description="In the order of play.")
    log_evidence: Number | None = Field(
        default=None, description="Largest log product of evidence so far; the claim is refuted from log(1/alpha) on."
    )
    tests: tuple[Test, ...]
    validity: Validity
    controls: tuple[Control, ...] = ()
    ledger: tuple[LedgerRow, ...] = ()
    fusion: FusionAudit | None = None
    contract: ContractAudit | None = None
    scores: tuple[ScoreSummary, ...] = ()
    gallery: tuple[Thumbnail, ...] = ()
    attacks: tuple[AttackRow, ...] = Field(default=(), description="Membership attacks compared before one was chosen.")
    exposure: tuple[Extraction, ...] = Field(default=(), description="Of inserted secrets; descriptive.")
    regeneration: tuple[Regeneration, ...] = Field(default=(), description="From half of a record; descriptive.")
    run: RunInfo | None = None

    @model_validator(mode="before")
    @classmethod
    def _version_1(cls, tree: Any) -> Any:
        return with_stages(tree, "ledger")
