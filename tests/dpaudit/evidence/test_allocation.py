"""The channel under random allocation against enumeration of all subsets of an epoch and of all coins."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit
from scipy.stats import binom

from dpaudit.errors import UsageError
from dpaudit.evidence.channel import Channel, log_symmetric, simulate
from dpaudit.evidence.coins import NULLS, Posteriors
from dpaudit.evidence.game import Rule
from dpaudit.evidence.limits import sigma_upper
from dpaudit.evidence.power import white_box_power

Floats = npt.NDArray[np.float64]
# Whole epochs, an epoch cut short (of 4 by 1 and by 3 steps), few and many draws.
CHANNELS = [
    Channel(1.0, 0.25, 8, 4),
    Channel(0.7, 0.5, 7, 4),
    Channel(1.0, 0.75, 5, 4),
    Channel(2.0, 0.4, 5, 5),
    Channel(1.0, 1.0, 6, 3),
]
ALL_COINS = np.array(list(itertools.product((False, True), repeat=8)))


def density(x: Floats, mean: Floats, sigma: float) -> float:
    return float(np.exp(-((x - mean) ** 2) / (2 * sigma**2)).prod())


@pytest.mark.parametrize("channel", CHANNELS)
def test_log_ratio_equals_the_ratio_of_densities_summed_over_all_subsets(channel: Channel) -> None:
    """For every epoch the density given each k-subset of its t steps, of which only those played are seen."""
    assert channel.epoch is not None
    seen, _ = simulate(channel, 5, np.random.default_rng(1))
    subsets = list(itertools.combinations(range(channel.epoch), channel.draws))
    for row, found in zip(seen, channel.log_ratio(seen), strict=True):
        expected = 0.0
        for first in range(0, channel.steps, channel.epoch):
            part = row[first : first + channel.epoch]
            inside = [np.isin(np.arange(part.size), chosen).astype(float) for chosen in subsets]
            mixed = sum(density(part, mean, channel.sigma) for mean in inside) / len(subsets)
            expected += math.log(mixed / density(part, np.zeros(part.size), channel.sigma))
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("draws", range(1, 8))
def test_symmetric_polynomials_equal_the_sum_over_subsets(draws: int) -> None:
    x = np.random.default_rng(2).normal(scale=4.0, size=(3, 7))
    expected = [math.log(sum(math.exp(sum(c)) for c in itertools.combinations(row, draws))) for row in x.tolist()]
    assert log_symmetric(x, draws) == pytest.approx(expected, rel=1e-12)
    far = log_symmetric(x + 1000.0, draws)  # no overflow, as a sum of logarithms
    assert far == pytest.approx(np.array(expected) + 1000.0 * draws, rel=1e-12)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("scale", (1.0, 0.8))
def test_given_what_was_seen_the_mean_of_the_e_value_is_at_most_one(channel: Channel, scale: float) -> None:
    """Exactly, over all 256 coins, for the claim and every larger noise of the grid, whatever was seen."""
    seen, _ = simulate(channel, 8, np.random.default_rng(3), scale=scale)
    e = np.exp(Posteriors.of(seen, channel).log_e(ALL_COINS))
    for times in (*NULLS, 1.005, 1.03, 1.2, 5.0):
        p = expit(channel.log_ratio(seen, scale=times))
        chance = np.where(ALL_COINS, p, 1 - p).prod(axis=1)
        assert chance @ e <= 1.0 + (1e-9 if times in NULLS else 0.01)


def test_each_candidate_is_in_k_steps_of_every_epoch_uniformly() -> None:
    channel, count = Channel(1.0, 0.4, 13, 5), 3000
    drawn = channel.sampled(count, np.random.default_rng(4))
    assert drawn.shape == (count, 13)
    assert (drawn[:, :5].sum(axis=1) == 2).all() and (drawn[:, 5:10].sum(axis=1) == 2).all()
    low, high = binom.ppf([1e-8, 1 - 1e-8], count, 0.4)
    assert ((drawn.sum(axis=0) >= low) & (drawn.sum(axis=0) <= high)).all()
    both = (drawn[:, :5, None] & drawn[:, None, 5:10]).sum(axis=0)  # epochs are independent
    low, high = binom.ppf([1e-8, 1 - 1e-8], count, 0.16)
    assert ((both >= low) & (both <= high)).all()


def test_the_poisson_likelihood_is_wrong_for_allocation_and_its_own_is_right() -> None:
    """Calibration: coins of candidates with posterior p are heads p of the time, by the mean of (coin - p) L."""
    channel = Channel(0.6, 0.25, 12, 4)
    seen, coins = simulate(channel, 20_000, np.random.default_rng(5))
    gaps = {}
    for name, judge in (("own", channel), ("poisson", Channel(0.6, 0.25, 12))):
        ratios = np.clip(judge.log_ratio(seen), -20, 20)
        product = (coins - expit(ratios)) * ratios
        gaps[name] = abs(float(product.mean())) / (float(product.std()) / math.sqrt(20_000))
    assert gaps["own"] < 5.5 < gaps["poisson"]


def test_correct_games_are_not_refuted_and_wrong_ones_are() -> None:
    rule = Rule(np.arange(300) % 2 == 1, 64)
    words = {"alpha": 0.01, "rng": np.random.default_rng(6), "games": 200}
    channel = Channel(0.9, 0.2, 40, 5)
    # 200 games of level 0.01: 14 alarms have a chance below 1e-7.
    assert white_box_power(channel, rule, scale=1.0, **words).value <= 13 / 200  # type: ignore[arg-type]
    assert white_box_power(channel, rule, scale=0.8, **words).value > 0.9  # type: ignore[arg-type]
    assert binom.sf(13, 200, 0.01) < 1e-6


def test_upper_limit_of_sigma_covers() -> None:
    channel, misses = Channel(1.0, 0.2, 20, 10), 0
    for seed in range(40):
        rng = np.random.default_rng([7, seed])
        seen, coins = simulate(channel, 100, rng)
        misses += sigma_upper(seen, coins, channel, level=0.1, rng=rng) < channel.sigma
    assert binom.sf(18, 40, 0.1) < 1e-6 and misses <= 18


def test_a_rate_that_no_number_of_draws_has_is_refused() -> None:
    with pytest.raises(UsageError, match="rate"):
        Channel(1.0, 0.3, 8, 4)
