"""The configuration of one run: typed, strict, and resolved before anything is computed.

`-c run.yaml` and `key.sub=value` both end here. Every error is one line that names the field, the value and what is
accepted. Field names use dashes on the outside (`data.train-images`) and underscores inside.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dpaudit.errors import UsageError, rejected
from dpaudit.untrusted import MOST_CONFIGURATION, read_bytes

Method = Literal["non-private", "dp-sgd", "dual-priv", "dp-zo"]
ReducerName = Literal["none", "random", "cls-topk", "visionzip", "tome", "divprune"]
CanaryKind = Literal[
    "mislabelled", "noise", "new-token", "natural", "blank", "out-of-distribution", "rendered-code", "cross-modal",
    "rare-answer", "high-perplexity", "orthogonal", "fused-region", "optimised",
]  # fmt: skip


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def public_path(text: str | None) -> str | None:
    """A path that leads elsewhere (/…, ~…, ../…) cut to its last part; others and hub ids (`org/model`) as they are."""
    return PurePosixPath(text).name if text is not None and text.startswith(("/", "~", "..")) else text


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, alias_generator=_dashed)

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
    train: str | None = None
    test: str | None = None
    train_images: str | None = None
    test_images: str | None = None
    unit: str | None = Field(default=None, description="column that names the privacy unit; default: the picture")
    reserve: int = Field(default=0, ge=0, description="local sets: units held back from training for natural canaries")
    limit: int | None = Field(default=None, ge=2, description="use only the first N train units (and N test units)")
    public_size: int | None = Field(
        default=None, ge=1, description="declared public size of the training set; default: its true size, made public"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if self.path is not None and self.name is not None:
            raise ValueError("give either data.name or data.path, not both")
        if self.path is not None and (self.train is None or self.test is None):
            raise ValueError("data.path needs data.train and data.test (file names inside it)")
        return self


# What PEFT offers beyond plain LoRA, with the way out, and what PEFT calls by another name.
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


class LoraConfig(Section):
    """Low-rank adapters on the language model, through peft."""

    @model_validator(mode="before")
    @classmethod
    def _plain_lora_only(cls, given: object) -> object:
        for name in map(_dashed, map(str, given if isinstance(given, dict) else ())):
            if name in _OUR_NAME:
                raise ValueError(f"{name} is called {_OUR_NAME[name]} here")
            why = _NO_ADAPTER_SETTING.get(_SAME_SETTING.get(name, name))
            if why is not None:
                raise ValueError(f"{name} is not supported: {why}")
        return given

    rank: int = Field(default=8, ge=1)
    alpha: Finite = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    projector: bool = Field(default=False, description="also adapt the multimodal projector")


class ModelConfig(Section):
    """The model to fine-tune."""

    path: str | None = Field(default=None, description="folder or hub id; default: the reference model of the package")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the frozen model; adapters, clipping and noise are float32 in any case"
    )
    lora: LoraConfig = LoraConfig()


class ReducerConfig(Section):
    """Visual token pruning and fusion. `keep` = K dominant patches, `fuse` = k fused tokens."""

    name: ReducerName = "none"
    keep: int = Field(default=16, ge=1)
    fuse: int = Field(default=8, ge=0)
    layer: int = Field(default=-2, description="encoder layer whose attention and features are used (LLaVA: -2)")
    noise: Literal["none", "sum", "mean"] | Finite = Field(
        default="none", description="fusion noise std: 'sum' = sigma*C, 'mean' = sigma*C/B, or a number"
    )


class FusionConfig(Section):
    """Visual tokens that may leave the trust boundary; see trainers.fusion and docs/fusion-path.md."""

    release: Literal["none", "clip-noise"] = "none"
    radius: Finite | None = Field(default=None, gt=0, description="R: all tokens of a unit are clipped to this norm")
    multiplier: Finite | None = Field(default=None, gt=0, description="z: noise std of the tokens over R")


class PrivacyConfig(Section):
    """The claim that the run makes. Either `epsilon` or `noise-multiplier`; a non-private run uses neither."""

    epsilon: Finite | None = Field(default=8.0, gt=0, description="for no claim at all: method=non-private")
    delta: Finite = Field(default=1e-5, gt=0, lt=1)
    noise_multiplier: Finite | None = Field(default=None, gt=0)
    max_grad_norm: Finite = Field(default=1.0, gt=0)
    relation: Literal["add-remove", "zero-out", "replace"] = "add-remove"
    noise: Literal["plain", "secure"] = Field(
        default="plain", description="secure: half the sum of four normals, against attacks on floating-point noise"
    )


class PruningConfig(Section):
    """Gradient-update pruning on the noisy gradient (post-processing). `keep` = fraction of blocks updated."""

    keep: Finite = Field(default=1.0, gt=0, le=1)
    by: Literal["magnitude", "magnitude-normalised", "random", "previous"] = "magnitude"
    granularity: Literal["matrix", "layer"] = Field(
        default="matrix", description="a block is one LoRA matrix, or all of a decoder layer"
    )
    decay: Finite = Field(default=0.9, ge=0, lt=1, description="by 'previous': weight of the past in a block's rank")
    explore: Finite = Field(
        default=0.1, ge=0, le=1, description="by 'previous': share of the kept blocks that is drawn at random"
    )


class ZerothOrderConfig(Section):
    """Method dp-zo: loss differences along public random directions; see trainers.zeroth_order."""

    noise: Literal["gaussian", "laplace"] = "gaussian"
    directions: int = Field(default=1, ge=1, description="public directions a step, two forward passes each")
    perturbation: Finite = Field(default=1e-3, gt=0, description="how far along a direction the loss is taken")


class TrainingConfig(Section):
    """The optimisation. `batch-size` is the expected batch; steps = epochs * candidates / batch-size."""

    epochs: Finite = Field(default=30.0, gt=0)
    steps: int | None = Field(default=None, ge=1, description="overrides epochs")
    batch_size: int = Field(default=256, ge=1)
    sampling: Literal["poisson", "fixed", "shuffle"] = Field(
        default="poisson", description="fixed: a uniform subset of batch-size; shuffle: epochs; see docs/accounting.md"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Finite = Field(default=1e-3, gt=0)
    weight_decay: Finite = Field(default=0.0, ge=0)
    warmup: Finite = Field(default=0.05, ge=0, lt=1, description="fraction of the steps")
    gradient_path: Literal["auto", "micro-batch", "hooks"] = "auto"
    rows_at_once: int = Field(default=64, ge=1, description="pictures per physical batch of the fast path")
    gradient_checkpointing: Literal["none", "auto", "reentrant", "non-reentrant"] = Field(
        default="none", description="recompute the decoder's layers in the backward pass; auto: the kind that fits"
    )
    feature_cache: Literal["auto", "always", "never"] = Field(
        default="auto", description="keep what the tower said on disk, in the run's private part; auto: a large tower"
    )
    parallel: Literal["data", "fsdp"] = Field(
        default="data", description="with several ranks: every rank holds the whole base model, or a share (fsdp)"
    )
    checkpoint_every: int = Field(default=20, ge=1, description="steps")


class CanaryConfig(Section):
    """Canaries: `count` candidates, each inserted when its fair coin says so."""

    count: int = Field(default=0, ge=0)
    kinds: tuple[CanaryKind, ...] = ("mislabelled", "noise", "new-token")


class PlantedConfig(Section):
    """Deliberate faults, to test an audit. A run that uses one says so in its ledger and can't be released."""

    noise_scale: Finite = Field(default=1.0, ge=0, description="the noise really added, relative to the claim")


