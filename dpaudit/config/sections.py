"""The sections of a configuration: typed, strict, with what each field accepts.

Field names use dashes on the outside (`data.train-images`) and underscores inside.
"""

import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Method = Literal["non-private", "dp-sgd", "dual-priv", "dp-zo"]
ReducerName = Literal["none", "random", "cls-topk", "visionzip", "tome", "divprune"]
CanaryKind = Literal[
    "mislabelled", "noise", "new-token", "natural", "blank", "out-of-distribution", "rendered-code", "cross-modal",
    "rare-answer", "high-perplexity", "orthogonal", "fused-region", "optimised",
    "sampled",
]  # fmt: skip


# What a training may have at most: beyond, numbers overflow and no accountant is asked.
MOST_UNITS, MOST_STEPS = 10**12, 10**8
MOST_CANARIES = 10**6  # each is a unit of its own, held in memory


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


def dashed(name: str) -> str:
    return name.replace("_", "-")


def public_path(text: str | None) -> str | None:
    """A path that leads elsewhere (/…, ~…, ../…) cut to its last part; others and hub ids (`org/model`) as they are."""
    return PurePosixPath(text).name if text is not None and text.startswith(("/", "~", "..")) else text


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, alias_generator=dashed)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """`privacy.epsilon=true` is a slip, not eps = 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class DataConfig(Section):
    """Which data: `name` is 'digits' (embedded) or a set on the hub; `path`, `train` and `test` name local files."""

    name: str | None = Field(default=None, description="'digits' or a hub name; default digits without a path")
    path: str | None = Field(default=None, description="folder of a local data set")
    subset: str | None = Field(default=None, description="configuration name of a hub set that has several")
    train: str | None = Field(default=None, description="file or folder inside data.path, or a split of a hub set")
    test: str | None = Field(default=None, description="the same for the held-out questions")
    train_images: str | None = Field(default=None, description="table of pictures by image_id, or a folder of them")
    test_images: str | None = Field(default=None, description="the same for the held-out questions")
    post_prompt: str | None = Field(default=None, description="text behind every question; default: by the format")
    background: str = Field(default="white", description="colour behind transparency: white, black, grey, #rrggbb")
    frames: Literal["refuse", "first", "all"] = Field(
        default="refuse", description="animations and files of several pages: refused, their first frame, or all"
    )
    unit: str | None = Field(default=None, description="column that names the privacy unit; default: the picture")
    reserve: int = Field(default=0, ge=0, description="local sets: units held back from training for natural canaries")
    limit: int | None = Field(default=None, ge=2, description="use only the first N train units (and N test units)")
    public_size: int | None = Field(
        default=None,
        ge=1,
        le=MOST_UNITS,
        description="declared public size of the training set; default: its true size, made public",
    )

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        if not re.fullmatch(r"white|black|grey|#[0-9a-fA-F]{6}", value):
            raise ValueError("must be white, black, grey or #rrggbb")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if self.path is not None and self.name is not None:
            raise ValueError("give either data.name or data.path, not both")
        if self.path is not None and (self.train is None or self.test is None):
            raise ValueError("data.path needs data.train and data.test (file names inside it)")
        return self


# What PEFT offers beyond plain LoRA, with what to use instead, and what PEFT calls by another name.
_NO_ADAPTER_SETTING = {
    "dora": "its norm of a whole matrix has no per-unit gradient; use a higher rank",
    "dropout": "a resumed run could not draw its masks again; use training.weight-decay or a lower rank",
    "rank-pattern": "one rank for all modules; choose them by targets",
    "alpha-pattern": "one alpha for all modules; choose them by targets",
    "modules-to-save": "whole modules, tied embeddings among them, can't be clipped per unit; use targets",
    "bias": "trained biases are not clipped per unit; leave it out",
    "rslora": "give alpha times the root of rank instead",
    "init-weights": "A is drawn from the run's key and B is 0; other starts may look at data",
    "tower": "the vision tower stays frozen, its tokens are computed once and its rows would be tiles; use projector",
}
_SAME_SETTING = {
    "use-dora": "dora",
    "lora-dropout": "dropout",
    "use-rslora": "rslora",
    "lora-bias": "bias",
    "init-lora-weights": "init-weights",
    "vision-tower": "tower",
}
_OUR_NAME = {"r": "rank", "lora-alpha": "alpha", "target-modules": "targets"}


ALL_LINEAR = "all-linear"


class LoraConfig(Section):
    """Low-rank adapters on the language model, through peft."""

    @model_validator(mode="before")
    @classmethod
    def _plain_lora_only(cls, given: object) -> object:
        for name in map(dashed, map(str, given if isinstance(given, dict) else ())):
            if name in _OUR_NAME:
                raise ValueError(f"{name} is called {_OUR_NAME[name]} here")
            why = _NO_ADAPTER_SETTING.get(_SAME_SETTING.get(name, name))
            if why is not None:
                raise ValueError(f"{name} is not supported: {why}")
        return given

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear(cls, given: object) -> object:
        """PEFT's word for all of them stands alone."""
        if isinstance(given, str):
            given = [given]
            if given != [ALL_LINEAR]:
                raise ValueError(f"accepted: {ALL_LINEAR}, or a list of names")
        if isinstance(given, list | tuple) and ALL_LINEAR in given and len(given) > 1:
            raise ValueError(f"{ALL_LINEAR} means every linear layer; name it alone")
        return given

    rank: int = Field(default=8, ge=1, description="of the two factors A and B")
    alpha: Finite = Field(default=16.0, gt=0, description="the product of the factors is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of linear layers of the language model, or all-linear",
    )
    projector: bool = Field(default=False, description="also adapt the multimodal projector")
    train: Literal["both", "b", "alternating"] = Field(
        default="both", description="b: A stays as drawn (FFA-LoRA); alternating: B in odd steps, A in even ones"
    )


