"""A correct DP-SGD step in plain numpy: what the examples in the docstrings of `check` and `audit` are run on."""

import sys

import numpy as np

from dpaudit.claims import StepClaim

SIZE, BATCH, WIDTH = 24, 4, 2500
records = list(3 * np.random.default_rng(0).standard_normal((SIZE, WIDTH)))
claim = StepClaim("gaussian", 1.0, 1.0, "poisson", BATCH / SIZE, float(BATCH), "add-remove", "row", 30, 1e-5)


def start(seed):
    return {"params": np.zeros(WIDTH), "rng": np.random.default_rng(seed)}


def noisy_mean(each, rng):
    factor = np.minimum(1.0, 1.0 / np.maximum(np.linalg.norm(each, axis=1), 1e-12))
    return (factor @ each + rng.standard_normal(WIDTH)) / BATCH


def step(state, batch):
    each = np.array(batch).reshape(-1, WIDTH) - state["params"]
    return state | {"params": state["params"] - 0.1 * noisy_mean(each, state["rng"])}


noisy = (sys.modules[__name__], "noisy_mean")