class RunConfig(Section):
    """Everything that defines a run."""

    method: Method = "dp-sgd"
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


# What a method means before the user changes anything: the paper's switches for dual-priv, all off otherwise.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "non-private": {},
    "dp-sgd": {},
    "dual-priv": {"reducer": {"name": "visionzip", "noise": "mean"}, "pruning": {"keep": 0.8}},
    "dp-zo": {},
}

# Settings for the compact reference model, chosen on public synthetic pictures (trainers/public/base/README.md). A
# checkpoint of one's own (model.path) starts from the field defaults instead.
_PRIVATE_SETTINGS = {"model": {"lora": {"rank": 4}}, "training": {"epochs": 20.0, "learning-rate": 1e-2}}
_PLAIN_TRAINING = {"epochs": 40.0, "batch-size": 32, "learning-rate": 5e-3}
REFERENCE_DEFAULTS: dict[str, dict[str, Any]] = {
    "non-private": {"model": {"lora": {"rank": 4}}, "training": _PLAIN_TRAINING},
    "dp-sgd": _PRIVATE_SETTINGS,
    "dual-priv": _PRIVATE_SETTINGS,
    # Along one direction a step learns one number: many small steps, and C for a number instead of a gradient.
    "dp-zo": {
        "model": {"lora": {"rank": 4}},
        "privacy": {"max-grad-norm": 4.0},
        "training": {"epochs": 40.0, "batch-size": 32, "learning-rate": 4e-3},
    },
}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _normalise(tree: dict[str, Any]) -> dict[str, Any]:
    """Accept underscores for dashes in keys, so that `batch_size` and `batch-size` are one field."""
    return {_dashed(str(key)): _normalise(value) if isinstance(value, dict) else value for key, value in tree.items()}


