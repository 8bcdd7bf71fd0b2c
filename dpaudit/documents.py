"""The JSON documents that dpaudit writes and reads: one typed model per file under `release/`, one JSON Schema each.

People's scripts depend on these shapes, so a change raises `SCHEMA_VERSION`. Numbers that are not finite are the
strings `"inf"` and `"-inf"` (JSON has none); a missing number is `null`, never NaN. Unknown fields are an error when a
document is read: a document from another version should say so instead of being half understood.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)

from dpaudit import checksums
from dpaudit.errors import UsageError
from dpaudit.untrusted import MOST_DOCUMENT, read_bytes

SCHEMA_VERSION = 1
MOST_BYTES = MOST_DOCUMENT


def _parse_number(value: object) -> object:
    if value == "inf":
        return math.inf
    if value == "-inf":
        return -math.inf
    return value


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("a document can't hold NaN")
    return value


def _print_number(value: float) -> float | str:
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


# Infinite numbers where they mean something; every plain `float` of a document is finite.
Number = Annotated[
    float,
    Field(allow_inf_nan=True),
    AfterValidator(_no_nan),
    BeforeValidator(_parse_number, json_schema_input_type=float | Literal["inf", "-inf"]),
    PlainSerializer(_print_number, return_type=float | Literal["inf", "-inf"], when_used="json"),
]

Relation = Literal["add-remove", "zero-out", "replace"]
Assumes = Literal["none", "gaussian", "laplace", "dp-sgd(q,T)", "claimed-mechanism", "prior"]
Verdict = Literal["invalid", "refuted", "unsupported", "inconclusive", "not refuted", "no claim"]
LedgerStatus = Literal["accounted", "post-processing", "per-example preprocessing", "UNACCOUNTED"]


class Part(BaseModel):
    """A piece of a document."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Document(Part):
    """A whole JSON document."""

    kind: ClassVar[str]
    schema_version: int = SCHEMA_VERSION

    @field_validator("schema_version")
    @classmethod
    def _this_version(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"is {value}; this dpaudit reads {SCHEMA_VERSION}")
        return value

    def to_json(self) -> str:
        """Stable text: two spaces, a newline at the end, fields in declared order."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate `path`; raises UsageError with one line that names file and field.

        Where a list of checksums lies beside it, the file must be the one that was written (dpaudit.checksums).
        """
        try:
            content = read_bytes(path, MOST_DOCUMENT)
            checksums.verify(path, content)
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: can't be read as a {cls.kind} document ({error})") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise UsageError(f"{path}: not a {cls.kind} document: {where}: {first['msg']}") from error

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of what `to_json` writes."""
        schema = cls.model_json_schema(mode="serialization", by_alias=True)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
    sampling: Literal["poisson", "fixed", "shuffle", "full"] | None = None
    sample_rate: float | None = None
    steps: int | None = None
    expected_batch_size: float | None = None
    candidates: int | None = Field(default=None, description="n + m: declared records plus canary candidates.")
    accountant: str | None = Field(default=None, description="Name and version, e.g. 'dp-accounting 0.6.0 PLD'.")
    token_multiplier: float | None = Field(
        default=None, description="z: noise std of released visual tokens / their clip norm; eps covers them too."
    )
    release: str = Field(default="final weights", description="What leaves the trust boundary.")
    curve: tuple[EpsilonAt, ...] = Field(default=(), description="eps at other deltas.")


class ClaimDocument(Document):
    """`release/claim.json`: the claim of a run, or `claim: null` for a run that makes none."""

    kind: ClassVar[str] = "claim"
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


class Spent(Part):
    """Privacy budget spent so far; written before the noisy gradient of a step is used, and never decreases."""

    steps_started: int
    steps_planned: int
    epsilon: Number | None
    delta: float


class LedgerDocument(Document):
    """`release/ledger.json`."""

    kind: ClassVar[str] = "ledger"
    coins_sha256: str | None = Field(description="Hash of private/coins.parquet, taken before the first step.")
    rows: tuple[LedgerRow, ...]
    spent: Spent | None
    config_sha256: str | None = Field(default=None, description="Hash of release/config.yaml when training started.")
    sha256: str | None = Field(default=None, description="Hash of all the rest: a damaged ledger can't be taken up.")

    def sealed(self) -> Self:
        """This ledger with the hash of its content."""
        return self.model_copy(update={"sha256": checksums.seal(json.loads(self.to_json()))})

    @classmethod
    def read(cls, path: Path) -> Self:
        """See Document.read; UsageError for a ledger whose own hash does not fit."""
        found = super().read(path)
        if found.sha256 is not None and found.sha256 != checksums.seal(json.loads(path.read_bytes())):
            raise UsageError(f"{path}: damaged (its content does not have the SHA-256 in it); restore it from a copy")
        return found


class Test(Part):
    """One statistical test: a bound with all that it depends on."""

    __test__: ClassVar[bool] = False  # not a test case for pytest

    name: str = Field(description="Which game and records, e.g. 'canaries: all kinds' or 'canaries: new-token'.")
    statistic: str = Field(description="The score, e.g. 'loss of the base model minus loss'.")
    bound: str = Field(description="The method, e.g. 'steinke', 'order-statistic', 'clopper-pearson'.")
    assumes: Assumes
    selection: str = Field(description="How guesses or thresholds were fixed, e.g. 'fixed: 60 top, 60 bottom'.")
    confidence: float = Field(description="Of this test alone.")
    delta: float
    n: int = Field(description="Records with a coin (m).")
    guesses: int | None = Field(description="r, fixed beforehand.")
    correct: int | None = Field(default=None, description="v, correct guesses.")
    epsilon_lower: Number | None
    ceiling: Number | None = Field(description="Largest eps that this game could have shown.")
    p_value: float | None = Field(default=None, description="Of the claim, where the test makes that statement.")
    statement: str | None = Field(default=None, description="What the p-value says, in words.")
    power: float | None = Field(default=None, description="Against the stored alternative; null = not known.")
    estimate: bool = Field(default=False, description="True: no finite-sample validity, never decides a verdict.")
    decides: bool = Field(default=True, description="False: informative only, outside the error budget.")


class RocPoint(Part):
    """A point of the empirical ROC with simultaneous limits where they exist."""

    fpr: float
    tpr: float
    tpr_low: float | None = None
    tpr_high: float | None = None


class ScoreSummary(Part):
    """What a reader may see of one game's scores: histograms, ROC and AUC, never single scores."""

    name: str
    n_in: int
    n_out: int
    edges: tuple[float, ...] = Field(description="Histogram bin edges, length bins + 1.")
    counts_in: tuple[int, ...]
    counts_out: tuple[int, ...]
    roc: tuple[RocPoint, ...]
    auc: float = Field(description="Mann-Whitney, ties count one half.")
    auc_low: float | None = None
    auc_high: float | None = None
    tpr_at_fpr: dict[str, RocPoint | None] = Field(
        default_factory=dict, description="Keys '0.1', '0.01', '0.001'; null = not resolvable with this many records."
    )


