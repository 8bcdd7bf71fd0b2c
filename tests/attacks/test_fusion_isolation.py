"""Isolation passes on every reducer of ours and fails on batch-wide variants, naming the stage, the pair and how much.

Also: which noise faults void what. Deterministic tests, but for the correlations (false alarm 1e-9 a check).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.bugs.token_path import BROKEN, PLANTS, Plant
from attacks.fusion.isolation import Isolation, audit_isolation, first_leak, movements
from attacks.fusion.noise import APART, RELEASE_CHECKS, audit_noise, limit
from attacks.fusion.path import OBSERVABLES, TokenPath, tied, watch
from attacks.fusion.standins import adversarial_pictures, climb, one_value, replacements
from dpaudit.config import ReducerConfig
from dpaudit.errors import UsageError
from tests.attacks.fusion_paths import VISIONZIP, token_path
from tests.tiny import random_units, save_tiny_llava
from trainers.ghost import Ghost
from trainers.gradients import Gradient, Hooks, MicroBatch
from trainers.inputs import Rows
from trainers.records import Unit

STAGED = [plant for plant in PLANTS if plant.stage is not None]
NOISY = [plant for plant in PLANTS if plant.noise is not None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def units() -> tuple[Unit, ...]:
    return random_units(3)


def statuses(found: Isolation) -> dict[str, str]:
    return {check.name.removeprefix("isolation under "): check.status for check in found.checks}


@pytest.mark.parametrize(
    "reducer",
    [
        ReducerConfig(),
        ReducerConfig(name="random", keep=5),
        ReducerConfig(name="cls-topk", keep=5),
        VISIONZIP,
    ],
    ids=lambda reducer: reducer.name,
)
def test_our_reducers_are_isolated(tiny: Path, reducer: ReducerConfig) -> None:
    pictures = 2 if reducer is VISIONZIP else 1
    found = audit_isolation(token_path(tiny, reducer), random_units(3, pictures=pictures))
    assert found.leak is None and set(statuses(found).values()) == {"pass"}


@pytest.mark.parametrize("kind", [MicroBatch, Ghost])
def test_other_gradient_paths_are_isolated(tiny: Path, units: Sequence[Unit], kind: type) -> None:
    assert audit_isolation(token_path(tiny, gradient=kind), units).passed


@pytest.mark.parametrize("plant", STAGED, ids=lambda plant: plant.name)
def test_what_is_shared_over_a_batch_is_named_by_stage(tiny: Path, units: Sequence[Unit], plant: Plant) -> None:
    found = audit_isolation(plant.apply(token_path(tiny)), units)
    leak = found.leak
    assert leak is not None and leak.stage == plant.stage
    assert leak.moved != leak.changed and 0 <= leak.moved < 3
    assert leak.size > 0.01
    where = "padding" if plant.stage in ("padding", "loss") else "exact replay"
    assert statuses(found)[where] == "fail"
    if where == "exact replay":
        assert leak.largest_gradient_change > 0.01
    failed = next(check for check in found.checks if check.status == "fail")
    assert failed.measured.startswith(f"{plant.stage}: ") and f"of record {leak.moved} " in failed.measured


@pytest.mark.parametrize("plant", NOISY, ids=lambda plant: plant.name)
def test_a_noise_fault_is_named(tiny: Path, units: Sequence[Unit], plant: Plant) -> None:
    path = plant.apply(token_path(tiny))
    failed = {check.name for check in audit_noise(path, units) if check.status == "fail"}
    assert plant.noise in failed
    assert (APART in failed) == (plant.training == BROKEN)
    # What only a release rests on does not reach another record: the same replay, all noise kept, moves nothing.
    before = watch(path, units)
    white = replace(units[0].pictures[0], pixels=np.full_like(units[0].pictures[0].pixels, 255))
    after = watch(path, [replace(units[0], pictures=(white,)), *units[1:]])
    assert all(item.size == 0 for item in movements(before, after, 0, "white"))


def test_our_own_noise_passes_every_check(tiny: Path) -> None:
    found = audit_noise(token_path(tiny), random_units(4, pictures=2))
    assert [check.name for check in found] == [*RELEASE_CHECKS, APART]
    assert {check.status for check in found} == {"pass"}
    assert audit_noise(token_path(tiny, ReducerConfig()), random_units(2)) == ()


def test_the_correlation_limit_is_exact_for_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against simulation, at a level that can be simulated."""
    monkeypatch.setattr("attacks.fusion.noise.LEVEL", 0.01)
    one, two = np.random.default_rng(0).normal(size=(2, 40_000, 20))
    one, two = one - one.mean(axis=1, keepdims=True), two - two.mean(axis=1, keepdims=True)
    r = np.abs((one * two).sum(axis=1)) / np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
    share = float((r > limit(20, 1)).mean())
    assert abs(share - 0.01) < 6 * np.sqrt(0.01 * 0.99 / 40_000)  # six standard errors: false alarm 2e-9
    assert limit(2, 1) == 1.0 and limit(512, 10) < limit(512, 10_000) < 1


