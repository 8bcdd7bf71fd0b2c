"""What to audit and how strictly: checked in a moment, before anything heavy is imported."""

from dataclasses import dataclass

from dpaudit import config as configuration
from dpaudit import folders, validate
from dpaudit.config import RunConfig
from dpaudit.errors import UsageError, rejected
from dpaudit.runs import RunFolder

TWIN = "twin-canaries"
WHITE_BOX_TWIN = "twin-white-box"
MEMBER_TWIN = "twin-members"

# Audits by flag; the ones that this version does not have are refused by name instead of being skipped.
AVAILABLE = ("canaries", "mia", "fusion", "contract", "white-box")


MOST_REFERENCES = 1024
DIRECTIONS = ("orthogonal", "dirac", "random")


def levels(confidence: float, alpha: float) -> None:
    """Raise UsageError unless both are in (0, 1)."""
    validate.real("--confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    validate.real("--alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)


@dataclass(frozen=True)
class Options:
    """What to audit and how strictly. audits: names out of AVAILABLE, empty = all that the run allows. references:
    reference models of the membership game. directions, final_only: of the gradient canaries, and whether the auditor
    sees the final update only. again: games that were played already are played once more, with fresh coins."""

    audits: tuple[str, ...] = ()
    count: int | None = None
    references: int = 0
    directions: str = "orthogonal"
    final_only: bool = False
    again: bool = False
    confidence: float = 0.95
    alpha: float = 0.001
    device: str = "auto"
    command: str | None = None

    def __post_init__(self) -> None:
        for name in self.audits:
            if name not in AVAILABLE:
                flags = " ".join(f"--{known}" for known in AVAILABLE)
                raise UsageError(f"--{name}: this version of dpaudit has no such audit; accepted: {flags}")
        if self.count is not None:
            validate.count("--count", self.count, least=1)
        if self.directions not in DIRECTIONS:
            raise rejected("--directions", self.directions, DIRECTIONS)
        if (self.directions != DIRECTIONS[0] or self.final_only) and "white-box" not in self.audits:
            raise UsageError("--directions, --final-only: belong to the gradient canaries; give --white-box with them")
        validate.count("--references", self.references, most=MOST_REFERENCES)
        if self.references and "mia" not in self.audits:
            raise UsageError("--references: reference models serve membership inference; give --mia with it")
        levels(self.confidence, self.alpha)

    def named(self, config: RunConfig) -> tuple[str, ...]:
        """The audits to run on a run with this configuration: those that need no further training or minutes."""
        if self.audits:
            return self.audits
        return ("canaries", "fusion") if config.canaries.count else ("fusion",)


def prepare(run: RunFolder, options: Options) -> RunConfig:
    """Check that the run is whole and that the options fit it; returns its configuration. Raises UsageError."""
    run.require_finished()
    config = run.read_config()
    for name in ("white-box", "contract"):
        if name in options.audits and not config.claims:
            why = "method non-private" if config.method == "non-private" else "privacy.epsilon=inf"
            raise UsageError(f"--{name}: the run makes no claim ({why}), so there is nothing to audit")
    if "white-box" in options.audits and config.model.lora.train == "alternating":
        raise UsageError(
            "--white-box: model.lora.train=alternating noises half of the blocks; gradient canaries need all"
        )
    if "white-box" in options.audits and config.pruning.by == "previous" and config.pruning.keep < 1:
        raise UsageError("--white-box: pruning.by=previous noises some blocks a step; gradient canaries need them all")
    if config.method == "dp-zo":
        _zeroth_order(config, options)
    if "white-box" in options.audits:
        from attacks.games.twins import PLAYED, refusal

        if config.training.sampling not in PLAYED:
            raise UsageError(refusal(config.training.sampling))
    if options.count is None:
        return config
    if not {"canaries", "white-box"} & set(options.named(config)):
        raise UsageError("--count: sets the canaries of a twin; give --canaries or --white-box with it")
    if "canaries" not in options.named(config):
        return config
    have, where = config.canaries.count, "this run was trained"
    if options.again:
        return config
    twin = RunFolder(run.path / TWIN)
    folders.require_own(twin.path)
    if not have and twin.config.is_file():
        have = configuration.resolve(configuration.read_yaml(twin.config)).canaries.count
        where = f"{twin.path} was trained; delete it for another count"
    if have and have != options.count:
        raise rejected("--count", options.count, f"{have}, with which {where}")
    return config


def _zeroth_order(config: RunConfig, options: Options) -> None:
    """What the audits by gradient can't judge. Raises UsageError."""
    chosen = config.zeroth_order
    if "white-box" in options.audits:
        raise UsageError("--white-box: the run is of method dp-zo, whose forward passes take no gradient canaries")
    if "contract" in options.audits and (chosen.noise, chosen.directions) != ("gaussian", 1):
        what = f"{chosen.noise} noise on {chosen.directions} direction{'s'[: chosen.directions - 1]}"
        raise UsageError(
            f"--contract: judges zeroth-order steps with gaussian noise on 1 direction; this run has {what}"
        )
