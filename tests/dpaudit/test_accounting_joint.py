"""Composition of a release with a training, against closed forms and published figures."""

import math

import numpy as np
import pytest

from dpaudit.accounting import (
    DpSgd,
    epsilon,
    gaussian_epsilon,
    joint_after,
    joint_curve,
    joint_epsilon,
    noise_multiplier_beside,
    release_event,
)
from dpaudit.errors import UsageError

DELTA = 1e-5


@pytest.mark.parametrize(("relation", "moved"), [("zero-out", 1.0), ("replace", 2.0)])
@pytest.mark.parametrize(("sigma", "steps", "z"), [(4.0, 9, 2.0), (10.0, 4, 1.0)])
def test_gaussians_compose_to_one_gaussian(relation, moved: float, sigma: float, steps: int, z: float) -> None:
    """Full batches: mu^2 = moved^2 (T / sigma^2 + 1 / z^2), in closed form."""
    events = [DpSgd(sigma, 1.0, steps, relation), release_event(z, relation)]
    mu = moved * math.sqrt(steps / sigma**2 + 1 / z**2)
    exact = gaussian_epsilon(mu, DELTA)
    assert exact <= joint_epsilon(events, DELTA) <= exact * 1.002


@pytest.mark.parametrize(
    ("relation", "z", "uses", "known"),
    [
        ("zero-out", 1.0, 1, 4.829),
        ("zero-out", 5.0, 1, 1.993),
        ("zero-out", 5.0, 10, 3.242),
        ("replace", 5.0, 1, 3.348),
        ("replace", 10.0, 10, 4.025),
    ],
)
def test_figures_computed_before_this_code_was_written(relation, z: float, uses: int, known: float) -> None:
    """The training sigma = 1, q = 0.01, T = 1000 with a release, by dp-accounting directly (notes on training)."""
    events = [DpSgd(1.0, 0.01, 1000, relation), *([release_event(z, relation)] * uses)]
    assert joint_epsilon(events, DELTA) == pytest.approx(known, abs=0.003)


def test_one_mechanism_alone_and_mechanisms_without_noise() -> None:
    training = DpSgd(1.0, 0.1, 10, "zero-out")
    assert joint_epsilon([training], DELTA) == epsilon(training, DELTA)
    assert joint_epsilon([training, DpSgd(1.0, 0.1, 0, "zero-out")], DELTA) == epsilon(training, DELTA)
    assert joint_epsilon([training, DpSgd(0.0, 1.0, 1, "zero-out")], DELTA) == math.inf
    points = joint_curve([training, release_event(3.0, "zero-out")], [1e-3, 1e-6])
    assert points[0].epsilon < points[1].epsilon


def test_spent_budget_starts_with_the_release_and_never_falls() -> None:
    training, release = DpSgd(1.2, 0.2, 40, "zero-out"), release_event(2.0, "zero-out")
    spent = [joint_after(training, [release], step, DELTA) for step in range(0, 41, 4)]
    assert spent[0] == pytest.approx(gaussian_epsilon(0.5, DELTA), rel=0.01)
    assert all(np.diff(spent) >= 0) and spent[-1] == joint_epsilon([training, release], DELTA)


@pytest.mark.parametrize("relation", ["zero-out", "replace"])
def test_sigma_is_the_smallest_that_meets_the_target(relation) -> None:
    release = release_event(4.0, relation)
    sigma = noise_multiplier_beside([release], epsilon=5.0, delta=DELTA, sample_rate=0.1, steps=50, relation=relation)
    within = joint_epsilon([DpSgd(sigma, 0.1, 50, relation), release], DELTA)
    beyond = joint_epsilon([DpSgd(sigma / 1.002, 0.1, 50, relation), release], DELTA)
    assert within <= 5.0 < beyond


def test_a_release_that_takes_it_all_names_the_least_multiplier() -> None:
    with pytest.raises(UsageError, match=r"^fusion\.multiplier: got 0\.5; accepted: more than (\S+) for") as caught:
        noise_multiplier_beside(
            [release_event(0.5, "zero-out")], epsilon=2.0, delta=DELTA, sample_rate=0.1, steps=5, relation="zero-out"
        )
    least = float(str(caught.value).split("more than ")[1].split()[0])
    assert gaussian_epsilon(1 / (least * 1.001), DELTA) < 2.0 < gaussian_epsilon(1 / (least * 0.999), DELTA)


def test_presence_is_not_covered() -> None:
    with pytest.raises(UsageError, match=r"^privacy\.relation: got 'add-remove'; accepted: zero-out or replace"):
        release_event(1.0, "add-remove")
    with pytest.raises(UsageError, match=r"^fusion\.multiplier"):
        release_event(0.0, "replace")
