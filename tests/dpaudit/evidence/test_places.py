"""Noise of every step, block and coordinate: sums, validity under any signal, faults found and named."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dpaudit.evidence import places
from dpaudit.evidence.places import PlacedNoise, _of_spare

Floats = np.ndarray
BLOCKS = (("w1", 600), ("b1", 40), ("b2", 1))
SIZE = 641


def placed(shown: Floats, released: Floats | None = None, absent: dict[int, list[str]] | None = None) -> PlacedNoise:
    """shown: (T, SIZE)."""
    found = PlacedNoise(BLOCKS, np.random.default_rng(0))
    for step, row in enumerate(shown):
        at = np.zeros_like(row) if released is None else released[step]
        found.add(row[found.kept].copy(), at[found.kept], (absent or {}).get(step, ()))
    return found


def white(steps: int, seed: int, width: int = SIZE) -> Floats:
    return np.random.default_rng([seed, 53]).normal(size=(steps, width))


def spread(seed: int = 1, count: int = 64) -> Floats:
    """(SIZE, count) orthonormal directions."""
    return np.linalg.qr(white(SIZE, seed, count))[0]


NONE = np.zeros((0, 0))
FAULTS = {
    "step 7, all blocks": lambda e: e * (np.arange(len(e)) != 6)[:, None],
    "block b1": lambda e: e * np.r_[np.ones(600), np.zeros(40), np.ones(1)],
    "of w1, all steps": lambda e: e * np.where(np.arange(SIZE) < 25, 0.0, math.sqrt(641 / 616)),
    "step 4": lambda e: e * np.where(np.arange(len(e)) % 2, 0.5, math.sqrt(1.75))[:, None],
    "outside the span of earlier steps": lambda e: e @ spread(2, 40) @ spread(2, 40).T * math.sqrt(SIZE / 40),
}


@pytest.mark.parametrize("where", FAULTS)
def test_noise_that_is_right_on_average_is_refuted_and_the_place_named(where: str) -> None:
    shown = FAULTS[where](white(40, 3))
    assert abs(np.square(shown).mean() - 1) < 0.1
    found = placed(shown).judged(shown @ spread())
    assert found.p_value < 1e-12 and (where in found.seen or where == "step 4"), found
    assert placed(white(40, 3)).judged(white(40, 3) @ spread()).p_value > 1e-4


def past(e: Floats) -> Floats:
    """Each step takes back half of the release before it."""
    out = [e[0]]
    for row in e[1:]:
        out.append(row - 0.5 * out[-1])
    return np.stack(out)


SIGNALS = {
    "the claim": lambda e: e,
    "2 % more": lambda e: 1.02 * e,
    "more, step by step different": lambda e: e * (1 + np.arange(len(e)) % 3 / 2)[:, None],
    "of the past": past,
    "large": lambda e: e + 3 * white(len(e), 991),
    "in few coordinates": lambda e: e + 10 * (white(len(e), 992) > 2.5),
    "the same in every step": lambda e: e + white(1, 993),
}


@pytest.mark.parametrize("steps", (1, 2, 9, 30))
@pytest.mark.parametrize("name", SIGNALS)
def test_mechanisms_that_leak_no_more_are_not_refuted(name: str, steps: int) -> None:
    """P[p <= 0.05] <= 0.05; of 60 games with fixed seeds at most 19 (binomial tail 1e-10), and none below 1e-5."""
    values = []
    for seed in range(60):
        shown = SIGNALS[name](white(steps, seed))
        values.append(placed(shown).judged(shown @ spread(count=24)).p_value)
    assert sum(p <= 0.05 for p in values) <= 19
    assert min(values) > 1e-5


@given(steps=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_sums_are_those_of_brute_force(steps: int, seed: int) -> None:
    shown = white(steps, seed)
    found = placed(shown)
    of_steps, of_blocks = found._of_steps()
    totals, coordinates = found._over_steps()
    assert of_steps.squares == pytest.approx(np.square(shown).sum(axis=1))
    assert of_blocks.squares == pytest.approx(
        np.stack([np.square(shown[:, :600]).sum(axis=1), np.square(shown[:, 600:640]).sum(axis=1)], axis=1).ravel()
    )
    assert totals.squares[:2] == pytest.approx([np.square(shown[:, :600]).sum(), np.square(shown[:, 600:640]).sum()])
    assert coordinates.squares == pytest.approx(np.square(shown).sum(axis=0))
    for family in (of_blocks, of_steps, totals, coordinates):
        assert family.found().p_value <= min(1.0, len(family.squares) * chi2.cdf(family.squares, family.degrees).min())


def test_what_lies_outside_earlier_steps_is_found_by_projection() -> None:
    shown = white(6, 4, 30)
    family = _of_spare(shown)[1]
    expected, degrees = 0.0, 0
    for step in range(1, 6):
        inside = np.linalg.qr(shown[:step].T)[0]
        expected += float(np.square(shown[step] - inside @ (inside.T @ shown[step])).sum())
        degrees += 30 - step
    assert family.squares[-1] == pytest.approx(expected) and family.degrees[-1] == degrees
    assert [len(_of_spare(white(steps, 1, width))) for steps, width in ((5, 8), (1, 30), (2, 30))] == [0, 1, 2]


def test_values_that_rounding_can_make_zero_refute_nothing() -> None:
    """One step released in bfloat16 beside a large known sum: some coordinates then show no noise at all."""
    for seed in range(40):
        known = 8 * white(1, seed)
        bits = ((known + white(1, seed + 500)).astype(np.float32).view(np.uint32) + 0x8000) & np.uint32(0xFFFF0000)
        released = bits.view(np.float32).astype(np.float64)
        left = np.where(np.abs(released - known) < 0.01, 0.0, released - known)
        assert placed(left, released).judged(NONE).p_value > 1e-3


def test_a_block_that_is_not_released_is_no_evidence() -> None:
    shown = white(10, 6)
    shown[3, 600:640] = 0.0
    assert placed(shown).judged(NONE).p_value < 1e-6
    assert placed(shown, absent={3: ["b1"]}).judged(NONE).p_value > 1e-3
    shown[2, 5] = np.nan
    assert placed(shown, absent={3: ["b1"]}).judged(NONE).p_value > 1e-3


def test_the_law_of_the_noise() -> None:
    """Normal noise of any level, less and more; not signs, not uniform, not Laplace, not sparse noise of that size."""
    for seed in range(60):
        found = placed((0.3 + seed % 5) * white(12, seed)).law()
        assert found is not None and found.p_value == 1.0
    rng = np.random.default_rng(3)
    sparse = math.sqrt(10) * white(12, 2) * (rng.random((12, SIZE)) < 0.1)
    laws = (np.sign(white(12, 1)), rng.uniform(-1.7, 1.7, (12, SIZE)), rng.laplace(size=(12, SIZE)), sparse)
    for shown in laws:
        found = placed(shown).law()
        assert found is not None and found.p_value == 0.0 and "w1" in found.seen
    assert placed(white(2, 1)).law() is None


def test_a_subset_of_a_large_model_holds_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_COORDINATES", 300)
    found = PlacedNoise([("big", 5000), ("small", 3), ("middle", 400)], np.random.default_rng(1))
    assert 200 <= found.kept.size <= 300 and found.widths[1] == 3 and found.widths[2] >= 50
    assert np.unique(found.kept).size == found.kept.size and (np.diff(found.kept) > 0).all()
    inside = (found.kept >= 5000) & (found.kept < 5003)
    assert inside.sum() == 3
