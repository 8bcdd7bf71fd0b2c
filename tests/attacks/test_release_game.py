"""The release game agrees with its closed form, never lies about it too often, and sees what is released beside it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtr

from attacks.fusion import published
from attacks.fusion.masks import mask_leak, masks
from attacks.fusion.release import (
    Pair,
    alone,
    count,
    fair_coins,
    farthest,
    fused_pair,
    mu_interval,
    noiseless_tokens,
    play,
    published_pair,
    ratio_scores,
    trained_scores,
)
from attacks.fusion.standins import one_patch
from dpaudit import accounting
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.roc import clopper_pearson_interval
from dpaudit.config import ReducerConfig
from dpaudit.randomness import Key
from tests.attacks.fusion_paths import token_path
from tests.tiny import random_units, save_tiny_llava
from trainers.fusion import TokenRelease
from trainers.inputs import UnitInputs
from trainers.records import Unit

DELTA = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def units() -> list[Unit]:
    return [alone(unit, f"p{index}") for index, unit in enumerate(random_units(4))]


def simulated(mu: float, draws: int, rng: np.random.Generator, d: int = 6) -> Pair:
    """A pair at distance mu with unit noise."""
    clean = np.zeros((2, d))
    clean[1, :2] = mu / math.sqrt(2)
    return Pair("simulated", "numbers", clean, rng.normal(size=(draws, d)), fair_coins(draws, rng))


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_the_likelihood_ratio_errs_as_often_as_the_formula_says(mu: float) -> None:
    """100,000 draws: errors are binomial with Phi(-mu/2); false alarm 1e-8."""
    pair = simulated(mu, 100_000, np.random.default_rng(1))
    found = count(ratio_scores(pair, pair.draws(1.0)), pair.coins)
    low, high = stats.binom.interval(1 - 1e-8, 100_000, ndtr(-mu / 2))
    assert low <= found.fn + found.fp <= high
    interval = mu_interval(found, confidence=1 - 1e-8)
    assert interval[0] <= mu <= interval[1] and interval[1] - interval[0] < 0.2
    assert play(pair, 1.0, delta=DELTA).epsilon == pytest.approx(accounting.gaussian_epsilon(mu, DELTA))
    # Twice the noise: half of mu, on the same pair.
    assert play(pair, 2.0, delta=DELTA).mu == pytest.approx(mu / 2)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_bounds_exceed_the_closed_form_as_rarely_as_stated(mu: float) -> None:
    """200 games at 95 %: at most 21 lower bounds above the truth (the 0.999 quantile), for both distinguishers."""
    rng = np.random.default_rng(2)
    above = {"ratio": 0, "trained": 0, "free": 0}
    truth = accounting.gaussian_epsilon(mu, DELTA)
    for _ in range(200):
        pair = simulated(mu, 300, rng)
        played = play(pair, 1.0, delta=DELTA)
        bounds = [float(test.epsilon_lower or 0) for test in played.tests]
        above["free"] += bounds[0] > truth
        above["ratio"] += bounds[1] > truth
        above["trained"] += bounds[3] > truth
        assert all(float(test.epsilon_lower or 0) <= float(test.ceiling or 0) for test in played.tests)
    assert max(above.values()) <= 21


def test_an_interval_without_errors_is_open_upwards() -> None:
    low, high = mu_interval(Counts(50, 0, 0, 50))
    assert low > 2 and high == math.inf
    assert mu_interval(Counts(25, 25, 25, 25))[0] == 0.0


def test_the_trained_classifier_never_sees_what_it_is_judged_on() -> None:
    """Pure noise: right half of the time; a wide pair: nearly always. Half of the draws are judged."""
    rng = np.random.default_rng(3)
    nothing = simulated(0.0, 4000, rng)
    scores, coins = trained_scores(nothing.draws(1.0), nothing.coins)
    right = float(((scores > 0) == coins).mean())
    assert len(coins) == 2000 and abs(right - 0.5) < 6 * math.sqrt(0.25 / 2000)
    wide = simulated(8.0, 400, rng)
    scores, coins = trained_scores(wide.draws(1.0), wide.coins)
    assert ((scores > 0) == coins).mean() > 0.98
    assert (trained_scores(wide.draws(1.0), np.zeros(400, dtype=bool))[0] == 0).all()


def test_the_game_runs_on_the_trainers_own_noise(tiny: Path, units: Sequence[Unit]) -> None:
    path = token_path(tiny)
    coins = fair_coins(400, np.random.default_rng(4))
    pair = fused_pair(path, units[:2], "two pictures", coins)
    reduced = path.model.reduce(path.visual([unit.pictures[0] for unit in units[:2]]))
    fused = reduced.tokens[:, -3:].flatten(1).double()
    assert pair.distance == pytest.approx(float((fused[0] - fused[1]).norm()), rel=1e-5)
    # The residual is unit noise: 400 x 96 values, six standard errors.
    assert abs(float(pair.noise.var()) - 1) < 6 * math.sqrt(2 / pair.noise.size)
    for mu in (0.5, 1.0, 2.0):
        played = play(pair, pair.distance / mu, delta=DELTA, confidence=1 - 1e-7)
        assert played.mu_low is not None and played.mu_low <= mu <= float(played.mu_high or 0)


def test_cls_and_dominant_tokens_carry_no_noise(tiny: Path, units: Sequence[Unit]) -> None:
    assert noiseless_tokens(token_path(tiny), units[0]) == (6, 9)  # CLS and five dominant, three fused
    assert noiseless_tokens(token_path(tiny, ReducerConfig()), units[0]) == (17, 17)


def test_a_search_goes_farther_than_the_pictures_it_starts_from(tiny: Path, units: Sequence[Unit]) -> None:
    model = token_path(tiny).model
    start = [unit.pictures[0].pixels for unit in units[:2]]
    found = farthest(model, *start, rng=np.random.default_rng(5), rounds=3)
    apart = [
        float(
            (lambda fused: (fused[0] - fused[1]).norm())(model.reduce(model.visual_tokens(list(pair))).tokens[:, -3:])
        )
        for pair in (start, found)
    ]
    assert apart[1] > apart[0]


def test_masks_of_neighbours_against_a_count_by_hand(tiny: Path) -> None:
    model = token_path(tiny).model
    pictures = [unit.pictures[0].pixels for unit in random_units(30)]
    found = mask_leak(model, pictures, rng=np.random.default_rng(6))
    rng = np.random.default_rng(6)
    changed = [one_patch(item, row=int(rng.integers(8)), column=int(rng.integers(8))) for item in pictures]
    kept = [set(model.reduce(model.visual_tokens([item])).kept[0].tolist()) for item in [*pictures, *changed]]
    assert found.flipped == sum(kept[index] != kept[30 + index] for index in range(30))
    assert found.pairs == 435 and found.neighbours == 30
    assert found.different == sum(kept[i] != kept[j] for i in range(30) for j in range(i))
    nearest = [
        all(len(kept[30 + i] ^ kept[i]) < len(kept[30 + i] ^ kept[j]) for j in range(30) if j != i) for i in range(30)
    ]
    assert found.identified == sum(nearest)
    assert masks(model, pictures).sum(axis=1).tolist() == [5] * 30
    assert found.low <= found.flipped / 30 <= found.high
    assert clopper_pearson_interval(0, 10, 0.95)[0] == 0.0 and clopper_pearson_interval(10, 10, 0.95)[1] == 1.0


RADIUS, Z = 5.0, 1.5


def accounted(tiny: Path, key: Key | None = None):
    path = token_path(tiny)
    release = TokenRelease(RADIUS, Z, key or path.key)
    return path, release


def test_accounted_fusion_meets_its_formula(tiny: Path, units: Sequence[Unit]) -> None:
    """Every game agrees with |difference| / (zR); zero-out reaches 1/z and the ball's ends reach 2/z."""
    path, release = accounted(tiny)
    games = published.pairs(release, path, units, draws=500, seed=7)
    played, agrees = published.audit_pairs(release, games, delta=DELTA)
    assert agrees.status == "pass"
    assert [round(float(pair.mu), 6) for pair in (played[0], played[2])] == [round(1 / Z, 6), round(2 / Z, 6)]
    assert float(played[1].mu) <= 2 / Z
    for pair in played:
        low, high = mu_interval(
            count(ratio_scores(*_of(games, pair.name, release)), _coins(games, pair.name)), confidence=1 - 1e-7
        )
        assert low <= float(pair.mu) <= high


