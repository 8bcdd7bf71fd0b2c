"""Unmixing projections of the update: against the linear model it assumes; the Gram against plain backward passes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from attacks.membership.gradients import Fold
from attacks.membership.gram import Gram, base_gram, unmixed
from attacks.membership.selection import area
from dpaudit.config import LoraConfig
from tests.tiny import random_units
from trainers.gradients import MicroBatch
from trainers.inputs import UnitInputs
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]


def world(seed: int, *, m: int = 240, d: int = 400, mu: float = 1.6) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Unit gradients (m, d) that share a few strong directions, one noisy sum of the members', and the coins."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(m, 6)) @ rng.normal(size=(6, d)) + 3 * rng.normal(size=d)
    rows = shared + 4 * rng.normal(size=(m, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    members = rng.random(m) < 0.5
    return rows, rows.T @ members + rng.normal(size=d) / mu, members


def oracle(rows: Floats, total: Floats, mu: float = 1.6) -> Floats:
    """The posterior mean of every coin given the noisy sum itself, computed in the space of the weights."""
    precision = mu**2 * rows @ rows.T + 4 * np.eye(len(rows))
    return np.linalg.solve(precision, mu**2 * rows @ (total - rows.sum(axis=0) / 2))


def test_unmixing_finds_what_one_projection_at_a_time_does_not() -> None:
    own, together, best = [], [], []
    for seed in range(4):
        rows, total, members = world(seed)
        hard = np.random.default_rng(seed).uniform(1.0, 20.0, size=len(rows))  # norms before clipping, C = 1
        projections = 0.3 * hard * (rows @ total)
        gram = Gram(rows @ rows.T, 1 / hard, np.zeros(len(rows)))
        own.append(area(projections / hard, members))
        together.append(area(unmixed(projections, gram, np.array(["a"] * len(rows))), members))
        best.append(area(oracle(rows, total), members))
    # 4 x 240 coins: a mean AUC has standard error 0.02.
    assert np.mean(own) < 0.6 and np.mean(best) > 0.75
    assert np.mean(together) > np.mean(best) - 0.03  # scale, offset and noise are estimated, and cost next to nothing


def test_others_and_kinds_are_taken_out() -> None:
    """A large push by units that surely took part, and an offset of each kind, change no score."""
    rows, total, _ = world(9)
    kinds = np.array(["a", "b"] * (len(rows) // 2))
    push = np.random.default_rng(0).normal(size=rows.shape[1])
    projections = rows @ total
    plain = unmixed(projections, Gram(rows @ rows.T, np.ones(len(rows)), np.zeros(len(rows))), kinds)
    moved = unmixed(projections + rows @ push, Gram(rows @ rows.T, np.ones(len(rows)), rows @ push), kinds)
    assert np.corrcoef(plain, moved)[0, 1] > 0.95
    shifted = unmixed(
        projections + 7.0 * (kinds == "a"), Gram(rows @ rows.T, np.ones(len(rows)), np.zeros(len(rows))), kinds
    )
    assert np.corrcoef(plain, shifted)[0, 1] > 0.999


def test_records_that_nothing_moved_score_alike() -> None:
    rows, _, _ = world(1)
    found = unmixed(np.full(len(rows), 2.5), Gram(rows @ rows.T, np.ones(len(rows)), rows[:, 0]), np.array(["a"] * 240))
    assert np.array_equal(found, np.zeros(len(rows)))


def test_the_gram_is_that_of_clipped_gradients_at_the_base(tiny: Path) -> None:
    units, others = random_units(6, seed=2), random_units(3, seed=4, prefix="o")
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=4), generator=np.random.default_rng(0))
    everybody = [*units, *others]
    inputs, slow = UnitInputs(model, everybody), MicroBatch(model, parameters)
    flat = []
    for index in range(len(everybody)):
        gradient, _ = slow.gradient(inputs.select([index]))
        flat.append(torch.cat([gradient[name].flatten() for name in sorted(gradient) if "lora_B" in name]).double())
    most = float(torch.stack([row.norm() for row in flat]).median())
    clipped = np.stack([(row * min(1.0, most / float(row.norm())) / most).numpy() for row in flat])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in parameters.items():
            if "lora_B" in name:
                value.add_(0.1 * torch.randn_like(value))  # where the training ended: the Gram is of where it began
    found = base_gram(model, units, others, max_grad_norm=most)
    np.testing.assert_allclose(found.k, clipped[:6] @ clipped[:6].T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.others, clipped[:6] @ clipped[6:].sum(axis=0), rtol=1e-3, atol=1e-5)
    assert (found.factors <= 1).all() and 0 < (found.factors < 1).sum() < 6


def test_hashing_keeps_inner_products() -> None:
    draw = torch.Generator().manual_seed(1)
    first, second = torch.randn(50_000, generator=draw), torch.randn(50_000, generator=draw)
    second = 0.6 * first + 0.8 * second
    fold = Fold(50_000, 8192)
    a, b = fold([first[:20_000], first[20_000:]]), fold([second])
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert a.shape == (8192,) and abs(cosine - 0.6) < 0.08  # standard error 1 / sqrt(8192) = 0.011
    assert np.array_equal(Fold(5, 8192)([torch.arange(5.0)]), np.arange(5, dtype=np.float32))
