"""attacks.blind: finds a planted difference, keeps its false-alarm rate, and does what scikit-learn's ridge does."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn.linear_model import Ridge

from attacks import blind
from attacks.blind import blind_baseline, features
from tests.attacks.test_canaries import draw
from trainers.records import Picture, Unit

GAME = draw(240, reserve=80)
UNITS = [canary.unit for canary in GAME.candidates]
KINDS = [canary.kind for canary in GAME.candidates]


def changed(unit: Unit, change: Callable[[Picture], Picture]) -> Unit:
    return replace(unit, pictures=tuple(change(picture) for picture in unit.pictures))


def coins(seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(len(UNITS)) < 0.5


def brighter(picture: Picture) -> Picture:
    return replace(picture, pixels=np.clip(picture.pixels.astype(int) + 25, 0, 255).astype(np.uint8))


def longer(picture: Picture) -> Picture:
    return replace(picture, questions=tuple(replace(q, text=q.text + "?") for q in picture.questions))


def other_answer(picture: Picture) -> Picture:
    return replace(picture, questions=tuple(replace(q, answer=q.answer + "s") for q in picture.questions))


@pytest.mark.parametrize("change", [brighter, longer, other_answer])
def test_a_planted_difference_is_found(change: Callable[[Picture], Picture]) -> None:
    members = coins(1)
    units = [changed(unit, change) if member else unit for unit, member in zip(UNITS, members, strict=True)]
    result = blind_baseline(units, members, kinds=KINDS)
    assert result is not None
    assert result.beats_chance
    assert result.check().status == "fail"
    assert result.auc > 0.7


def test_false_alarms_are_as_rare_as_stated() -> None:
    """150 null games of 80 records: p-values at most uniform. Binomial limits below 1e-7, fixed seeds."""
    p_values = []
    for seed in range(150):
        result = blind_baseline(UNITS[::3], coins(1000 + seed)[::3], kinds=KINDS[::3], seed=seed)
        assert result is not None
        p_values.append(result.p_value)
    for level in (0.5, 0.1, 0.01):
        hits = sum(p <= level for p in p_values)
        assert stats.binomtest(hits, len(p_values), level, alternative="greater").pvalue > 1e-7
    # Not merely conservative: a test that never fires would pass the above.
    assert stats.binomtest(sum(p <= 0.5 for p in p_values), len(p_values), 0.5, alternative="less").pvalue > 1e-7


def test_unequal_kinds_are_no_signal() -> None:
    """Kinds differ in everything; membership that is fair within each kind must not count, however many fall heads."""
    members = coins(5)
    rng = np.random.default_rng(5)
    noise = np.flatnonzero(np.asarray(KINDS) == "noise")
    members[noise] = False
    members[noise[rng.permutation(len(noise))[:70]]] = True
    result = blind_baseline(UNITS, members, kinds=KINDS)
    assert result is not None
    assert not result.beats_chance


def test_out_of_fold_predictions_are_those_of_scikit_learn() -> None:
    rows = features(UNITS[:60])
    labels = coins(2)[:60].astype(np.float64)
    folds = np.random.default_rng(0).permutation(60) % 5
    ours = blind._hat(rows, folds) @ labels
    for fold in range(5):
        train, test = folds != fold, folds == fold
        model = Ridge(alpha=rows.shape[1] * blind._RIDGE, fit_intercept=False).fit(rows[train], labels[train])
        centre = Ridge(alpha=rows.shape[1] * blind._RIDGE, fit_intercept=False).fit(rows[train], np.ones(train.sum()))
        expected = model.predict(rows[test]) - centre.predict(rows[test]) * labels[train].mean()
        np.testing.assert_allclose(ours[test], expected, atol=1e-9)


def test_too_few_records_give_no_result() -> None:
    assert blind_baseline(UNITS[:10], coins(0)[:10]) is None
    assert blind_baseline(UNITS[:40], np.ones(40, dtype=bool)) is None
