"""Fused-region canaries lie where they say, come back from the coins, and their exposure is arithmetic."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attacks.canaries import Canary, Plan, draw_game
from attacks.fusion import carried as module
from attacks.fusion.carried import asking, carried, exposures, gain
from attacks.fusion.masks import masks, selection_of
from attacks.kinds import PUBLIC_WORDS, Materials, noise_picture
from attacks.kinds_region import DOMINANT, LOW, FusedRegion, grid, painted
from dpaudit.config import ReducerConfig, resolve
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from tests.tiny import random_units, save_tiny_llava
from trainers.records import Dataset, Pixels
from trainers.vlm import VisionLanguageModel

COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    loaded = VisionLanguageModel.load(str(save_tiny_llava(tmp_path_factory.mktemp("tiny"))), device="cpu")
    loaded.set_reducer(ReducerConfig(name="visionzip", keep=6, fuse=3))
    return loaded


@pytest.fixture(scope="module")
def materials(model: VisionLanguageModel) -> Materials:
    return Materials((), (), 32, 32, selection=lambda pictures: masks(model, pictures))


def changed_patches(pixels: Pixels, base: Pixels, side: int) -> set[int]:
    size = len(base) // side
    cells = (pixels != base).any(axis=2).reshape(side, size, side, size).any(axis=(1, 3))
    return {int(place) for place in np.flatnonzero(cells.ravel())}


def test_codes_stay_in_their_region_and_differ_in_nothing_else(
    model: VisionLanguageModel, materials: Materials
) -> None:
    drafts = FusedRegion().draw(COUNT, materials, np.random.default_rng(0))
    base = noise_picture(32, 32, np.random.default_rng(0))
    kept = masks(model, [base])[0]
    for place, draft in enumerate(drafts):
        pixels = draft.unit.pictures[0].pixels
        code = changed_patches(pixels, base, 4)
        assert len(code) == 3 and draft.description == (DOMINANT if place % 2 else LOW)
        inside = [bool(masks(model, [pixels])[0][patch]) for patch in code]
        assert all(inside) if place % 2 else not any(inside)
        assert all(bool(kept[patch]) == bool(place % 2) for patch in code)
    questions = {draft.unit.pictures[0].questions[0].text for draft in drafts}
    assert len(questions) == 1 and {draft.unit.pictures[0].questions[0].answer for draft in drafts} <= set(PUBLIC_WORDS)
    assert len({draft.unit.pictures[0].pixels.tobytes() for draft in drafts}) == COUNT


def test_a_stored_choice_needs_no_encoder(materials: Materials) -> None:
    """What lies in the coin file gives the same pictures, also where another machine would choose otherwise."""
    first = Materials((), (), 32, 32, selection=materials.selection)
    drafts = FusedRegion().draw(COUNT, first, np.random.default_rng(1))
    stored = Plan.from_json(Plan({}, 0, chosen=first.chosen).to_json()).chosen

    def never(_pictures: Sequence[Pixels]) -> np.ndarray:
        raise AssertionError

    def again(count: int) -> list[bytes]:
        known = Materials((), (), 32, 32, chosen=dict(stored), selection=never)
        found = FusedRegion().draw(count, known, np.random.default_rng(1))
        return [draft.unit.pictures[0].pixels.tobytes() for draft in found]

    assert again(COUNT) == [draft.unit.pictures[0].pixels.tobytes() for draft in drafts]
    with pytest.raises(UsageError, match=r"^coins: the codes stored"):
        again(COUNT + 2)


def test_it_needs_a_reducer_that_selects() -> None:
    with pytest.raises(UsageError, match=r"^canaries\.kinds: kind 'fused-region' needs a reducer"):
        FusedRegion().draw(4, Materials((), (), 32, 32), np.random.default_rng(0))
    assert selection_of(resolve({})) is None

    def everything(pictures: Sequence[Pixels]) -> np.ndarray:
        """The bare picture keeps six patches, a painted one all of them: no code ever lies on merged patches."""
        return np.tile(np.arange(16) < (6 if len(pictures) == 1 else 16), (len(pictures), 1))

    with pytest.raises(UsageError, match=r"found codes that stay in their region for"):
        FusedRegion().draw(4, Materials((), (), 32, 32, selection=everything), np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"square grid"):
        grid(15)


def test_the_kind_takes_part_in_a_game(tmp_path: Path) -> None:
    tiny = save_tiny_llava(tmp_path / "tiny")
    config = resolve({"method": "dual-priv"}, [f"model.path={tiny}", "reducer.keep=6", "reducer.fuse=3"])
    data = Dataset("random", "image", random_units(4), random_units(2, prefix="t"))
    game = draw_game(data, 8, ("fused-region",), key=Key.from_seed(0), spare_tokens=[], selection=selection_of(config))
    assert [item.description for item in game.candidates] == [LOW, DOMINANT] * 4
    assert "fused-region" in game.plan.chosen


def test_only_the_patches_named_are_painted() -> None:
    base = np.full((32, 32, 3), 128, np.uint8)
    made = painted(base, [0, 5], 4, 40.0, np.random.default_rng(0))
    assert changed_patches(made, base, 4) == {0, 5} and set(np.unique(made)) <= {88, 128, 168}


def test_exposure_is_the_rank_of_the_true_word(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = random_units(1)[0]
    words = ("a", "b", "c", "d", "e", "f", "g", "h")
    known = {"base": np.zeros(8), "tuned": np.arange(8.0)}
    monkeypatch.setattr(module, "losses", lambda which, _units: known[which])
    asked = [asking(unit, word) for word in ("a", "b", "h")]
    values = exposures("base", "tuned", asked, words)  # type: ignore[arg-type]
    assert values.tolist() == [3.0, 2.0, 0.0]  # ranks 1, 2 and 8 of 8
    known["tuned"] = np.zeros(8)  # all equal: the middle rank
    middle = exposures("base", "tuned", [asking(unit, "c")], words)  # type: ignore[arg-type]
    assert middle[0] == pytest.approx(3 - math.log2(4.5))


def test_the_interval_is_welchs() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(1.0, 2.0, 30), rng.normal(0.0, 0.5, 20)
    reference = stats.ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    assert gain(one, two).interval() == pytest.approx((reference.low, reference.high))
    assert gain(np.ones(3), np.zeros(3)).interval() == (1.0, 1.0)
    assert gain(np.ones(1), np.zeros(3)).interval() == (-math.inf, math.inf)


def test_the_difference_of_two_gains_covers_the_truth() -> None:
    """400 games with known gains 1 and 3: the interval misses 2 in about 5 %, within limits of false alarm 1e-6."""
    rng = np.random.default_rng(2)
    unit = random_units(1)[0]
    missed = 0
    for _ in range(400):
        coins = rng.random(80) < 0.5
        canaries = [
            Canary(str(place), "fused-region", unit, bool(coins[place]), DOMINANT if place % 2 else LOW)
            for place in range(80)
        ]
        values = rng.normal(size=80) + np.where(np.arange(80) % 2, 3.0, 1.0) * coins
        found = carried(canaries, values)
        assert found is not None and found.references == 64
        missed += not found.difference_low <= 2.0 <= found.difference_high
    low, high = stats.binom.interval(1 - 1e-6, 400, 0.05)
    assert low <= missed <= high


def test_too_few_canaries_give_no_figure() -> None:
    unit = random_units(1)[0]
    canaries = [Canary(str(place), "fused-region", unit, True, LOW) for place in range(6)]
    assert carried(canaries, np.zeros(6)) is None