def test_stand_ins_are_what_they_say(tiny: Path) -> None:
    units = random_units(2)
    model = token_path(tiny).model
    start = units[0].pictures[0].pixels
    assert int(np.abs(one_value(start).astype(int) - start.astype(int)).sum()) == 1
    pictures = adversarial_pictures(model, start, rng=np.random.default_rng(0), rounds=3, width=8)
    visual = model.visual_tokens([start, *pictures.values()])
    norms, peaks = visual.tokens.norm(dim=(1, 2)), visual.importance.amax(dim=1)
    assert norms[1] > norms[0] and peaks[2] > peaks[0] > peaks[3]
    made = dict(replacements(units[0], units[1], pictures, np.random.default_rng(0)))
    assert len(made) == 10 and all(
        item.pictures[0].questions == units[0].pictures[0].questions for item in made.values()
    )
    assert (
        climb(start, lambda found: np.zeros(len(found)), rng=np.random.default_rng(0), rounds=2, width=2) == start
    ).all()


def test_the_earliest_observable_is_blamed_and_the_largest_pair_named() -> None:
    before = {name: [torch.zeros(2), torch.ones(2)] for name in OBSERVABLES}
    after = {name: [value.clone() for value in values] for name, values in before.items()}
    after["fused tokens"][1] = torch.tensor([1.0, 3.0])
    after["gradient"][1] = torch.tensor([9.0, 9.0])
    found = movements(before, after, 0, "one") + movements(before, before, 0, "other")
    leak = first_leak(found, dict.fromkeys(OBSERVABLES, 0.0))
    assert leak is not None and (leak.observable, leak.stage, leak.moved, leak.how) == (
        "fused tokens",
        "fusion",
        1,
        "one",
    )
    assert leak.size == pytest.approx(np.sqrt(2))  # |(0, 2)| / |(1, 1)|
    assert first_leak(movements(before, after, 1, "itself"), dict.fromkeys(OBSERVABLES, 0.0)) is None


def test_selections_of_other_lengths_count_by_share() -> None:
    before = {name: [torch.zeros(1)] for name in OBSERVABLES} | {"kept patches": [torch.tensor([1.0, 2, 3])]}
    after = {name: list(values) for name, values in before.items()} | {"kept patches": [torch.tensor([2.0, 3])]}
    assert movements(before, after, -1, "K")[1].size == pytest.approx(1 / 3)


def test_a_flat_picture_sits_at_a_tie_and_a_random_one_does_not(tiny: Path) -> None:
    path = token_path(tiny)
    assert not tied(path, random_units(1)[0], size=1e-9)
    assert tied(path, random_units(1)[0], size=1.0)


def test_one_unit_can_not_be_audited(tiny: Path, units: Sequence[Unit]) -> None:
    with pytest.raises(UsageError, match="at least 2 units"):
        audit_isolation(token_path(tiny), units[:1])


class MeansShared(Hooks):
    """Hooks whose gradients hold a part of the batch's mean."""

    def per_unit(self, rows: Rows) -> tuple[Gradient, torch.Tensor]:
        gradients, losses = super().per_unit(rows)
        return {name: value + 0.01 * value.mean(dim=0) for name, value in gradients.items()}, losses


def test_every_gradient_path_of_the_training_is_looked_at(tiny: Path, units: Sequence[Unit]) -> None:
    path = token_path(tiny, gradient=MicroBatch)
    both = replace(path, others=(Hooks(path.model, path.parameters),))
    fine = audit_isolation(both, units)
    assert fine.passed and fine.checks[0].measured.endswith("gradients by micro-batch and by hooks")
    shared = audit_isolation(replace(path, others=(MeansShared(path.model, path.parameters),)), units)
    assert shared.leak is not None and (shared.leak.stage, shared.leak.observable) == ("loss", "gradient")


def test_a_path_without_isolation_differs_in_the_sum_too(tiny: Path, units: Sequence[Unit]) -> None:
    """The audit watches what training adds up: the clipped sum of the path moves by the units' own gradients alone."""
    path: TokenPath = token_path(tiny)
    whole = path.gradient(path.rows(units), 1e30).gradient
    parts = [path.gradient(path.rows([unit]), 1e30).gradient for unit in units]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts), rtol=1e-3, atol=1e-3)