class ModelConfig(Section):
    """The model to fine-tune."""

    path: str | None = Field(default=None, description="folder or hub id; default: the reference model of the package")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: a GPU where there is one"
    )
    precision: Literal["float32", "bfloat16", "nf4"] = Field(
        default="float32",
        description="of the frozen model; adapters, clipping and noise are float32 in any case. nf4: linear layers of "
        "the language model in 4 bits (bitsandbytes), the rest in bfloat16",
    )
    lora: LoraConfig = LoraConfig()


class ReducerConfig(Section):
    """Visual token pruning and fusion. `keep` = K dominant patches, `fuse` = k fused tokens."""

    name: ReducerName = Field(default="none", description="docs/methods.md describes each")
    keep: int | None = Field(
        default=None, ge=1, description="default: 54 of 576 patches (VisionZip), in proportion to the checkpoint's"
    )
    fuse: int | None = Field(default=None, ge=0, description="default: 10 of 576 patches, in proportion")
    layer: int | None = Field(
        default=None, description="encoder layer whose attention and keys choose and assign; default: by the checkpoint"
    )
    feature_layer: int | None = Field(
        default=None, description="encoder layer whose features the projector gets; default: the checkpoint's own"
    )
    assign: Literal["keys", "tokens"] = Field(
        default="keys", description="what the cosine compares when other patches join a centre"
    )
    noise: Literal["none", "sum", "mean"] | Finite = Field(
        default="none", description="fusion noise std: 'sum' = sigma*C, 'mean' = sigma*C/B, or a number"
    )


class FusionConfig(Section):
    """Visual tokens that may leave the trust boundary; see docs/fusion-path.md."""

    release: Literal["none", "clip-noise"] = Field(
        default="none", description="clip-noise: tokens are clipped and noised once, and may then be published"
    )
    radius: Finite | None = Field(default=None, gt=0, description="R: all tokens of a unit are clipped to this norm")
    multiplier: Finite | None = Field(default=None, gt=0, description="z: noise std of the tokens over R")


class PrivacyConfig(Section):
    """The claim that the run makes. Either `epsilon` or `noise-multiplier`; a non-private run uses neither."""

    epsilon: Annotated[Finite, Field(ge=1e-6, le=1e6)] | Literal["inf"] | None = Field(
        default=8.0, description="the target; inf: the method clips and adds no noise, and claims no privacy"
    )
    delta: Finite = Field(default=1e-5, gt=0, lt=1, description="below 1/n")
    noise_multiplier: Finite | None = Field(default=None, ge=1e-6, le=1e6, description="sigma, instead of epsilon")
    max_grad_norm: Finite = Field(default=1.0, gt=0, description="C, the clip norm of one unit")
    clipping: Literal["flat", "automatic"] = Field(
        default="flat", description="automatic: every unit to C norm / (norm + 0.01), small gradients too (AUTO-S)"
    )
    relation: Literal["add-remove", "zero-out", "replace"] = Field(
        default="add-remove", description="in what neighbouring data sets differ; docs/accounting.md"
    )
    noise: Literal["plain", "secure"] = Field(
        default="plain", description="secure: half the sum of four normals, against attacks on floating-point noise"
    )

    @field_validator("epsilon", mode="before")
    @classmethod
    def _no_bound(cls, value: object) -> object:
        """YAML's `.inf` and the command line's `inf` are one value, which JSON can hold."""
        return "inf" if value == float("inf") else value


class PruningConfig(Section):
    """Gradient-update pruning on the noisy gradient (post-processing). `keep` = fraction of blocks updated."""

    keep: Finite = Field(default=1.0, gt=0, le=1, description="share of the blocks that is updated")
    by: Literal["magnitude", "magnitude-normalised", "random", "previous"] = Field(
        default="magnitude", description="how the blocks are chosen; docs/methods.md"
    )
    granularity: Literal["matrix", "layer"] = Field(
        default="matrix", description="a block is one LoRA matrix, or all of a decoder layer"
    )
    decay: Finite = Field(default=0.9, ge=0, lt=1, description="by 'previous': weight of the past in a block's rank")
    explore: Finite = Field(
        default=0.1, ge=0, le=1, description="by 'previous': share of the kept blocks that is drawn at random"
    )


