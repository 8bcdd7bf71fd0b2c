"""The configuration of one run: typed, strict, and resolved before anything is computed.

`-c run.yaml` and `key.sub=value` both end here.
"""

from dpaudit.config.defaults import METHOD_DEFAULTS
from dpaudit.config.reading import parse_override, read_yaml
from dpaudit.config.resolving import resolve
from dpaudit.config.sections import (
    ALL_LINEAR,
    CanaryConfig,
    CanaryKind,
    DataConfig,
    FusionConfig,
    LoraConfig,
    Method,
    ModelConfig,
    PlantedConfig,
    PrivacyConfig,
    PruningConfig,
    ReducerConfig,
    ReducerName,
    RunConfig,
    Section,
    TrainingConfig,
    ZerothOrderConfig,
    public_path,
)

__all__ = [
    "ALL_LINEAR",
    "METHOD_DEFAULTS",
    "CanaryConfig",
    "CanaryKind",
    "DataConfig",
    "FusionConfig",
    "LoraConfig",
    "Method",
    "ModelConfig",
    "PlantedConfig",
    "PrivacyConfig",
    "PruningConfig",
    "ReducerConfig",
    "ReducerName",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "ZerothOrderConfig",
    "parse_override",
    "public_path",
    "read_yaml",
    "resolve",
]
