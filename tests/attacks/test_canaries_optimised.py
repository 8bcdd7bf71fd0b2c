"""Optimised pictures: the metagradient against differences, what it gains, and that the coin file brings it back."""

import numpy as np
import pytest

from attacks import kinds_optimised as subject
from attacks.kinds import Materials
from attacks.kinds_drawn import RARE_ANSWER
from attacks.kinds_optimised import CELLS, Optimised, Proxy, optimise, pack, painted, unpack
from dpaudit.errors import UsageError
from trainers.records import Unit

MATERIALS = Materials((), (), 32, 32)


def drawn(count: int) -> tuple[list[Unit], np.ndarray]:
    rng = np.random.default_rng(1)
    units = [draft.unit for draft in RARE_ANSWER.draw(count, MATERIALS, rng)]
    return units, np.where(rng.random((count, CELLS, CELLS, 3)) < 0.5, -1, 1).astype(np.int8)


def test_signs_are_one_number() -> None:
    signs = drawn(3)[1]
    assert all(np.array_equal(unpack(pack(one)), one) for one in signs)
    assert pack(np.ones_like(signs[0])) == 2**192 - 1


def test_cells_are_painted_where_they_belong() -> None:
    grey = np.full((32, 32, 3), 127, dtype=np.uint8)
    cells = np.zeros((CELLS, CELLS, 3))
    cells[2, 5, 1] = 1.0
    moved = painted(grey, cells).astype(int) - painted(grey, 0 * cells).astype(int)
    assert (moved[8:12, 20:24, 1] == 48).all() and moved.sum() == 16 * 48


def test_optimising_widens_the_gap_that_taking_part_makes() -> None:
    """On halves that the optimiser never saw; the gap before is its own spread away from it in every split."""
    units, start = drawn(8)
    found, proxy = optimise(units, start, 3), Proxy()
    inside = np.arange(8) % 2 == 0
    before, after = (
        np.mean([proxy.gap(units, signs.astype(float), side)[0] for side in (inside, ~inside)])
        for signs in (start, found)
    )
    assert after > before and (found != start).mean() > 0.05
    assert np.array_equal(found, optimise(units, start, 3))  # a function of its arguments


def test_stored_pictures_come_back_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tuple(pack(one) for one in drawn(3)[1])
    monkeypatch.setattr(subject, "optimise", lambda *_: pytest.fail("was stored"))
    again = Materials((), (), 32, 32, chosen={"optimised": stored})
    first = Optimised().draw(3, again, np.random.default_rng(5))
    second = Optimised().draw(3, again, np.random.default_rng(5))
    assert all(
        np.array_equal(a.unit.pictures[0].pixels, b.unit.pictures[0].pixels) for a, b in zip(first, second, strict=True)
    )
    with pytest.raises(UsageError, match="do not fit"):
        Optimised().draw(2, again, np.random.default_rng(5))
