"""Empirical sensitivity: within the bound on the correct path, beyond it where records share something."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.bugs.token_path import plant
from attacks.fusion.path import TokenPath
from attacks.fusion.sensitivity import audit_sensitivity, difference, zeroed
from dpaudit.documents import Sensitivity
from tests.attacks.fusion_paths import token_path
from tests.tiny import random_units, save_tiny_llava
from trainers.ghost import Ghost
from trainers.gradients import MicroBatch, UnitSum
from trainers.inputs import Rows
from trainers.records import Unit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def units() -> tuple[Unit, ...]:
    return random_units(4)


def worst(rows: Sequence[Sensitivity]) -> dict[str, float]:
    out: dict[str, float] = {}
    for row in rows:
        out[row.relation] = max(out.get(row.relation, 0.0), row.largest / row.bound)
    return out


def test_the_bound_holds_and_is_reached_where_everything_is_clipped(tiny: Path, units: Sequence[Unit]) -> None:
    path = token_path(tiny)
    rows = audit_sensitivity(path, units)
    assert {row.relation for row in rows} == {"add-remove", "zero-out", "replace"} and all(row.holds for row in rows)
    # Gradients of this model are far above C = 1, so an added unit moves the sum by C exactly.
    assert rows[0].max_grad_norm == 1.0 and rows[0].largest == pytest.approx(1.0, abs=1e-4)
    assert len({row.max_grad_norm for row in rows}) == 2
    for kind in (MicroBatch, Ghost):
        assert audit_sensitivity(token_path(tiny, gradient=kind), units[:2])[0].holds


class HalfClipped(MicroBatch):
    """Clips to twice the norm that it is asked for."""

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        return super().__call__(rows, 2 * max_grad_norm)


def test_a_second_way_to_the_sum_is_held_to_the_same_bound(tiny: Path, units: Sequence[Unit]) -> None:
    path, few = token_path(tiny), units[:2]
    rows = audit_sensitivity(replace(path, others=(HalfClipped(path.model, path.parameters),)), few)
    assert worst(rows)["add-remove"] == pytest.approx(2.0, abs=1e-3)
    fine = audit_sensitivity(replace(path, others=(MicroBatch(path.model, path.parameters),)), few)
    assert all(row.holds for row in fine) and fine[0].comparisons == rows[0].comparisons


@pytest.mark.parametrize("name", ["token-mean", "batch-merged"])
def test_shared_stages_exceed_it(tiny: Path, units: Sequence[Unit], name: str) -> None:
    rows = audit_sensitivity(plant(name).apply(token_path(tiny)), units)
    assert worst(rows)["add-remove"] > 1.01 and not all(row.holds for row in rows)


def test_nothing_is_said_without_clipping(tiny: Path, units: Sequence[Unit]) -> None:
    path = token_path(tiny)
    unclipped = TokenPath(**{**vars(path), "max_grad_norm": float("inf")})
    assert audit_sensitivity(unclipped, units) == ()


def test_a_zeroed_unit_adds_nothing_and_leaves_the_others(tiny: Path, units: Sequence[Unit]) -> None:
    path = token_path(tiny)
    masked = path.gradient(zeroed(path.rows(units), 1), 1.0).gradient
    others = path.gradient(path.rows([units[0], *units[2:]]), 1.0).gradient
    size = difference(others, {name: torch.zeros_like(value) for name, value in others.items()})
    assert difference(masked, others) < 1e-4 * size
