"""A small image classifier trained with Opacus, as its tutorial does it. It knows nothing of dpaudit.

python digits.py                        # train it
BUG=half-noise python digits.py         # with a mistake on purpose
"""

import os
import warnings

import torch
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

SIZE, BATCH, EPOCHS = 300, 30, 5
BUG = os.environ.get("BUG", "none")  # none, half-noise, batch-clip
MODE = os.environ.get("MODE", "hooks")  # hooks, functorch, ghost

warnings.filterwarnings("ignore", module="opacus")
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def load_data(first=0, last=SIZE):
    pictures, digits = load_digits(return_X_y=True)
    return [(torch.tensor(x / 16, dtype=torch.float32), int(y)) for x, y in zip(pictures, digits)][first:last]


def build(records):
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    loader = DataLoader(records, batch_size=BATCH)
    private = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=0.8,
        max_grad_norm=1.0,
        grad_sample_mode=MODE,
    )
    plant(private[1])
    return private


def train(model, optimizer, *rest):
    criterion, loader = rest if len(rest) == 2 else (nn.CrossEntropyLoss(), rest[0])
    model.train()
    for pictures, digits in loader:
        optimizer.zero_grad()
        loss = criterion(model(pictures), digits)
        loss.backward()
        optimizer.step()


def plant(optimizer):
    """Mistakes on purpose."""
    if BUG == "half-noise":
        add_noise = optimizer.add_noise

        def half():
            optimizer.noise_multiplier /= 2
            add_noise()
            optimizer.noise_multiplier *= 2

        optimizer.add_noise = half
    elif BUG == "batch-clip":  # the sum of the batch is clipped instead of each record

        def clip():
            sums = [parameter.grad_sample.sum(dim=0) for parameter in optimizer.params]
            norm = torch.sqrt(sum(value.square().sum() for value in sums))
            for parameter, value in zip(optimizer.params, sums):
                parameter.summed_grad = value * min(1.0, float(optimizer.max_grad_norm / norm.clamp(min=1e-9))) * BATCH

        optimizer.clip_and_accumulate = clip


if __name__ == "__main__":
    torch.manual_seed(0)
    private = build(load_data())
    for _ in range(EPOCHS):
        train(*private)
    held_out = load_data(SIZE, SIZE + 300)
    with torch.no_grad():
        scores = private[0](torch.stack([picture for picture, _ in held_out]))
    right = (scores.argmax(dim=1) == torch.tensor([digit for _, digit in held_out])).float().mean()
    print(f"accuracy {right:.1%} on {len(held_out)} pictures")
