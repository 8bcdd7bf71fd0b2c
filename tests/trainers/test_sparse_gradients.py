"""An embedding with sparse gradients in a loop of one record a pass: read, and replaced by a canary's."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attacks.contract.subject import flat
from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

CLAIM = StepClaim("gaussian", 1.0, 1.0, "poisson", 0.5, 2.0, "add-remove", "row", 10, 1e-5)


def factory(sparse: bool) -> Any:
    def init(seed: int | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed or 0)
        model = nn.Sequential(nn.EmbeddingBag(9, 3, sparse=sparse), nn.Linear(3, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def step(state: Any, batch: Any) -> None:
        model, optimizer = state
        total = [torch.zeros_like(value) for value in model.parameters()]
        for words, label in batch:
            optimizer.zero_grad()
            cross_entropy(model(words[None]), label[None]).backward()
            gradients = [value.grad.to_dense() for value in model.parameters()]
            norm = torch.sqrt(sum((gradient.square().sum() for gradient in gradients), torch.zeros(())))
            for value, gradient in zip(total, gradients, strict=True):
                value += gradient * min(1.0, 1.0 / max(float(norm), 1e-12))
        for value, summed in zip(model.parameters(), total, strict=True):
            value.grad = (summed + torch.randn_like(summed)) / 2
        optimizer.step()

    words = torch.tensor([[0, 1, 1], [2, 2, 2], [3, 4, 5], [8, 8, 0]])
    return step_function(
        init=init, step=step, records=[*zip(words, torch.tensor([0, 1, 0, 1]), strict=True)], claim=CLAIM
    )


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_sparse_and_dense_gradients_are_read_and_replaced_alike(size: float) -> None:
    seen = []
    for sparse in (True, False):
        trainer = factory(sparse)(seed=1, noise_seed=2)
        own = {name: flat("gradient", name, value) for name, value in trainer.gradient(trainer.records[0]).items()}
        canary = {name: torch.full(value.shape, size) for name, value in trainer.parameters().items()}
        trainer.inject(canary)
        trainer.step([1, 2])
        seen.append((own, {name: flat("released", name, value) for name, value in trainer.released().items()}))
    for name in seen[0][0]:
        for part in (0, 1):
            assert seen[0][part][name] == pytest.approx(seen[1][part][name], abs=1e-6), name


def test_a_sparse_tensor_is_flattened_with_its_repetitions_added() -> None:
    value = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, 4.0]), (5,))
    assert flat("gradient", "w", value).tolist() == [0, 3, 0, 4, 0]
