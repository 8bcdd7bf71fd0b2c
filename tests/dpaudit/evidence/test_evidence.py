"""dpaudit.evidence against enumeration of all coins, closed forms, quadrature and simulated coverage."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import binom, chi2

from dpaudit.evidence import calibrate
from dpaudit.evidence.channel import Channel, simulate
from dpaudit.evidence.coins import NULLS, Posteriors, p_value
from dpaudit.evidence.game import ALL, KEPT, LOUD, NOISE, SHARES, Rule
from dpaudit.evidence.limits import sigma_upper
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.evidence.power import white_box_power

Floats = npt.NDArray[np.float64]
CHANNELS = [
    Channel(1.0, 0.05, 40),
    Channel(0.6, 0.3, 5),
    Channel(2.0, 1.0, 30),
    Channel(1.0, 1.0, 1),
    Channel(4.0, 0.5, 7),
]
ALL_COINS = np.array(list(itertools.product((False, True), repeat=8)))


@pytest.mark.parametrize("channel", CHANNELS)
def test_log_ratio_equals_the_ratio_of_densities(channel: Channel) -> None:
    """Brute force: the mixture density of every step against the noise density, multiplied out."""
    seen, _ = simulate(channel, 6, np.random.default_rng(1))

    def density(x: Floats, mean: float) -> Floats:
        return np.exp(-((x - mean) ** 2) / (2 * channel.sigma**2))

    inside = (1 - channel.rate) * density(seen, 0.0) + channel.rate * density(seen, 1.0)
    expected = np.log(inside / density(seen, 0.0)).sum(axis=1)
    assert channel.log_ratio(seen) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("scale", (1.0, 0.8))
def test_given_what_was_seen_the_mean_of_the_e_value_is_at_most_one(channel: Channel, scale: float) -> None:
    """Exactly, over all 256 coins, for the claim and every larger noise of the grid, whatever was seen; and between two
    grid points to within the step of the grid."""
    seen, _ = simulate(channel, 8, np.random.default_rng(2), scale=scale)
    e = np.exp(Posteriors.of(seen, channel).log_e(ALL_COINS))
    for times in (*NULLS, 1.005, 1.03, 1.2, 5.0):
        p = expit(channel.log_ratio(seen, scale=times))
        chance = np.where(ALL_COINS, p, 1 - p).prod(axis=1)
        assert chance.sum() == pytest.approx(1.0)
        assert chance @ e <= 1.0 + (1e-9 if times in NULLS else 0.01)


def test_a_smaller_noise_makes_the_evidence_grow() -> None:
    """The sketch of the design: 1,000 canaries, sigma = 1, q = .05, T = 200, 0.9 times the noise: far more than the 6.9
    nats that refute; half of the game as evidence for amplitude 100 as well."""
    channel = Channel(1.0, 0.05, 200)
    for kwargs, least in (({"scale": 0.9}, 30.0), ({"scale": 0.5}, 100.0), ({"amplitude": 100.0}, 30.0)):
        seen, coins = simulate(channel, 1000, np.random.default_rng(3), **kwargs)
        assert float(Posteriors.of(seen, channel).log_e(coins)) > least
    seen, coins = simulate(channel, 1000, np.random.default_rng(3))
    assert float(Posteriors.of(seen, channel).log_e(coins)) < 0


def test_p_value_equals_enumeration() -> None:
    """The exact tail over all coins, for a middling and for an extreme outcome; 20,000 draws, so five standard
    errors."""
    channel = Channel(0.8, 0.5, 6)
    seen, _ = simulate(channel, 8, np.random.default_rng(4))
    posteriors = Posteriors.of(seen, channel)
    p = expit(posteriors.nulls.values[:, 0])
    chance = np.where(ALL_COINS, p, 1 - p).prod(axis=1)
    statistic = posteriors.log_e(ALL_COINS)
    for place in (int(np.argmax(statistic)), int(np.argsort(statistic)[200])):
        exact = float(chance[statistic >= statistic[place] - 1e-9].sum())
        found = p_value(posteriors, ALL_COINS[place], np.random.default_rng(5), draws=20_000)
        assert found == pytest.approx(exact, abs=5 * math.sqrt(exact / 20_000) + 5e-4)


@pytest.mark.parametrize("count", (10, 300, 5000))
def test_noise_e_value_has_mean_one_at_the_claim_and_less_above(count: int) -> None:
    """Quadrature over the chi-square law; for larger noise, or anything that adds to the squares, the mean falls."""
    low, high = chi2.ppf(1e-13, count), chi2.ppf(1 - 1e-13, count)

    def mean(scale: float) -> float:
        def integrand(s: float) -> float:
            return math.exp(NoiseLevel(scale**2 * s, count).log_e + chi2.logpdf(s, count))

        # Below the claim's own bulk the weight of small sigma matters: integrate where exp(log e) times density lives.
        return float(quad(integrand, low * 1e-3, high, limit=400, points=[low, count * 0.9, count])[0])

    assert mean(1.0) == pytest.approx(1.0, abs=0.02)
    assert mean(1.05) < mean(1.0) + 1e-9
    assert NoiseLevel(0.81 * count, count).log_e > NoiseLevel(1.0 * count, count).log_e


def test_noise_interval_is_exact() -> None:
    """Its ends are the levels at which the observed sum lies on a tail of the chi-square law."""
    level = NoiseLevel(950.0, 1000)
    low, high = level.interval(0.01)
    assert chi2.sf(950.0 / low**2, 1000) == pytest.approx(0.005)
    assert chi2.cdf(950.0 / high**2, 1000) == pytest.approx(0.005)
    assert low < level.ratio < high


@pytest.mark.parametrize("wanted", (20.0, 1000.0, 1e5))
def test_calibrated_p_values_are_e_values(wanted: float) -> None:
    """The integral over uniform p is 1, and a p-value at the level reaches what is wanted."""
    at = calibrate.level(wanted=wanted)
    below = quad(lambda u: 0.5 * math.exp(u) * 2 * calibrate._mixture(math.exp(u)), -700, math.log(1.0), limit=400)[0]
    assert wanted * at + 0.5 * below == pytest.approx(1.0, abs=2e-3)
    assert calibrate.e_value(at, wanted=wanted) >= wanted > calibrate.e_value(1.1 * at, wanted=wanted)
    assert calibrate.e_value(1.0, wanted=wanted) == pytest.approx(0.25)


def test_shares_and_what_is_kept_add_up_to_one() -> None:
    assert sum(SHARES.values()) + KEPT == pytest.approx(1.0)
    rule = Rule(np.array([False, True] * 4), spare=3)
    channel = Channel(1.0, 0.5, 4)
    seen, coins = simulate(channel, 8, np.random.default_rng(6))
    posteriors, noise = Posteriors.of(seen, channel), NoiseLevel(10.0, 12)
    parts = rule.parts(posteriors, coins, noise)
    expected = KEPT + sum(SHARES[name] * math.exp(value) for name, value in parts.items())
    assert set(parts) == {ALL, LOUD, NOISE}
    assert rule.log_e(posteriors, coins, noise) == pytest.approx(math.log(expected))
    assert set(Rule(rule.loud, 3, known=False).parts(posteriors, coins, noise)) == {NOISE}


def test_upper_limit_of_sigma_covers() -> None:
    """60 games at level 0.1: more than 21 misses would have a chance below 1e-6; and the limit is sharp, not merely
    safe."""
    channel, misses, limits = Channel(1.0, 0.3, 20), 0, []
    for seed in range(60):
        rng = np.random.default_rng([7, seed])
        seen, coins = simulate(channel, 150, rng)
        limits.append(sigma_upper(seen, coins, channel, level=0.1, rng=rng))
        misses += limits[-1] < channel.sigma
    assert binom.sf(21, 60, 0.1) < 1e-6 and misses <= 21
    assert 1.0 < np.median(limits) < 1.3


@pytest.mark.parametrize("scale, high", ((0.5, 0.65), (0.1, 0.6), (0.0, 0.6)))
def test_upper_limit_finds_missing_noise(scale: float, high: float) -> None:
    channel = Channel(1.0, 0.1, 100)
    seen, coins = simulate(channel, 400, np.random.default_rng(8), scale=scale)
    assert sigma_upper(seen, coins, channel, level=0.02, rng=np.random.default_rng(9)) < high


def test_power_is_that_of_the_game_as_played() -> None:
    """Against 120 whole games simulated one by one: the two shares differ by less than five standard errors."""
    channel, rule, scale, alpha = Channel(1.0, 0.2, 30), Rule(np.arange(200) % 2 == 1, 0), 0.8, 0.01
    power = white_box_power(channel, rule, alpha=alpha, scale=scale, rng=np.random.default_rng(10))
    hits = 0
    for seed in range(120):
        seen, coins = simulate(channel, 200, np.random.default_rng([11, seed]), scale=scale)
        hits += rule.log_e(Posteriors.of(seen, channel), coins, None) >= -math.log(alpha)
    assert abs(hits / 120 - power.value) < 5 * math.sqrt(0.25 * (1 / 120 + 1 / 400))
    assert power.low <= power.value <= power.high
    assert white_box_power(channel, rule, alpha=alpha, scale=1.0, rng=np.random.default_rng(12)).value < 0.02
