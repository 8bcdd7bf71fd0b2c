"""What a method means before the user changes anything."""

from typing import Any

# The paper's switches for dual-priv, all off otherwise.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "non-private": {},
    "dp-sgd": {},
    "dual-priv": {"reducer": {"name": "visionzip", "noise": "mean"}, "pruning": {"keep": 0.8}},
    "dp-zo": {},
}

# Settings for the compact reference model, chosen on public synthetic pictures (trainers/public/base/README.md). A
# checkpoint of one's own (model.path) starts from the field defaults instead.
_TOKENS = {"keep": 16, "fuse": 8}  # of 64 patches
_PRIVATE_SETTINGS = {
    "model": {"lora": {"rank": 4}},
    "reducer": _TOKENS,
    "training": {"epochs": 20.0, "learning-rate": 1e-2},
}
_PLAIN_TRAINING = {"epochs": 40.0, "batch-size": 32, "learning-rate": 5e-3}
REFERENCE_DEFAULTS: dict[str, dict[str, Any]] = {
    "non-private": {"model": {"lora": {"rank": 4}}, "reducer": _TOKENS, "training": _PLAIN_TRAINING},
    "dp-sgd": _PRIVATE_SETTINGS,
    "dual-priv": _PRIVATE_SETTINGS,
    # Along one direction a step learns one number: many small steps, and C for a number instead of a gradient.
    "dp-zo": {
        "model": {"lora": {"rank": 4}},
        "reducer": _TOKENS,
        "privacy": {"max-grad-norm": 4.0},
        "training": {"epochs": 40.0, "batch-size": 32, "learning-rate": 4e-3},
    },
}