class Check(Part):
    """One deterministic or contract check."""

    name: str
    status: Literal["pass", "fail", "not applicable"]
    measured: str
    allowed: str
    explanation: str


class Validity(Part):
    """Whether the game is sound at all."""

    sound: bool
    checks: tuple[Check, ...]


LeakStage = Literal["selection", "centres", "fusion", "normalisation", "padding", "loss"]


class Leak(Part):
    """The first place where one record reaches another. Records are numbered within the audited batch."""

    stage: LeakStage
    observable: str = Field(description="What moved, e.g. 'kept patches' or 'logits'.")
    changed: int | None = Field(description="The record that was changed; null = only order or batch size was.")
    moved: int
    size: Number = Field(description="Relative to the observable's own size; share of entries for selections.")
    largest_gradient_change: Number = Field(description="The most that any partner moved another record's gradient.")
    how: str


class Sensitivity(Part):
    """How far one unit was seen to move the clipped sum."""

    relation: Relation = Field(description="add-remove: the unit is added; zero-out: its loss is masked out.")
    max_grad_norm: float = Field(description="C of this comparison: the run's, or the median gradient norm.")
    largest: float = Field(description="Largest change of the sum over C.")
    bound: float = Field(description="What the guarantee allows: 1, or 2 under replace.")
    holds: bool
    comparisons: int
    how: str = Field(description="The record behind the largest change.")


class ReleasePair(Part):
    """A game over one pair of inputs: which of the two was released? Closed form and measurement."""

    name: str = Field(description="The pair, e.g. 'two pictures of the run'.")
    what: str = Field(description="Which tokens, under which noise.")
    distance: float = Field(description="Norm of the difference of the noiseless tokens.")
    std: float
    mu: Number = Field(description="distance / std: exact for Gaussian noise.")
    epsilon: Number = Field(description="Of that mu at the audit's delta.")
    draws: int = Field(description="Independent releases, each of one of the two by a fair coin.")
    mu_low: float | None = Field(default=None, description="95 % interval from the likelihood-ratio game.")
    mu_high: Number | None = None
    tests: tuple[Test, ...] = ()


