"""The token-fusion path: what leaks between records, and what would leak if tokens were released."""

from typing import Literal

from pydantic import Field

from dpaudit.documents.base import Number, Part
from dpaudit.documents.claim import LedgerStatus, Relation
from dpaudit.documents.games import Check, Test

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
    """What the path from low-attention patches carries: fused-region canaries against counterparts in dominant ones."""

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
