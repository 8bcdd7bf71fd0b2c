"""fastDP: its PrivacyEngine (book-keeping) on the digits of scikit-learn. CLIP_FN is Abadi or automatic."""

import os
import warnings

import torch
from fastDP import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

SIZE, BATCH, STEPS, CLIP, SIGMA = 200, 20, 40, 1.0, 0.8
warnings.filterwarnings("ignore")


def load_data():
    pictures, digits = load_digits(return_X_y=True)
    return [(torch.tensor(x / 16, dtype=torch.float32), int(y)) for x, y in zip(pictures, digits, strict=True)][:SIZE]


def start(seed):
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = PrivacyEngine(
        model,
        batch_size=BATCH,
        sample_size=SIZE,
        noise_multiplier=SIGMA,
        num_steps=STEPS,
        max_grad_norm=CLIP,
        clipping_fn=os.environ.get("CLIP_FN", "Abadi"),
    )
    engine.attach(optimizer)
    return model, optimizer


def step(state, batch):
    model, optimizer = state
    pictures = torch.stack([picture for picture, _ in batch]) if batch else torch.zeros(0, 64)
    digits = torch.tensor([digit for _, digit in batch], dtype=torch.int64)
    loss = nn.functional.cross_entropy(model(pictures), digits)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return state


claim = StepClaim("gaussian", CLIP, SIGMA, "poisson", BATCH / SIZE, BATCH, "add-remove", "picture", STEPS, 1e-5)
factory = step_function(init=start, step=step, records=load_data, claim=claim)
