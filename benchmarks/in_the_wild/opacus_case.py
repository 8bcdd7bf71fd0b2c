"""Opacus: the loop of its tutorial on the digits of scikit-learn. MODE, MEMORY and EPSILON choose what it offers."""

import os
import warnings

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from dpaudit.under_test import opacus_loop

SIZE, BATCH, EPOCHS = 200, 20, 4
MODE, MEMORY, EPSILON = os.environ.get("MODE", "hooks"), os.environ.get("MEMORY"), os.environ.get("EPSILON")
warnings.filterwarnings("ignore", module="opacus")
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def load_data():
    pictures, digits = load_digits(return_X_y=True)
    return [(torch.tensor(x / 16, dtype=torch.float32), int(y)) for x, y in zip(pictures, digits, strict=True)][:SIZE]


def build(records):
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    given = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(records, batch_size=BATCH),
        "max_grad_norm": 1.0,
        "grad_sample_mode": MODE,
    }
    if EPSILON:
        wanted = {"target_epsilon": float(EPSILON), "target_delta": 1e-5, "epochs": EPOCHS}
        return PrivacyEngine().make_private_with_epsilon(**given, **wanted)
    return PrivacyEngine().make_private(**given, noise_multiplier=0.8)


def train(model, optimizer, *rest):
    criterion, loader = rest if len(rest) == 2 else (nn.CrossEntropyLoss(), rest[0])
    if MEMORY:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=8, optimizer=optimizer) as parts:
            epoch(model, optimizer, criterion, parts)
    else:
        epoch(model, optimizer, criterion, loader)


def epoch(model, optimizer, criterion, loader):
    model.train()
    for pictures, digits in loader:
        optimizer.zero_grad()
        loss = criterion(model(pictures), digits)
        loss.backward()
        optimizer.step()


factory = opacus_loop(build, records=load_data, train=train, steps=EPOCHS * SIZE // BATCH, public_size=SIZE)