class ZerothOrderConfig(Section):
    """Method dp-zo: loss differences along public random directions; see docs/methods.md."""

    noise: Literal["gaussian", "laplace"] = Field(default="gaussian", description="law of the noise on the differences")
    directions: int = Field(default=1, ge=1, description="public directions a step, two forward passes each")
    perturbation: Finite = Field(default=1e-3, gt=0, description="how far along a direction the loss is taken")


class TrainingConfig(Section):
    """The optimisation. `batch-size` is the expected batch; steps = epochs * candidates / batch-size."""

    epochs: Finite = Field(default=30.0, gt=0, le=MOST_STEPS, description="expected passes over the units")
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS, description="overrides epochs")
    batch_size: int = Field(default=256, ge=1, le=MOST_UNITS, description="expected number of units in a batch")
    sampling: Literal["poisson", "fixed", "shuffle", "allocation"] = Field(
        default="poisson",
        description="fixed: a uniform subset of batch-size; shuffle: epochs; allocation: every unit draws its steps of "
        "an epoch by itself; see docs/accounting.md",
    )
    draws: int = Field(
        default=1,
        ge=1,
        le=MOST_STEPS,
        description="allocation: steps of an epoch that a unit is in; an epoch has draws * n / batch",
    )
    optimizer: Literal["adamw", "adambc", "sgd"] = Field(
        default="adamw", description="adambc: AdamW whose second moment has the noise's own variance taken out"
    )
    learning_rate: Finite = Field(default=1e-3, gt=0, description="the largest of the schedule")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="after the warm-up")
    warmup: Finite = Field(default=0.05, ge=0, lt=1, description="fraction of the steps")
    weight_decay: Finite = Field(default=0.0, ge=0, description="as the optimiser defines it")
    beta1: Finite = Field(default=0.9, ge=0, lt=1, description="of adamw and adambc: decay of the first moment")
    beta2: Finite = Field(default=0.999, ge=0, lt=1, description="the same of the second moment")
    adam_epsilon: Finite = Field(default=1e-8, gt=0, description="of adamw and adambc: added to the divisor")
    variance_floor: Finite = Field(
        default=0.1, gt=0, description="adambc: least corrected second moment, as a share of the noise's variance"
    )
    momentum: Finite = Field(default=0.9, ge=0, lt=1, description="of sgd")
    average: Finite = Field(
        default=0.0, ge=0, lt=1, description="release an exponential mean of all steps' weights with this decay; 0: no"
    )
    augmentations: int = Field(
        default=1, ge=1, le=64, description="copies of each picture in its unit's gradient, all but the first shifted"
    )
    gradient_path: Literal["auto", "micro-batch", "hooks", "ghost", "rows"] = Field(
        default="auto", description="how clipped sums are computed; all give the same sum (docs/models.md)"
    )
    rows_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="rows of a physical batch; auto: at most 64, as many as training.memory holds"
    )
    memory: Finite = Field(
        default=8.0, gt=0, description="GiB that a physical batch may take, activations and per-row gradients"
    )
    gradient_checkpointing: Literal["none", "auto", "reentrant", "non-reentrant"] = Field(
        default="none", description="recompute the decoder's layers in the backward pass; auto: the kind that fits"
    )
    feature_cache: Literal["auto", "always", "never"] = Field(
        default="auto", description="keep the tower's outputs on disk, in the run's private part; auto: a large tower"
    )
    parallel: Literal["data", "fsdp"] = Field(
        default="data", description="with several ranks: every rank holds the whole base model, or a share (fsdp)"
    )
    checkpoint_every: int = Field(default=20, ge=1, description="steps between two checkpoints")


class CanaryConfig(Section):
    """Canaries: `count` candidates, each inserted when its fair coin says so."""

    count: int = Field(default=0, ge=0, le=MOST_CANARIES, description="number of candidates")
    kinds: tuple[CanaryKind, ...] = Field(
        default=("mislabelled", "noise", "new-token"),
        description="default without data.reserve (own data): noise, new-token; mislabelled needs records held back",
    )


class PlantedConfig(Section):
    """Deliberate faults, to test an audit. A run that uses one says so in its ledger and can't be released."""

    noise_scale: Finite = Field(default=1.0, ge=0, description="the noise really added, relative to the claim")


class RunConfig(Section):
    """Everything that defines a run."""

    method: Method = Field(default="dp-sgd", description="docs/methods.md describes each")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="replaces the secret key: not for release")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    reducer: ReducerConfig = ReducerConfig()
    fusion: FusionConfig = FusionConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    pruning: PruningConfig = PruningConfig()
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()
    training: TrainingConfig = TrainingConfig()
    canaries: CanaryConfig = CanaryConfig()
    planted: PlantedConfig = PlantedConfig()

    @property
    def claims(self) -> bool:
        """Whether the run claims a finite eps: it clips and adds noise."""
        return self.method != "non-private" and self.privacy.epsilon != "inf"

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)

    def public(self) -> "RunConfig":
        """The same without the folders of a machine: paths name users and projects, so only their last part stays."""
        data = self.data.model_copy(update={"path": public_path(self.data.path)})
        model = self.model.model_copy(update={"path": public_path(self.model.path)})
        return self.model_copy(update={"data": data, "model": model})

    def sha256(self) -> str:
        """Hash of the resolved configuration."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
