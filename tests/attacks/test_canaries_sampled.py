"""Canaries that the base model makes up."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.canaries import check_coins, content_sha256, draw_game
from attacks.kinds_sampled import PROMPT, pack, sampler_of, unpack
from dpaudit.config import CanaryKind, resolve
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from tests.attacks.test_canaries import dataset
from tests.commands import Done, run_all
from trainers.records import Pixels

KINDS: tuple[CanaryKind, ...] = ("sampled", "blank")
ARGUMENTS: dict[str, Any] = {"key": Key.from_seed(8), "spare_tokens": []}


class Model:
    """Says a text that depends on question and seed; nothing at its first two calls for every third text."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[Pixels, str]]] = []

    def __call__(self, asked: list[tuple[Pixels, str]], seed: int) -> list[str]:
        self.asked.append(list(asked))
        silent = len(self.asked) in (1, 2)
        return ["" if silent and place % 3 == 0 else f"  {seed % 97} \n is it {place}" for place in range(len(asked))]


def test_the_model_asks_about_its_picture_and_then_answers_its_own_question() -> None:
    model = Model()
    game = draw_game(dataset(), 12, KINDS, sampler=model, **ARGUMENTS)
    mine = [item for item in game.candidates if item.kind == "sampled"]
    assert {text for _, text in model.asked[0]} == {PROMPT}
    questions = [item.unit.pictures[0].questions[0] for item in mine]
    answered = [text for call in model.asked for _, text in call if text != PROMPT]
    assert {question.text for question in questions} <= set(answered)
    assert all(question.answer and question.answer == " ".join(question.answer.split()) for question in questions)
    assert len({content_sha256(item.unit) for item in mine}) == 6


def test_the_texts_are_stored_with_the_coins_and_need_no_model_again(tmp_path: Path) -> None:
    game = draw_game(dataset(), 12, KINDS, sampler=Model(), **ARGUMENTS)
    digest = game.save_coins(tmp_path / "coins.parquet")
    coins = check_coins(tmp_path / "coins.parquet", digest)
    draw_game(dataset(), 12, KINDS, chosen=coins.plan.chosen, **ARGUMENTS).check_against(coins)
    with pytest.raises(UsageError, match="sampled from the base model, which is not at hand"):
        draw_game(dataset(), 12, KINDS, **ARGUMENTS)


@pytest.mark.parametrize(
    "numbers", [(), (65, 0), (65,) * 12, (65, 0) * 13, (65, 0) * 11 + (0,), (*(65, 0) * 11, *(65,) * 201, 0)]
)
def test_stored_texts_that_do_not_fit_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="do not fit this run's kinds and count"):
        draw_game(dataset(), 12, KINDS, chosen={"sampled": numbers}, **ARGUMENTS)


@pytest.mark.parametrize("number", [-1, 0xD800, 0x110000, 2**40])
def test_numbers_that_are_no_characters_are_refused(number: int) -> None:
    with pytest.raises(UsageError, match="are damaged"):
        draw_game(dataset(), 12, KINDS, chosen={"sampled": (number, 0) * 12}, **ARGUMENTS)


def test_a_model_that_says_nothing_is_named() -> None:
    with pytest.raises(UsageError, match=r"got 0 answers of 6 .* leave the kind out"):
        draw_game(dataset(), 12, KINDS, sampler=lambda asked, seed: [""] * len(asked), **ARGUMENTS)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))))
def test_texts_come_back(texts: list[str]) -> None:
    assert unpack(pack(texts)) == texts


def test_the_sampler_is_a_function_of_the_seed() -> None:
    sample = sampler_of(resolve({}, ["canaries.kinds=[sampled]"]))
    pixels = dataset().test[0].pictures[0].pixels
    asked = [(pixels, "what is it?")] * 8
    first = sample(asked, 3)
    assert first == sample(asked, 3)
    assert len(set(first)) > 1  # temperature 1: not the greedy answer again and again
    assert first != sample(asked, 4)


def test_a_run_with_sampled_canaries_trains_and_is_audited(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    settings = ["canaries.kinds=[sampled]", "data.limit=16", "training.steps=2", "training.batch-size=16"]
    train = ["train", "--method", "dp-sgd", "--canaries", "10", "--seed", "3", "--out", run, *settings]
    done: list[Done] = run_all([train, ["audit", run, "--canaries"]], cwd=tmp_path)
    assert [item.code for item in done] == [0, 0], done