class _Loader(yaml.SafeLoader):
    """Plain YAML: no anchors (a few lines of them can expand to gigabytes, or never end), no key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [child.value for child, _ in node.value if isinstance(child, yaml.ScalarNode)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise yaml.YAMLError(f"{sorted(twice)[0]} is given twice")
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """The tree of a YAML text; YAMLError for everything that can't be one."""
    try:
        tree = yaml.load(text, _Loader)
        repr(tree)  # refuses integers of more than 4,300 digits, which no message could show
    except (ValueError, OverflowError) as error:  # dates and integers that YAML's own conversion refuses
        raise yaml.YAMLError(str(error)) from error
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """`key.sub=value` as a nested dict; the value is YAML (`null`, `true`, `[a, b]`, `0.5`, text)."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise rejected("override", text, "key.sub=value")
    try:
        tree: Any = _load_yaml(value) if value else None
    except yaml.YAMLError as error:
        raise rejected(_short(key), value, f"a YAML value ({' '.join(str(error).split())[:120]})") from error
    if isinstance(tree, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-5 as text
            tree = float(tree)
    for part in reversed(key.split(".")):
        tree = {_dashed(part): tree}
    assert isinstance(tree, dict)
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a tree; one clear line when it is missing or not a mapping."""
    try:
        tree = _load_yaml(read_bytes(path, MOST_CONFIGURATION).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"--config {path}: must be a mapping of fields, got {type(tree).__name__}")
    return _normalise(tree)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _where(error: Any) -> str:
    """The field, without pydantic's names for the branches of a union."""
    parts = [_dashed(str(part)) for part in error["loc"] if not str(part).startswith(("literal[", "function-"))]
    return _short(".".join(parts))


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    where = _where(first)
    if first["type"] == "extra_forbidden":
        # A key can be any text: one that is blank or holds control characters is quoted, so that the line stays one.
        shown = where if where.isprintable() and where.strip() else repr(where)
        return f"{_short(shown)}: no such field{_suggestion(where)}"
    # A field of several types has one error for each.
    same = [_accepted(other) for other in error.errors() if _where(other) == where]
    text = " or ".join(dict.fromkeys(same))
    return f"{where}: got {_short(repr(first.get('input')))}; {text}" if where else text


def _accepted(error: Any) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "should be a mapping of fields"
    if error["type"] == "string_pattern_mismatch":
        return "accepted: auto, cpu, mps, cuda or cuda:N"  # the only field with a pattern
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text[0].lower() + text[1:]


