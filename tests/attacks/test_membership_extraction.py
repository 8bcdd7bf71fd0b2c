"""Exposure: ranks counted by hand, uniform for secrets that nobody saw, full for one that was learned by heart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.canaries import Canary, draw_game
from attacks.membership.extraction import (
    REFERENCES,
    exposure,
    exposures,
    half_records,
    reference_secrets,
    regeneration,
)
from attacks.scores import losses
from dpaudit.config import LoraConfig
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.gradients import unit_losses
from trainers.inputs import UnitInputs
from trainers.records import Dataset
from trainers.vlm import VisionLanguageModel

DATA = Dataset("x", "image", random_units(4), random_units(3, seed=9, prefix="e"), random_units(20, seed=4, prefix="r"))
TOKENS = [f"<|spare_{index}|>" for index in range(128)]
SECRET_KINDS = (
    "noise", "new-token", "rare-answer", "rendered-code", "out-of-distribution", "cross-modal", "high-perplexity"
)  # fmt: skip


def candidates(count: int, kind: str, seed: int = 0) -> tuple[Canary, ...]:
    return draw_game(DATA, count, [kind], key=Key.from_seed(seed), spare_tokens=TOKENS).candidates  # type: ignore[list-item]


@pytest.mark.parametrize("kind", SECRET_KINDS)
def test_reference_secrets_are_like_the_secret_and_never_it(kind: str) -> None:
    canary = candidates(1, kind)[0]
    answer = canary.unit.pictures[0].questions[0].answer
    others = reference_secrets(canary, TOKENS, np.random.default_rng(0))
    assert others is not None and len(set(others)) == REFERENCES and answer not in others
    assert {len(other.split()) for other in others} == {len(answer.split())}
    if kind == "rendered-code":
        assert {len(other) for other in others} == {4}


def test_kinds_whose_answers_follow_from_something_have_no_secret() -> None:
    assert reference_secrets(candidates(1, "mislabelled")[0], TOKENS, np.random.default_rng(0)) is None
    assert reference_secrets(candidates(1, "new-token")[0], TOKENS[:10], np.random.default_rng(0)) is None


def test_ranks_are_those_counted_by_hand(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    items = candidates(3, "rare-answer")
    rng = np.random.default_rng(1)
    secrets = [reference_secrets(canary, TOKENS, rng) or [] for canary in items]
    found = exposure(model, [canary.unit for canary in items], secrets)
    for index, (canary, others) in enumerate(zip(items, secrets, strict=True)):
        picture = canary.unit.pictures[0]
        rivals = [
            replace(canary.unit, pictures=(replace(picture, questions=(replace(picture.questions[0], answer=other),)),))
            for other in others
        ]
        own = losses(model, [canary.unit])[0]
        assert found.rank[index] == 1 + int((losses(model, rivals) <= own).sum())
    np.testing.assert_allclose(found.bits, 6 - np.log2(found.rank))


def test_secrets_that_nobody_saw_are_not_exposed(tiny: Path) -> None:
    """50 secrets under a model that saw none: the exact test at 1e-6, and the mean of a uniform rank (1.4 bits,
    standard error below 0.3) to six standard errors."""
    base = VisionLanguageModel.load(str(tiny), device="cpu")
    untrained = exposures(base, base, candidates(50, "rare-answer", seed=3), spare_tokens=TOKENS, seed=0)[0]
    assert untrained.p_value > 1e-6
    assert untrained.bits_members == untrained.bits_members_base
    assert untrained.bits_members < 1.4 + 6 * 0.3


def test_what_was_learned_by_heart_ranks_first() -> None:
    """On the reference model: the tiny one can't tell positions apart well enough to spell a word."""
    base, tuned = (VisionLanguageModel.load(None, device="cpu") for _ in range(2))
    parameters = tuned.attach_lora(LoraConfig(rank=8, alpha=16), generator=np.random.default_rng(0))
    few = candidates(6, "rare-answer", seed=5)
    inside = [canary for canary in few if canary.member]
    assert 0 < len(inside) < 6
    inputs = UnitInputs(tuned, [canary.unit for canary in inside])
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = unit_losses(tuned, inputs.select(range(len(inside)))).mean()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.25:
            break
    assert float(loss.detach()) < 0.25  # from 17: learned, else the rest says nothing
    learned = exposures(tuned, base, few, spare_tokens=TOKENS, seed=0)[0]
    assert learned.first_members == learned.members == len(inside)
    assert learned.bits_members == learned.most_bits == 6.0
    assert learned.p_value == pytest.approx(0.125 ** len(inside))
    assert learned.bits_members > learned.bits_others


def test_half_a_record_hides_the_other_half(tiny: Path) -> None:
    units = DATA.train
    halves = half_records(units)
    for mine, silent, blind in zip(units, halves["picture alone"], halves["question alone"], strict=True):
        for picture, without, grey in zip(mine.pictures, silent.pictures, blind.pictures, strict=True):
            assert {question.text for question in without.questions} == {"what is the answer?"}
            assert np.array_equal(without.pixels, picture.pixels)
            assert (grey.pixels == 128).all() and grey.questions == picture.questions
            assert [q.answer for q in without.questions] == [q.answer for q in picture.questions]
    base = VisionLanguageModel.load(str(tiny), device="cpu")
    rows = regeneration(base, base, units, np.array([True, False, True, False]))
    assert [row.half for row in rows] == ["picture alone", "question alone"]
    for row in rows:
        assert row.members == row.members_base and row.others == row.others_base
        assert row.members_low <= row.members <= row.members_high
        assert row.questions_members + row.questions_others == sum(len(p.questions) for u in units for p in u.pictures)
