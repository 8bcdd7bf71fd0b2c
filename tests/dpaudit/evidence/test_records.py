"""Whether known records arrive once: the interval holds whatever the records do with earlier noise."""

import math

import numpy as np
import pytest

from dpaudit.evidence import records
from dpaudit.evidence.records import Records


def games(
    adaptive: str, *, sigma: float, times: float = 1.0, count: int = 2000, steps: int = 60
) -> tuple[np.ndarray, ...]:
    """(S, V, whether the limit was ever passed) of `count` games; records may depend on all noise before them."""
    rng, width = np.random.default_rng(3), 20
    weights = np.zeros((count, width))
    s, v, ever = np.zeros(count), np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(steps):
        if adaptive == "fixed":
            sums = np.full((count, width), 3 / width**0.5)
        elif adaptive == "against the weights":
            sums = -4 * weights / np.maximum(1, np.linalg.norm(weights, axis=1, keepdims=True))
        else:  # large records until the deviation is great, then next to none: optional stopping
            late = np.abs(s) > 2 * sigma * np.sqrt(v + 1e-9)
            sums = np.where(late, 0.05, 5.0)[:, None] * np.eye(width)[:1]
        noise = sigma * rng.standard_normal((count, width))
        weights = weights + times * sums * 0.1 + noise
        left = (times - 1) * sums + noise
        s, v = s + (left * sums).sum(axis=1), v + (sums * sums).sum(axis=1)
        ever |= limits(v, sigma) <= np.abs(s)
    return s, v, ever


def limits(variance: np.ndarray, sigma: float) -> np.ndarray:
    found = [Records(0.0, float(one), 1).arrival(sigma) for one in variance]
    return np.array([math.inf if one is None else one.half_width * v for one, v in zip(found, variance, strict=True)])


@pytest.mark.parametrize("error", [records.ERROR, 0.05])
@pytest.mark.parametrize("adaptive", ["fixed", "against the weights", "stopped"])
def test_correct_records_deviate_at_most_as_often_as_stated(
    adaptive: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment of a game. Four standard errors of the simulation above the stated rate would be a failure."""
    monkeypatch.setattr(records, "ERROR", error)
    *_, ever = games(adaptive, sigma=1.0)
    assert ever.mean() <= error + 4 * math.sqrt(error / ever.size)


@pytest.mark.parametrize("times", [0.0, 1.5, 2.0])
def test_what_arrives_otherwise_is_found(times: float) -> None:
    s, v, _ = games("fixed", sigma=1.0, times=times, count=20)
    for one, variance in zip(s, v, strict=True):
        seen = Records(float(one), float(variance), 60).arrival(1.0)
        assert seen is not None and seen.deviates and seen.known and seen.low < times < seen.high


def test_the_interval_in_figures() -> None:
    """x = 1 + S / V; half-width from the formula; wider by the measured noise and never narrower."""
    found = Records()
    assert found.arrival(1.0) is None
    found.add(0.0, 0.0)
    assert found.arrival(1.0) is None and found.steps == 0
    for _ in range(10):
        found.add(5.0, 50.0)
    seen = found.arrival(2.0)
    assert seen is not None and (seen.estimate, seen.steps) == (1.1, 10)
    rho = 64.0
    half = 2 * math.sqrt((500 + rho) * (2 * math.log(1 / 7e-6) + math.log((500 + rho) / rho))) / 500
    assert seen.half_width == pytest.approx(half) and not seen.deviates and not seen.known
    wider, same = found.arrival(2.0, level=1.5), found.arrival(2.0, level=0.5)
    assert wider is not None and same is not None
    assert wider.half_width == pytest.approx(1.5 * half) and same.half_width == pytest.approx(half)
    found.add(math.nan, 1.0)
    assert found.arrival(2.0) is None