class MaskLeak(Part):
    """What the positions of the kept patches tell by themselves; they are a noiseless function of the picture."""

    neighbours: int = Field(description="Pictures, each with one patch inverted.")
    flipped: int = Field(description="Of those, how many kept other patches: told apart by the mask alone.")
    low: float = Field(description="95 % interval of the share (Clopper-Pearson).")
    high: float
    pairs: int = Field(description="Pairs of different pictures.")
    different: int = Field(description="Of those, how many have different masks.")
    identified: int = Field(description="Neighbours whose picture is the nearest by mask (chance: 1 in `neighbours`).")


class Reconstruction(Part):
    """Public pictures rebuilt from released tokens, by a decoder trained on other public pictures."""

    decoder: str = Field(description="'ridge', 'mlp', or 'mean picture' (sees nothing).")
    released: str = Field(description="Which tokens, under which noise.")
    std: float
    multiplier: float | None = Field(default=None, description="z of accounted fusion; null: the paper's noise.")
    pictures: int
    psnr: float = Field(description="dB, mean over pictures, peak 1.")
    psnr_low: float
    psnr_high: float
    ssim: float
    ssim_low: float
    ssim_high: float


class ReleaseAudit(Part):
    """What would leak if visual tokens left the trust boundary. It says nothing about the trained weights."""

    delta: float
    tokens: int = Field(description="Per picture.")
    noiseless: int = Field(description="Of those, how many are the same at every use.")
    epsilon: Number = Field(description="Of publishing all tokens of a picture once.")
    statement: str
    pairs: tuple[ReleasePair, ...] = ()
    masks: MaskLeak | None = None
    reconstructions: tuple[Reconstruction, ...] = ()
    strip_png_base64: str | None = Field(default=None, description="Public pictures and what was rebuilt of them.")
    strip_caption: str | None = None


class Region(Part):
    """Exposure of the codes in one region: log2(references) - log2(rank of the true word), mean over canaries."""

    region: str
    inserted: int
    left_out: int
    exposure_in: float = Field(description="Of inserted canaries, bits.")
    exposure_out: float = Field(description="Of canaries that were left out: what chance gives.")
    gain: float = Field(description="Their difference.")
    gain_low: float = Field(description="95 % interval (Welch).")
    gain_high: float


class Carried(Part):
    """What the path from low-attention patches carries, by fused-region canaries and their twins in dominant ones."""

    references: int
    regions: tuple[Region, ...]
    difference: float = Field(description="Gain in dominant patches minus gain in patches of low attention, bits.")
    difference_low: float
    difference_high: float


class TruthCase(Part):
    """One case of the token path's truth table, and the test that decided whether this run is it."""

    case: str
    applies: bool
    training: LedgerStatus | None = Field(description="If it applies; null: says nothing about the trained weights.")
    release: LedgerStatus | None = Field(description="If tokens leave the trust boundary; null: says nothing of that.")
    decided_by: str
    evidence: str = Field(description="The figures of that test on this run.")


