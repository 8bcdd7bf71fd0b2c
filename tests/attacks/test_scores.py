"""attacks.scores: the loss itself against a plain computation, joining by id, one scale over kinds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.canaries import Plan, draw_game
from attacks.scores import calibrate, join_coins, losses, prioritise, standardise
from dpaudit.config import ReducerConfig
from dpaudit.errors import InvalidGame
from dpaudit.randomness import Key
from tests.attacks.test_canaries import dataset
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

COINS = pd.DataFrame({"id": ["a", "b", "c"], "kind": ["x", "x", "y"], "member": [True, False, True]})


def plain_loss(model: VisionLanguageModel, unit: Unit) -> float:
    """Question by question, token by token, without packing: the definition."""
    per_question = []
    for picture in unit.pictures:
        visual = model.core.model.multi_modal_projector(model.reduce(model.visual_tokens([picture.pixels])).tokens)
        embed = model.core.get_input_embeddings()
        for question in picture.questions:
            asked, answer = model.prompter.encode(question.text, question.answer)
            prefix = embed(torch.tensor([model.prompter.prefix]))
            text = embed(torch.tensor([asked + answer]))
            logits = model.core(inputs_embeds=torch.cat([prefix, visual, text], dim=1)).logits[0]
            start = prefix.shape[1] + visual.shape[1] + len(asked)
            log_p = logits.log_softmax(-1)
            per_question.append(np.mean([-float(log_p[start + i - 1, token]) for i, token in enumerate(answer)]))
    return float(np.mean(per_question))


@pytest.mark.parametrize("reducer", ["none", "visionzip"])
def test_losses_are_the_mean_over_questions_of_the_mean_over_answer_tokens(tiny: Path, reducer: str) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    if reducer != "none":
        model.set_reducer(ReducerConfig(name="visionzip", keep=4, fuse=3))
    game = draw_game(
        dataset(), 9, ("mislabelled", "noise", "new-token"), key=Key.from_seed(0), spare_tokens=model.spare_tokens(9)
    )
    two = Unit("two", (game.candidates[0].unit.pictures[0], game.candidates[4].unit.pictures[0]))
    units = [*(canary.unit for canary in game.candidates), two]
    with torch.no_grad():
        expected = [plain_loss(model, unit) for unit in units]
    np.testing.assert_allclose(losses(model, units), expected, rtol=2e-4)


def test_scores_join_coins_by_id_in_any_order() -> None:
    scores = pd.DataFrame({"id": ["c", "a", "b"], "score": [3.0, 1.0, 2.0]})
    joined = join_coins(scores, COINS)
    assert list(joined["id"]) == ["a", "b", "c"]
    assert list(joined["score"]) == [1.0, 2.0, 3.0]
    assert list(joined["member"]) == [True, False, True]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["a", "b"], [1.0, 2.0], "1 ids of the coin file have no score, the first is 'c'"),
        (["a", "b", "c", "c"], [1.0, 2.0, 3.0, 3.0], "occur twice, the first is 'c'"),
        (["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0], "have no coin, the first is 'd'"),
        (["a", "b", "c"], [1.0, float("nan"), 3.0], "not finite, the first is that of 'b'"),
        (["a", "b", "c"], [1.0, 2.0, float("inf")], "not finite, the first is that of 'c'"),
    ],
)
def test_scores_that_do_not_fit_the_coins_are_an_invalid_game(
    ids: list[str], values: list[float], message: str
) -> None:
    with pytest.raises(InvalidGame, match=message):
        join_coins(pd.DataFrame({"id": ids, "score": values}), COINS)


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=6, max_size=40),
    st.floats(0.1, 50),
    st.floats(-50, 50),
    st.integers(0, 99),
)
def test_standardising_keeps_the_order_within_a_kind_and_ignores_its_scale(
    values: list[float], scale: float, shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kinds = np.array(["x", "y"])[np.arange(len(values)) % 2]
    frame = pd.DataFrame({"kind": kinds, "score": values, "member": rng.random(len(values)) < 0.5})
    ours = standardise(frame)
    flipped = standardise(frame.assign(member=~frame["member"]))
    np.testing.assert_array_equal(ours, flipped)  # coins unused
    for kind in ("x", "y"):
        mine = kinds == kind
        order = np.argsort(np.asarray(values)[mine], kind="stable")
        assert np.all(np.diff(ours[mine][order]) >= 0)
        assert abs(np.median(ours[mine])) < 1e-9
    moved = frame.assign(score=np.where(kinds == "x", frame["score"] * scale + shift, frame["score"]))
    np.testing.assert_allclose(standardise(moved), ours, rtol=1e-6, atol=1e-6 * max(1.0, scale, abs(shift)))


def test_equal_scores_stay_equal_and_finite() -> None:
    frame = pd.DataFrame({"kind": ["x"] * 5, "score": [2.0] * 5})
    np.testing.assert_array_equal(standardise(frame), np.zeros(5))
    frame = pd.DataFrame({"kind": ["x"] * 5, "score": [2.0, 2.0, 2.0, 2.0, 7.0]})
    assert np.isfinite(standardise(frame)).all()
    assert standardise(frame)[4] > 0


def test_calibration_follows_the_base_model_where_it_knows_and_ignores_it_where_it_does_not() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(["near", "far"], 500)
    hard = rng.normal(3, 1, 1000)
    after = np.where(kinds == "near", hard, 0.0) + rng.normal(0, 0.1, 1000)
    score = calibrate(hard, after, kinds)
    np.testing.assert_allclose(score[:500], (hard - after)[:500], atol=0.1)  # slope 1: the reference-model attack
    assert abs(np.corrcoef(score[500:], hard[500:])[0, 1]) < 0.25  # slope 0: the loss alone
    constant = calibrate(np.ones(4), np.arange(4.0), np.array(["a"] * 4))
    assert constant.tolist() == [-0.0, -1.0, -2.0, -3.0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
)
def test_the_planned_guesses_of_every_kind_are_the_guesses_of_all(sizes: list[int], seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    kinds = np.concatenate([[f"k{index}"] * size for index, size in enumerate(sizes)])
    values = rng.integers(0, 3, len(kinds)).astype(float) if ties else rng.normal(size=len(kinds))
    frame = pd.DataFrame({"kind": kinds, "score": values})
    plan = Plan.default({f"k{index}": size for index, size in enumerate(sizes)}, 0)
    out = prioritise(frame, plan.guesses, np.random.default_rng(seed))
    top, bottom = plan.guesses["all"]
    assert int((out >= 1).sum()) == top and int((out <= -1).sum()) == bottom
    for kind, group in frame.assign(out=out).groupby("kind"):
        assert int((group["out"] >= 1).sum()) == plan.guesses[str(kind)][0]
        order = group.sort_values("score")["out"].to_numpy()
        assert ties or bool((np.diff(order) > 0).all())
