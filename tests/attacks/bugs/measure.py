"""What a planted bug really does, measured from outside the step contract: noise, influence and updates at a step t.

Parameters are set to the same values before the step that is measured, so that nothing but the trainer's other state
can tell two histories apart.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainers.adapters.compact import SHAPES, join

Array = npt.NDArray[np.float64]
Factory = Callable[..., Any]
WEIGHTS = 0.5 * torch.randn(61, generator=torch.Generator().manual_seed(5))


def played(
    factory: Factory,
    batches: Sequence[Sequence[int]],
    *,
    noise_seed: int | None = 0,
    seed: int = 0,
    records: Sequence[Any] | None = None,
    reset: bool = True,
) -> Any:
    """A trainer after all batches; before the last one the weights are set to WEIGHTS."""
    trainer = factory(records, seed=seed, noise_seed=noise_seed)
    for place, batch in enumerate(batches):
        if reset and place == len(batches) - 1:
            trainer.weights = WEIGHTS.to(trainer.weights.dtype)
        trainer.step(list(batch))
    return trainer


def noisy_sum(trainer: Any) -> Array:
    """(61,) sum of clipped gradients and noise, as the public normalisation says; a block without noise is NaN."""
    nothing = {name: torch.full(SHAPES[name], torch.nan) for name in SHAPES}
    blocks = {name: value for name, value in trainer.released().items() if value is not None}
    flat = join({**nothing, **blocks}).double().numpy()
    return np.asarray(flat * trainer.claim.expected_batch_size)


def noise_ratio(
    factory: Factory, batches: Sequence[Sequence[int]], *, pairs: int = 20, live: bool = False
) -> dict[str, float]:
    """Deviation of the last step's noise over sigma C, per block and over "all" (20 pairs: to 2 % of 61 numbers)."""
    differences = []
    for pair in range(pairs):
        one, two = (
            noisy_sum(played(factory, batches, noise_seed=None if live else 2 * pair + side)) for side in (0, 1)
        )
        differences.append((one - two) / 2**0.5)
    claim = factory(seed=0, noise_seed=0).claim
    scaled = np.stack(differences) / (claim.noise_multiplier * claim.max_grad_norm)
    ratios = {"all": float(np.sqrt(np.square(scaled).mean()))}
    start = 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        ratios[name] = float(np.sqrt(np.square(scaled[:, start : start + size]).mean()))
        start += size
    return ratios


def moved(factory: Factory, history: Sequence[Sequence[int]], batch: Sequence[int], unit: int) -> float:
    """How far `unit` moves the last step's sum when it joins `batch`, over C, under frozen noise and one history."""
    beside, alone = (
        noisy_sum(played(factory, [*history, chosen])) for chosen in ([*batch, unit], [u for u in batch if u != unit])
    )
    claim = factory(seed=0, noise_seed=0).claim
    return float(np.linalg.norm(np.nan_to_num(beside - alone)) / claim.max_grad_norm)


def remembered(
    factory: Factory, one: Sequence[Sequence[int]], two: Sequence[Sequence[int]], last: Sequence[int]
) -> float:
    """How far the last step's sum differs between two histories of equal length at equal parameters, over C."""
    first, second = (noisy_sum(played(factory, [*history, last])) for history in (one, two))
    return float(np.linalg.norm(np.nan_to_num(first - second)) / factory(seed=0, noise_seed=0).claim.max_grad_norm)


def noises(factory: Factory, steps: int, *, noise_seed: int | None = 0) -> Array:
    """(steps, 61) noise of empty batches in one training, over sigma C."""
    trainer = factory(seed=0, noise_seed=noise_seed)
    claim = trainer.claim
    rows = []
    for _ in range(steps):
        trainer.step([])
        rows.append(noisy_sum(trainer) / (claim.noise_multiplier * claim.max_grad_norm))
    return np.stack(rows)


def correlation(one: Array, two: Array) -> float:
    """Of two rows."""
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))