def _suggestion(where: str) -> str:
    fields: list[str] = []

    def collect(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            fields.append(prefix + _dashed(name))
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                collect(field.annotation, f"{prefix}{_dashed(name)}.")

    collect(RunConfig, "")
    close = difflib.get_close_matches(where, fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Method defaults, then the file, then the overrides; validated. Raises UsageError with one line."""
    given = _normalise(tree)
    for text in overrides:
        given = _merge(given, parse_override(text))
    method = given.get("method", "dp-sgd")
    defaults = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}
    model = given.get("model")
    if isinstance(method, str) and not (isinstance(model, dict) and model.get("path") is not None):
        defaults = _merge(REFERENCE_DEFAULTS.get(method, {}), defaults)
    privacy = given.get("privacy")
    if isinstance(privacy, dict) and privacy.get("noise-multiplier") is not None and "epsilon" not in privacy:
        given = _merge(given, {"privacy": {"epsilon": None}})
    try:
        config = RunConfig.model_validate(_merge(defaults, given))
    except ValidationError as error:
        raise UsageError(_message(error)) from error
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """Rules that span sections."""
    privacy = config.privacy
    if config.method == "non-private":
        if config.planted.noise_scale != 1.0:
            raise rejected("planted.noise-scale", config.planted.noise_scale, "1.0 for method non-private")
    elif (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise rejected(
            "privacy.epsilon", privacy.epsilon, "either privacy.epsilon or privacy.noise-multiplier, exactly one"
        )
    _check_zeroth_order(config)
    _check_fusion(config)
    _check_unused(
        "pruning", config.pruning, ("decay", "explore"), config.pruning.by == "previous", "pruning.by=previous"
    )
    if config.training.sampling == "fixed" and config.method == "dp-zo" and config.zeroth_order.noise == "laplace":
        raise rejected("training.sampling", "fixed", "poisson or shuffle for Laplace noise")
    if config.canaries.count and not config.canaries.kinds:
        raise rejected("canaries.kinds", config.canaries.kinds, "at least one kind")
    reducer = config.reducer
    if reducer.noise != "none" and reducer.name not in ("visionzip",):
        raise rejected("reducer.noise", reducer.noise, f"'none' for reducer {reducer.name} (it fuses no tokens)")
    if reducer.name == "visionzip" and reducer.fuse < 1:
        raise rejected("reducer.fuse", reducer.fuse, "at least 1 for reducer visionzip")
    if isinstance(reducer.noise, float) and reducer.noise < 0:
        raise rejected("reducer.noise", reducer.noise, "'none', 'sum', 'mean' or a number >= 0")
    if config.method == "non-private" and reducer.noise in ("sum", "mean"):
        raise rejected("reducer.noise", reducer.noise, "'none' or a number for method non-private (it has no sigma)")


def _check_fusion(config: RunConfig) -> None:
    """A release of tokens needs its own clip norm and noise, a claim to be part of, and a relation that it can keep."""
    chosen = config.fusion
    _check_unused(
        "fusion", chosen, ("radius", "multiplier"), chosen.release == "clip-noise", "fusion.release=clip-noise"
    )
    if chosen.release == "none":
        return
    if config.method == "non-private":
        raise rejected("fusion.release", chosen.release, "none for method non-private (it makes no claim)")
    if chosen.radius is None:
        hint = "a number > 0, chosen on public pictures (python -m trainers.fusion prints their norms)"
        raise rejected("fusion.radius", None, hint)
    if chosen.multiplier is None:
        raise rejected("fusion.multiplier", None, "a number > 0: the noise on the tokens over fusion.radius")
    if config.privacy.relation == "add-remove":
        accepted = "zero-out or replace with fusion.release=clip-noise: a published row shows presence"
        raise rejected("privacy.relation", "add-remove", accepted)


def _check_zeroth_order(config: RunConfig) -> None:
    """dp-zo has K noisy numbers a step, and no noisy gradient of any block."""
    chosen = config.zeroth_order
    zeroth = config.method == "dp-zo"
    _check_unused("zeroth-order", chosen, tuple(ZerothOrderConfig.model_fields), zeroth, "method dp-zo")
    if not zeroth:
        return
    if config.pruning.keep < 1:
        raise rejected("pruning.keep", config.pruning.keep, "1 for method dp-zo (no block has noise of its own)")
    if config.training.gradient_path != "auto":
        raise rejected("training.gradient-path", config.training.gradient_path, "auto for method dp-zo (no gradients)")
    if config.training.gradient_checkpointing != "none":
        given = config.training.gradient_checkpointing
        raise rejected("training.gradient-checkpointing", given, "none for method dp-zo (no backward pass)")
    if chosen.noise == "laplace" and config.privacy.noise == "secure":
        raise rejected("privacy.noise", "secure", "plain for Laplace noise")
    if chosen.noise == "laplace" and config.privacy.relation == "replace":
        raise rejected("privacy.relation", "replace", "add-remove or zero-out for Laplace noise")


def _check_unused(section: str, given: Section, fields: Sequence[str], used: bool, where: str) -> None:
    """A setting that would change nothing is a slip: fields of `given` keep their defaults unless they are used."""
    plain = type(given)()
    for name in fields:
        if not used and getattr(given, name) != getattr(plain, name):
            raise rejected(f"{section}.{_dashed(name)}", getattr(given, name), f"only with {where}")