def _of(games: Sequence[published.Game], name: str, release: TokenRelease):
    pair = next(pair for pair, _ in games if pair.name == name)
    return pair, pair.draws(release.std)


def _coins(games: Sequence[published.Game], name: str):
    return next(pair.coins for pair, _ in games if pair.name == name)


def test_less_noise_than_accounted_is_seen(tiny: Path, units: Sequence[Unit]) -> None:
    """A release that adds a third of its noise, and one that does not clip."""

    class Quiet(TokenRelease):
        def publish(self, tokens, pictures):
            clipped = self.clipped(tokens)
            return [
                item + (noisy - item) / 3
                for item, noisy in zip(clipped, super().publish(tokens, pictures), strict=True)
            ]

    class Unclipped(TokenRelease):
        def clipped(self, tokens):
            return [item.float() for item in tokens]

    path, _ = accounted(tiny)
    for planted in (Quiet(RADIUS, Z, path.key), Unclipped(RADIUS, Z, path.key)):
        games = published.pairs(planted, path, units, draws=500, seed=8)
        assert published.audit_pairs(planted, games, delta=DELTA)[1].status == "fail"


def test_published_noise_is_checked(tiny: Path) -> None:
    path, release = accounted(tiny)
    units = random_units(4)
    mine = path.__class__(**{**vars(path), "encode": lambda chosen: UnitInputs(path.model, chosen, release=release)})
    assert {check.status for check in published.audit_noise(release, mine, units)} == {"pass"}

    class Shared(TokenRelease):
        def publish(self, tokens, pictures):
            return super().publish(tokens, ["everybody"] * len(pictures))

    shared = Shared(RADIUS, Z, path.key)
    failed = [check.name for check in published.audit_noise(shared, mine, units) if check.status == "fail"]
    assert "published noise independent over pictures" in failed

    class Fresh(UnitInputs):
        def select(self, units, *, key=None, step=0, fusion_std=0.0):
            rows = super().select(units)
            return rows.__class__(**{**vars(rows), "tokens": rows.tokens + 0.1 * step})

    fresh = path.__class__(**{**vars(path), "encode": lambda chosen: Fresh(path.model, chosen, release=release)})
    failed = [check.name for check in published.audit_noise(release, fresh, units) if check.status == "fail"]
    assert failed == [published.ONCE]


def test_a_published_pair_draws_fresh_noise(tiny: Path) -> None:
    _, release = accounted(tiny)
    pair = published_pair(
        release, [torch.zeros(3, 4), torch.ones(3, 4)], "x", fair_coins(300, np.random.default_rng(9))
    )
    assert abs(float(pair.noise.var()) - 1) < 6 * math.sqrt(2 / pair.noise.size)
    assert np.abs(np.corrcoef(pair.noise)[np.triu_indices(300, 1)]).max() < 1
