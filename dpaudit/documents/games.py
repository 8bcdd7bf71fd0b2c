"""What a game or a check found: tests and bounds, summaries of scores, and whether the game is sound at all."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from dpaudit.documents.base import Document, Number, Part
from dpaudit.documents.claim import Claim

Assumes = Literal["none", "gaussian", "laplace", "dp-sgd(q,T)", "claimed-mechanism", "prior"]
Verdict = Literal["invalid", "refuted", "unsupported", "inconclusive", "not refuted", "no claim"]


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
    power: float | None = Field(
        default=None,
        description="Probability that the game as played refutes the alternative; null: not earned by a control.",
    )
    power_low: float | None = Field(default=None, description="Lower limit of its simulation, 99 %.")
    e_value: Number | None = Field(
        default=None,
        description="Evidence against the claim: mean at most 1 while the claim holds. null: no such test.",
    )
    share: float = Field(default=1.0, description="Of the game's evidence, fixed with the coins.")
    level: float | None = Field(
        default=None, description="At which this test refutes by itself: alpha times its share."
    )
    refutes: bool | None = Field(default=None, description="Whether it refutes by itself; set by the judge alone.")
    control: str | None = Field(default=None, description="What earned the power, or why there is none.")
    estimate: bool = Field(default=False, description="True: no finite-sample validity, never decides a verdict.")
    decides: bool = Field(default=True, description="False: for information; does not affect the verdict.")


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
    waived: str | None = Field(
        default=None, description="Why a failed check was waived by whoever ran it; it then fails nothing else."
    )


class Control(Part):
    """What shows that a game could have seen something.

    earned: the channel carries what the power assumes. not earned: no power is stated. failed: the game is invalid.
    broken: the training contradicts the claim without any chance in it (under frozen noise one unit moves the release
    by more than C), so the claim is unsupported.
    """

    name: Literal[
        "liveness",
        "amplitude",
        "records",
        "noise level",
        "independent steps",
        "law of the noise",
        "released blocks",
        "batch sizes",
        "known leak",
        "p-value",
    ]
    outcome: Literal["earned", "not earned", "failed", "broken"]
    measured: str
    allowed: str
    explanation: str

    @property
    def broken(self) -> bool:
        """Whether it contradicts the claim's proof: the training does not do what that assumes."""
        return self.outcome == "broken"


class Validity(Part):
    """Whether the game is sound at all."""

    sound: bool
    checks: tuple[Check, ...]


class ScoresDocument(Document):
    """What `dpaudit scores --json` prints."""

    kind: Literal["scores"] = "scores"
    verdict: Verdict
    reasons: tuple[str, ...]
    claim: Claim | None = None
    alternative: str | None = Field(default=None, description="What the earned power is against.")
    alpha: float
    family_confidence: float
    tests: tuple[Test, ...]
    validity: Validity
    controls: tuple[Control, ...] = ()
    scores: tuple[ScoreSummary, ...] = ()


class BoundDocument(Document):
    """What `dpaudit bound --json` prints."""

    kind: Literal["bound"] = "bound"
    method: str
    epsilon_lower: Number
    ceiling: Number
    confidence: float
    delta: float
    assumes: Assumes
    estimate: bool = False


class FactorySource(Part):
    """Where the factory under test is defined; `file` is relative to the working directory where that is possible."""

    name: str
    file: str | None = None
    line: int = 1


class CheckDocument(Document):
    """What `dpaudit check --json` prints."""

    kind: Literal["check"] = "check"
    verdict: Literal["pass", "fail", "inconclusive"]
    checks: tuple[Check, ...]
    factory: FactorySource | None = Field(default=None, description="Whose step it is, and where it is defined.")
    problem: str | None = Field(
        default=None,
        description="Why the trainer could not be asked to the end (exit code 2); checks holds what was made.",
    )
    epsilon: Number | None = Field(default=None, description="The eps stated from outside (--epsilon).")
    delta: float | None = Field(default=None, description="The delta that belongs to it.")
    seconds: dict[str, float] = Field(default={}, description="Time of each check; what several need counts once.")
    builds: int = Field(default=0, description="How often the factory was called.")
    factory_seconds: float = Field(default=0.0, description="Time spent in the factory.")
    steps: int = Field(default=0, description="Steps that were taken and observed.")

    def unneeded(self, allowed: Iterable[str]) -> tuple[str, ...]:
        """Those of the waivers that nothing made use of."""
        used = {check.name for check in self.checks if check.waived is not None}
        return tuple(name for name in allowed if name not in used)
