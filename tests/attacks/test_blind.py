"""attacks.blind: what the blind baseline sees of records (the test itself: tests/dpaudit/test_blind.py)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

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
    result = blind_baseline(features(units), members, kinds=KINDS)
    assert result is not None
    assert result.beats_chance
    assert result.check().status == "fail"
    assert result.auc > 0.7


def test_unequal_kinds_are_no_signal() -> None:
    """Kinds differ in everything; membership that is fair within each kind must not count, however many fall heads."""
    members = coins(5)
    rng = np.random.default_rng(5)
    noise = np.flatnonzero(np.asarray(KINDS) == "noise")
    members[noise] = False
    members[noise[rng.permutation(len(noise))[:70]]] = True
    result = blind_baseline(features(UNITS), members, kinds=KINDS)
    assert result is not None
    assert not result.beats_chance


def test_too_few_records_give_no_result() -> None:
    assert blind_baseline(features(UNITS[:10]), coins(0)[:10]) is None
    assert blind_baseline(features(UNITS[:40]), np.ones(40, dtype=bool)) is None
