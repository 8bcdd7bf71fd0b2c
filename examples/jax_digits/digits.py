"""DP-SGD in jax and optax. It knows nothing of dpaudit.

python digits.py                        # train it
BUG=half-noise python digits.py         # with a mistake on purpose
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

SIZE, BATCH, STEPS, CLIP, SIGMA = 300, 30, 50, 1.0, 0.8
PAD = 32  # batches are padded to a multiple of it: jax compiles anew for every shape, and Poisson batches have many
BUG = os.environ.get("BUG", "none")  # none, half-noise, batch-clip
OPTIMIZER = optax.sgd(0.5, momentum=0.5)


def load_data(first=0, last=SIZE):
    pictures, digits = load_digits(return_X_y=True)
    return [(np.float32(x / 16), np.int32(y)) for x, y in zip(pictures, digits)][first:last]


def start(seed):
    one, two, key = jax.random.split(jax.random.key(seed), 3)
    params = {"w1": 0.1 * jax.random.normal(one, (64, 48)), "w2": 0.1 * jax.random.normal(two, (48, 10))}
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": key}


def loss(params, picture, digit, real):
    """real: 0 for a row of padding, whose gradient is then zero."""
    logits = jnp.tanh(picture @ params["w1"]) @ params["w2"]
    return real * optax.softmax_cross_entropy_with_integer_labels(logits, digit)


per_record = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0)))


@jax.jit
def noisy_mean(gradients, key):
    """Clip every record's gradient, add them up, add noise, divide by the expected batch size."""
    norms = jnp.sqrt(sum((value**2).sum(axis=(1, 2)) for value in gradients.values()))
    factors = jnp.ones_like(norms) if BUG == "batch-clip" else jnp.minimum(1.0, CLIP / jnp.maximum(norms, 1e-12))
    sums = {name: jnp.tensordot(factors, value, axes=1) for name, value in gradients.items()}
    if BUG == "batch-clip":
        norm = optax.global_norm(sums)
        sums = {name: value * jnp.minimum(1.0, CLIP / jnp.maximum(norm, 1e-12)) for name, value in sums.items()}
    sigma = SIGMA / 2 if BUG == "half-noise" else SIGMA
    keys = dict(zip(sums, jax.random.split(key, len(sums))))
    noise = {name: sigma * CLIP * jax.random.normal(keys[name], value.shape) for name, value in sums.items()}
    return {name: (value + noise[name]) / BATCH for name, value in sums.items()}


def step(state, batch):
    rows = PAD * max(1, -(-len(batch) // PAD))
    pictures, digits = np.zeros((rows, 64), np.float32), np.zeros(rows, np.int32)
    for row, (picture, digit) in enumerate(batch):
        pictures[row], digits[row] = picture, digit
    real = np.float32(np.arange(rows) < len(batch))
    key, now = jax.random.split(state["key"])
    mean = noisy_mean(per_record(state["params"], pictures, digits, real), now)
    updates, optimizer = OPTIMIZER.update(mean, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer, "key": key}


if __name__ == "__main__":
    state, rng = start(0), np.random.default_rng()
    for _ in range(STEPS):
        state = step(state, [record for record in load_data() if rng.random() < BATCH / SIZE])
    held_out = load_data(SIZE, SIZE + 300)
    logits = jnp.tanh(np.array([x for x, _ in held_out]) @ state["params"]["w1"]) @ state["params"]["w2"]
    print(f"accuracy {(logits.argmax(axis=1) == np.array([y for _, y in held_out])).mean():.1%}")
