"""Steps by torch.func whose state is a dataclass. Oracle: the clipped sum by a closed form."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

N, B, C, SIGMA = 10, 2, 0.5, 0.7
CLAIM = StepClaim("gaussian", C, SIGMA, "poisson", B / N, float(B), "add-remove", "row", steps=5, delta=1e-5)
NET = nn.Linear(4, 1, bias=False)


@dataclass(frozen=True)
class State:
    weights: dict[str, Tensor]
    rng: torch.Generator
    count: int = 0


def rows() -> list[Tensor]:
    return list(torch.randn(N, 4, generator=torch.Generator().manual_seed(2)))


def start(seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    return State({"weight": torch.randn(1, 4, generator=rng)}, rng)


def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    out: Tensor = functional_call(NET, weights, (x[None],))
    return out.square().sum() / 2


class Loop:
    @staticmethod
    def noisy(each: dict[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        norm = torch.sqrt(sum((value.flatten(1).square().sum(1) for value in each.values()), torch.zeros(())))
        factor = (C / norm.clamp(min=1e-12)).clamp(max=1)
        return {
            name: (torch.einsum("b,b...->...", factor, value) + SIGMA * C * torch.randn(value.shape[1:], generator=rng))
            / B
            for name, value in each.items()
        }

    @staticmethod
    def step(state: State, batch: list[Tensor], *, order: str = "vmap of grad") -> State:
        x = torch.stack(batch) if batch else torch.zeros(0, 4)
        if order == "vmap of grad":
            each = vmap(grad(loss), in_dims=(None, 0))(state.weights, x) if batch else {"weight": torch.zeros(0, 1, 4)}
        else:
            parts = [grad(loss)(state.weights, row)["weight"] for row in x]
            each = {"weight": torch.stack(parts) if parts else torch.zeros(0, 1, 4)}
        mean = Loop.noisy(each, state.rng)
        weights = {name: value - 0.1 * mean[name] for name, value in state.weights.items()}
        return replace(state, weights=weights, count=state.count + 1)


@pytest.mark.parametrize("order", ["vmap of grad", "grad a record"])
def test_torch_func_and_a_dataclass(order: str) -> None:
    """The released sum is that of x (w.x), clipped; a canary joins it, clipped; parameters can be set."""
    seen = (Loop, "noisy")
    factory = step_function(
        init=start,
        step=lambda state, batch: Loop.step(state, batch, order=order),
        records=rows,
        claim=CLAIM,
        parameters="weights",
        released=seen,
        per_record_gradients=seen,
    )

    def total(batch: list[int], canary: Any = None) -> Tensor:
        trainer = factory(seed=3, noise_seed=1)
        if canary is not None:
            trainer.inject(canary)
        trainer.step(batch)
        released = trainer.released()["weight"]
        assert released is not None
        return B * released

    w, records, empty = start(3).weights["weight"], rows(), total([])
    own = [row * (w @ row) for row in records]
    expected = sum((own[i] * min(1.0, C / float(own[i].norm())) for i in (1, 4, 7)), torch.zeros(4))
    assert torch.allclose(total([1, 4, 7]) - empty, expected, atol=1e-5)
    canary = {"weight": torch.tensor([[3.0, 0.0, 4.0, 0.0]])}
    joined = total([1], canary) - total([1])
    assert torch.allclose(joined, C * torch.tensor([[0.6, 0.0, 0.8, 0.0]]), atol=1e-5)
    trainer = factory(seed=3, noise_seed=1)
    assert torch.allclose(trainer.gradient(trainer.records[4])["weight"].flatten(), own[4], atol=1e-5)
    trainer.assign({"weight": torch.ones(1, 4)})
    assert torch.equal(trainer.parameters()["weight"], torch.ones(1, 4))
