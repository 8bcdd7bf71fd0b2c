"""What to audit and how strictly, checked in a moment, before foreign code or anything heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attacks.options import levels
from dpaudit import validate
from dpaudit.errors import UsageError, rejected

AUDITS = ("canaries", "white-box", "contract")
LEAST_RUNS = 20  # fair coins leave one of the two classes empty once in 500,000 games of 20 runs
MOST_CANARIES = 100_000


@dataclass(frozen=True)
class TrainerOptions:
    """The audit of a trainer under test.

    target: "module:factory". arguments: further keyword arguments of the factory. audits: names out of AUDITS, empty =
    all that the trainer offers. count: canaries of a one-run game. runs: trainings of the multi-run audit. steps: of
    each training (None: the claim's). epsilon, delta: the claim (None: as the trainer says). seed: replaces the secret
    key of the coins and the fresh noise. time_limit: seconds that one call of the trainer may take.
    """

    target: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    audits: tuple[str, ...] = ()
    count: int | None = None
    runs: int | None = None
    steps: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    confidence: float = 0.95
    alpha: float = 0.001
    seed: int | None = None
    time_limit: float = 30.0
    command: str | None = None

    def __post_init__(self) -> None:
        for name in self.audits:
            if name not in AUDITS:
                flags = " ".join(f"--{known}" for known in AUDITS)
                raise UsageError(f"--{name}: there is no such audit of a trainer; accepted: {flags} --runs N")
        if self.count is not None:
            validate.count("--count", self.count, least=2, most=MOST_CANARIES)
        if self.runs is not None:
            validate.count("--runs", self.runs, least=LEAST_RUNS, most=10**6)
        if self.steps is not None:
            validate.count("--steps", self.steps, least=1)
        _claim_numbers(self.epsilon, self.delta)
        levels(self.confidence, self.alpha)
        validate.real("--time-limit", self.time_limit, low=0.0, high=86_400.0, open_low=True)
        if self.count is not None and self.audits and not {"canaries", "white-box"} & set(self.audits):
            raise UsageError("--count: sets the canaries of a game; give --canaries or --white-box with it")


@dataclass(frozen=True)
class ModelOptions:
    """The audit of a model that is already trained.

    sigma, rate, steps: the claimed mechanism, all three or none; it sharpens the test of the claim.
    """

    model: Path
    base: str
    records: Path
    coins: Path
    epsilon: float
    delta: float
    images: Path | None = None
    sigma: float | None = None
    rate: float | None = None
    steps: int | None = None
    confidence: float = 0.95
    alpha: float = 0.001
    device: str = "auto"
    seed: int = 0
    command: str | None = None

    def __post_init__(self) -> None:
        _claim_numbers(self.epsilon, self.delta)
        levels(self.confidence, self.alpha)
        if self.device not in ("auto", "cpu", "mps") and not self.device.startswith("cuda"):
            raise rejected("--device", self.device, "auto, cpu, cuda or mps")


def _claim_numbers(epsilon: float | None, delta: float | None) -> None:
    if epsilon is not None:
        validate.real("--epsilon", epsilon, low=0.0, high=500.0, open_low=True)
    if delta is not None:
        validate.real("--delta", delta, low=0.0, high=1.0, open_low=True, open_high=True)
