"""DP-SGD written by hand: micro-batches of one record under autocast, summed, noised. It knows nothing of dpaudit.

python digits.py                        # train it
BUG=half-noise python digits.py         # with a mistake on purpose
"""

import os

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

SIZE, BATCH, STEPS, CLIP, SIGMA = 300, 30, 50, 1.0, 0.8
BUG = os.environ.get("BUG", "none")  # none, half-noise, batch-clip


def load_data(first=0, last=SIZE):
    pictures, digits = load_digits(return_X_y=True)
    return [(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)) for x, y in zip(pictures, digits)][first:last]


def start(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def clip_(gradients):
    norm = torch.sqrt(sum(value.square().sum() for value in gradients))
    for value in gradients:
        value.mul_(min(1.0, CLIP / max(float(norm), 1e-12)))


def step(model, optimizer, batch):
    parameters = list(model.parameters())
    optimizer.zero_grad()  # else the released gradient of the last step is added to that of the first record
    total = [torch.zeros_like(value) for value in parameters]
    for picture, digit in batch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(picture[None]), digit[None])
        loss.backward()
        gradients = [value.grad for value in parameters]
        if BUG != "batch-clip":
            clip_(gradients)
        for value, gradient in zip(total, gradients):
            value += gradient
        optimizer.zero_grad()
    if BUG == "batch-clip":
        clip_(total)
    sigma = SIGMA / 2 if BUG == "half-noise" else SIGMA
    for value, summed in zip(parameters, total):
        value.grad = (summed + sigma * CLIP * torch.randn_like(summed)) / BATCH
    optimizer.step()


if __name__ == "__main__":
    model, optimizer = start()
    records, rng = load_data(), np.random.default_rng()
    for _ in range(STEPS):
        step(model, optimizer, [record for record in records if rng.random() < BATCH / SIZE])
    held_out = load_data(SIZE, SIZE + 300)
    scores = model(torch.stack([picture for picture, _ in held_out]))
    right = (scores.argmax(dim=1) == torch.stack([digit for _, digit in held_out])).float().mean()
    print(f"accuracy {right:.1%} on {len(held_out)} pictures")
