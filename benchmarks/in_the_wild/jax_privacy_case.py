"""jax_privacy: `clipped_grad` and its Gaussian privatizer, as its documentation puts them together."""

import sys

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
from sklearn.datasets import load_digits

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

SIZE, BATCH, STEPS, CLIP, SIGMA = 200, 20, 40, 1.0, 0.8
OPTIMIZER = optax.sgd(0.5)


def load_data():
    pictures, digits = load_digits(return_X_y=True)
    return [(np.float32(x / 16), np.int32(y)) for x, y in zip(pictures, digits, strict=True)][:SIZE]


def loss(params, pictures, digits):
    logits = jnp.tanh(pictures @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()


gradient = jax_privacy.clipped_grad(loss, l2_clip_norm=CLIP, batch_argnums=(1, 2), normalize_by=BATCH)
STDDEV = SIGMA * gradient.sensitivity()


def start(seed):
    one, two, key = jax.random.split(jax.random.key(seed), 3)
    params = {"w1": 0.1 * jax.random.normal(one, (64, 48)), "w2": 0.1 * jax.random.normal(two, (48, 10))}
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": key}


@jax.jit
def noisy_mean(params, pictures, digits, padding, key):
    """The clipped sum over the batch size, with noise."""
    privatizer = jax_privacy.noise_addition.gaussian_privatizer(stddev=STDDEV, prng_key=key)
    total = gradient(params, pictures, digits, is_padding_example=padding)
    mean, _ = privatizer.update(total, privatizer.init(params))
    return mean


def step(state, batch):
    size = 64 * (1 + len(batch) // 64)  # padded, so that few shapes are compiled
    pictures, digits = np.zeros((size, 64), np.float32), np.zeros(size, np.int32)
    for place, (picture, digit) in enumerate(batch):
        pictures[place], digits[place] = picture, digit
    key, now = jax.random.split(state["key"])
    mean = noisy_mean(state["params"], pictures, digits, np.arange(size) >= len(batch), now)
    updates, optimizer = OPTIMIZER.update(mean, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer, "key": key}


claim = StepClaim("gaussian", CLIP, SIGMA, "poisson", BATCH / SIZE, BATCH, "add-remove", "picture", STEPS, 1e-5)
factory = step_function(
    init=start, step=step, records=load_data, claim=claim, released=(sys.modules[__name__], "noisy_mean")
)
