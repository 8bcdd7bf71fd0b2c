"""The black-box canary game: its score is the network's loss, it holds its level, and it finds what is not private."""

import numpy as np
import pytest
import torch

from attacks.bugs import black_box
from attacks.bugs.black_box import canary, canary_game, loss
from attacks.bugs.game import ALPHA
from trainers.adapters import compact, zeroth_order
from trainers.adapters.compact import Compact, Record, join, own_records, split

RUNS, GUESSES = 60, 24


class Alone(Compact):
    """No clipping, no noise, every record in every step, and a step that only the canary decides."""

    def sample(self) -> list[int]:
        return list(range(len(self.records)))

    def clip(self, gradients: torch.Tensor) -> torch.Tensor:
        return torch.where(gradients.norm(dim=1, keepdim=True) > 100, 1e-3 * gradients, 0 * gradients)

    def noise_std(self) -> float:
        return 0.0


def test_the_loss_is_that_of_the_trainer() -> None:
    """Its slope along a random direction is the trainer's own gradient."""
    record: Record = own_records()[3]
    trainer = compact.dp_sgd(seed=1)
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(61))
    step, start = 1e-4, trainer.weights.double()
    ends = [loss(dict(split(start + sign * step * direction)), record) for sign in (1, -1)]
    own = float(join(trainer.gradient(record)).double() @ direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(own, rel=1e-4)
    assert float(join(trainer.gradient(canary())).norm()) > 10 * trainer.max_grad_norm


def test_it_refutes_what_memorises_and_not_what_is_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """The correct trainer's false alarm is below 1e-6 here; a trainer that only the canary moves is refuted."""
    monkeypatch.setattr(black_box, "STEPS", 5)
    assert canary_game(compact.dp_sgd, runs=RUNS, guesses=GUESSES).p_value > 1e-6
    found = canary_game(Alone, runs=RUNS, guesses=GUESSES)
    assert found.caught and found.p_value <= ALPHA


@pytest.mark.parametrize("factory", [compact.laplace, compact.shuffled, zeroth_order.dp_zo])
def test_other_claims_are_not_played(factory: object) -> None:
    found = canary_game(factory)  # type: ignore[arg-type]
    assert not found.played and not found.caught and found.p_value == 1.0