class FusionAudit(Part):
    """The token-fusion path: per-example or not, and what a release of tokens would mean."""

    training: LedgerStatus | Literal["not run"]
    release: LedgerStatus | Literal["not released", "not run"] = Field(
        description="What it would mean if tokens left the trust boundary; 'not released': not examined."
    )
    reducer: str
    first_leaking_stage: str | None = None
    leak: Leak | None = None
    checks: tuple[Check, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    released: ReleaseAudit | None = None
    cases: tuple[TruthCase, ...] = ()
    carried: Carried | None = Field(default=None, description="null: the run has no fused-region canaries.")


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


class ScoresDocument(Document):
    """What `dpaudit scores --json` prints."""

    kind: ClassVar[str] = "scores"
    verdict: Verdict
    reasons: tuple[str, ...]
    claim: Claim | None = None
    alpha: float
    family_confidence: float
    tests: tuple[Test, ...]
    validity: Validity
    scores: tuple[ScoreSummary, ...] = ()


class BoundDocument(Document):
    """What `dpaudit bound --json` prints."""

    kind: ClassVar[str] = "bound"
    method: str
    epsilon_lower: Number
    ceiling: Number
    confidence: float
    delta: float
    assumes: Assumes
    estimate: bool = False


class Metric(Part):
    """A measured utility with its 95 % interval.

    The interval is a bootstrap over clusters of questions that stand or fall together: privacy units of a run's own
    data, pictures of any other task. Where all answers are right, or all wrong, it is the exact Clopper-Pearson limit
    for that many clusters. Null limits: a single cluster, or a metric that can't be resampled.
    """

    value: float
    low: float | None
    high: float | None
    n: int = Field(description="Questions.")
    pictures: int | None = Field(default=None, description="Clusters behind the interval: units, or pictures.")


class Gap(Part):
    """The largest difference in accuracy between two groups of held-out questions, on the same model."""

    task: str
    metric: str
    grouping: str = Field(description="'question kind', 'answer kind' or 'unit group'.")
    best: str = Field(description="Group with the highest value.")
    worst: str = Field(description="Group with the lowest value.")
    value: float = Field(description="best minus worst.")
    low: float | None = Field(description="95 %, bootstrap over clusters, of these two groups' difference.")
    high: float | None
    base: float | None = Field(default=None, description="The base model's difference between the same two groups.")


class TaskAbout(Part):
    """Where the numbers of one task come from: all that is needed to measure them again."""

    headline: str = Field(description="The metric that stands for the task.")
    data: str = Field(description="The run's held-out questions, a local copy, or a set on the hub.")
    scored_by: str = Field(description="Whose metric code it is: lmms-eval's task, or dpaudit's.")
    prompt: str = Field(description="What the model is sent: its own template with the task's words around {question}.")
    max_new_tokens: int
    batch_size: int
    precision: str
    device: str
    lmms_eval_version: str
    questions: int
    pictures: int = Field(description="Different pictures.")
    limit: int | None = Field(default=None, description="Only so many were asked.")


class BenchmarkDocument(Document):
    """`release/benchmark.json`, and what `dpaudit benchmark --json` prints.

    Metric names: METRIC over everything; METRIC/KIND for a question kind, METRIC/answer kind: KIND and METRIC/unit
    group: GROUP for other subgroups. METRIC is `exact_match` for a run's own questions, else what the task calls it.
    Prompt, batch size, precision, device and version beside `tasks` are those of the latest call; `about` has each
    task's own.
    """

    kind: ClassVar[str] = "benchmark"
    tasks: dict[str, dict[str, Metric]]
    base: dict[str, dict[str, Metric]] | None = Field(default=None, description="The base model, same tasks.")
    majority: dict[str, Metric] = Field(
        default_factory=dict,
        description="Per task, one constant answer for each question kind: the commonest of public synthetic pictures "
        "for the embedded data, the commonest of the held-out questions themselves for any other set.",
    )
    gaps: tuple[Gap, ...] = Field(default=(), description="Between subgroups, the widest of each grouping.")
    about: dict[str, TaskAbout] = Field(default_factory=dict, description="Per task.")
    lmms_eval_version: str
    prompt: str
    batch_size: int
    precision: str
    device: str
    sample_sha256: dict[str, str] = Field(description="Per task: hash over questions, answers and pictures.")
    seconds: float


class EnvironmentDocument(Document):
    """`release/environment.json`."""

    kind: ClassVar[str] = "environment"
    dpaudit: str
    python: str
    platform: str
    device: str
    packages: dict[str, str]
    command: str | None = None


class CheckDocument(Document):
    """What `dpaudit check --json` prints."""

    kind: ClassVar[str] = "check"
    verdict: Literal["pass", "fail", "inconclusive"]
    checks: tuple[Check, ...]


class DoctorDocument(Document):
    """What `dpaudit doctor --json` prints."""

    kind: ClassVar[str] = "doctor"
    healthy: bool
    checks: tuple[Check, ...]


DOCUMENTS: tuple[type[Document], ...] = (
    ClaimDocument,
    LedgerDocument,
    AuditDocument,
    ScoresDocument,
    BoundDocument,
    BenchmarkDocument,
    EnvironmentDocument,
    CheckDocument,
    DoctorDocument,
)


def write_schemas(folder: Path, kinds: Sequence[type[Document]] = DOCUMENTS) -> None:
    """Write one `KIND.json` per document; a test keeps the committed files in step with the code."""
    for document in kinds:
        text = json.dumps(document.json_schema(), indent=2, ensure_ascii=False) + "\n"
        (folder / f"{document.kind}.json").write_text(text, encoding="utf-8")
