"""A disclosure record per claim, in the vocabulary of registries of DP deployments.

After the registries proposed by Dwork, Kohli and Mulligan (2019, "Differential Privacy in Practice: Expose your
Epsilons!") and by the OpenDP/NIST Differential Privacy Deployments Registry (arXiv:2509.13509). What only the owner
knows (who releases what to whom, and why these parameters) is null and listed in `missing`, for the owner to fill in:
nothing is guessed.
"""

from typing import Literal

from pydantic import Field

from dpaudit import __version__
from dpaudit.documents import ABOUT, Claim, Document, EpsilonAt, LedgerStatus, Number, Part, Verdict
from reports.inputs import RunReport
from reports.subjects import Page

OWNER = (
    "organisation",
    "intended_use",
    "data_source",
    "data_sensitivity",
    "access",
    "contribution_bound",
    "justification",
    "contact",
)


class PrivacyLoss(Part):
    """The guarantee that is claimed."""

    flavour: str = "approximate DP (eps, delta)"
    epsilon: Number
    delta: float
    unit: str
    neighbours: str = Field(description="add-remove (unbounded), replace (bounded) or zero-out.")
    curve: tuple[EpsilonAt, ...]
    accountant: str | None


class Implementation(Part):
    """How it is meant to be achieved."""

    model: str = "central"
    mechanism: str
    noise_multiplier: Number | None
    max_grad_norm: float | None
    sampling: str | None
    sample_rate: float | None
    steps: int | None
    library: str | None
    method: str


class LedgerEntry(Part):
    """One place where private data is touched."""

    path: str
    status: LedgerStatus


class Evidence(Part):
    """What an audit found. It can refute the claim; it can never prove it."""

    verdict: Verdict | None
    epsilon_lower: Number | None
    ceiling: Number | None
    confidence: float | None
    audits: str | None


class Deployment(Part):
    """One claim. Fields of the owner are null until the owner fills them in."""

    name: str
    data_product: str
    releasable: bool | None = Field(
        description="As the claim document says (null: there is none); false where the verdict is refuted, unsupported "
        "or invalid."
    )
    privacy_loss: PrivacyLoss
    implementation: Implementation
    ledger: tuple[LedgerEntry, ...]
    hyperparameter_tuning: LedgerStatus | None = Field(description="null: not stated.")
    evidence: Evidence
    organisation: str | None = None
    intended_use: str | None = None
    data_source: str | None = None
    data_sensitivity: str | None = None
    access: str | None = Field(default=None, description="To whom, and one release or many.")
    contribution_bound: str | None = Field(default=None, description="How many units one person may contribute.")
    justification: str | None = Field(default=None, description="Why these parameters.")
    contact: str | None = None
    missing: tuple[str, ...] = OWNER


class DisclosureDocument(Document):
    """What `dpaudit report --format json` writes."""

    kind: Literal["disclosure"] = "disclosure"
    written_by: str
    deployments: tuple[Deployment, ...]


def disclosure(page: Page) -> DisclosureDocument:
    """The claims of a page; runs without one have nothing to disclose."""
    made = [_deployment(run, run.claim) for run in page.described if run.claim is not None]
    return DisclosureDocument(written_by=f"dpaudit {__version__}", deployments=tuple(made))


def _releasable(run: RunReport) -> bool | None:
    if run.verdict in ("refuted", "unsupported", "invalid"):
        return False
    return run.claim_document.releasable if run.claim_document is not None else None


def _deployment(run: RunReport, claim: Claim) -> Deployment:
    tuning = [row.status for row in run.ledger if row.stage == "tuning"]
    test = run.headline
    info = run.audit.run if run.audit is not None else None
    return Deployment(
        name=run.name,
        data_product=claim.release,
        releasable=_releasable(run),
        privacy_loss=PrivacyLoss(
            epsilon=claim.epsilon,
            delta=claim.delta,
            unit=claim.unit,
            neighbours=claim.relation,
            curve=claim.curve,
            accountant=claim.accountant,
        ),
        implementation=Implementation(
            mechanism=claim.mechanism,
            noise_multiplier=claim.noise_multiplier,
            max_grad_norm=claim.max_grad_norm,
            sampling=claim.sampling,
            sample_rate=claim.sample_rate,
            steps=claim.steps,
            library=f"dpaudit {run.environment.dpaudit}" if run.environment is not None else None,
            method=run.method,
        ),
        ledger=tuple(LedgerEntry(path=row.path, status=row.status) for row in run.ledger),
        hyperparameter_tuning="UNACCOUNTED" if "UNACCOUNTED" in tuning else tuning[0] if tuning else None,
        evidence=Evidence(
            verdict=run.verdict,
            epsilon_lower=test.epsilon_lower if test is not None else None,
            ceiling=test.ceiling if test is not None else None,
            confidence=run.headline_confidence,
            audits=ABOUT[info.about] if info is not None else None,
        ),
    )
