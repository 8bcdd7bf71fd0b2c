"""attacks.canaries and attacks.kinds: fair coins, candidates that can't tell them, files that can't be edited."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attacks.canaries import ALL, KINDS, Game, Plan, check_coins, content_sha256, draw_game, share_out
from attacks.kinds import PUBLIC_WORDS, Materials, rare_word, wrong_answer
from attacks.kinds_drawn import code_picture
from dpaudit.config import CanaryKind
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.randomness import Key
from trainers.records import Dataset, Picture, Question, Unit

ALL_KINDS: tuple[CanaryKind, ...] = ("mislabelled", "noise", "new-token")
TOKENS = [f"<t{index}>" for index in range(2000)]


def unit(name: str, seed: int, size: tuple[int, int] = (16, 12)) -> Unit:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    questions = (Question("is it big?", "yes", "size"), Question("how many?", "3", "count"))
    return Unit(name, (Picture(f"{name}-0", pixels, questions),))


def dataset(reserve: int = 40) -> Dataset:
    return Dataset(
        name="x",
        unit="image",
        train=tuple(unit(f"train-{index}", index) for index in range(4)),
        test=tuple(unit(f"test-{index}", 100 + index) for index in range(3)),
        reserve=tuple(unit(f"reserve-{index}", 1000 + index) for index in range(reserve)),
        source="local",
    )


def draw(count: int, seed: int = 0, kinds: tuple[CanaryKind, ...] = ALL_KINDS, reserve: int = 40) -> Game:
    return draw_game(dataset(reserve), count, kinds, key=Key.from_seed(seed), spare_tokens=TOKENS)


def test_the_game_is_a_function_of_the_key() -> None:
    assert draw(30).frame().equals(draw(30).frame())
    assert draw(30).plan == draw(30).plan
    assert not draw(30).frame().equals(draw(30, seed=1).frame())


def test_members_are_the_units_whose_coin_fell_heads() -> None:
    game = draw(60)
    assert [item.id for item in game.members()] == [item.id for item in game.candidates if item.member]
    assert [item.unit.id for item in game.candidates] == [item.id for item in game.candidates]
    pictures = [picture.id for item in game.candidates for picture in item.unit.pictures]
    assert len(set(pictures)) == len(pictures)


def test_coins_are_fair_and_independent() -> None:
    """200 games of 60 coins. Each test has a false-alarm rate below 1e-7 and a fixed seed."""
    coins = np.array([[item.member for item in draw(60, seed).candidates] for seed in range(200)])
    assert stats.binomtest(int(coins.sum()), coins.size, 0.5).pvalue > 1e-7
    heads = coins.sum(axis=1)
    # Exactly-half splits would have variance 0; independent coins have 60 / 4.
    assert stats.chi2(199).cdf(199 * heads.var(ddof=1) / 15.0) == pytest.approx(0.5, abs=0.5 - 1e-7)
    neighbours = (coins[:, 1:] == coins[:, :-1]).sum()
    assert stats.binomtest(int(neighbours), coins[:, 1:].size, 0.5).pvalue > 1e-7


def test_candidates_do_not_depend_on_coins() -> None:
    """Candidates come from their own stream: with the coin stream replaced they stay what they are."""

    class OtherCoins(Key):
        def uniform(self, count: int, *, step: int, name: str, purpose: str) -> Any:
            assert purpose == "coins"
            return np.zeros(count)

    key = Key.from_seed(0)
    other = OtherCoins(key.material, True)
    ours = draw_game(dataset(), 30, ALL_KINDS, key=key, spare_tokens=TOKENS)
    theirs = draw_game(dataset(), 30, ALL_KINDS, key=other, spare_tokens=TOKENS)
    assert list(ours.frame()["content"]) == list(theirs.frame()["content"])
    assert all(item.member for item in theirs.candidates)
    assert not all(item.member for item in ours.candidates)


@given(st.integers(0, 500), st.lists(st.sampled_from(ALL_KINDS), unique=True, min_size=1))
def test_kinds_share_evenly(count: int, kinds: list[str]) -> None:
    sizes = share_out(count, kinds)
    assert sum(sizes.values()) == count
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_every_kind_keeps_its_word() -> None:
    data = dataset()
    game = draw_game(data, 90, ALL_KINDS, key=Key.from_seed(3), spare_tokens=TOKENS)
    by_kind = {kind: [item for item in game.candidates if item.kind == kind] for kind in ALL_KINDS}
    reserve = {hashlib.sha256(item.pictures[0].pixels.tobytes()).hexdigest(): item for item in data.reserve}
    for item in by_kind["mislabelled"]:
        picture = item.unit.pictures[0]
        source = reserve.pop(hashlib.sha256(picture.pixels.tobytes()).hexdigest()).pictures[0]  # each used once
        for wrong, true in zip(picture.questions, source.questions, strict=True):
            assert wrong.text == true.text
            assert wrong.answer != true.answer
    words = [item.unit.pictures[0].questions[0].answer for item in by_kind["noise"]]
    assert len(set(words)) == 30
    tokens = [item.unit.pictures[0].questions[0].answer for item in by_kind["new-token"]]
    assert sorted(tokens) == sorted(TOKENS[:30])
    for kind in ("noise", "new-token"):
        pixels = [item.unit.pictures[0].pixels for item in by_kind[kind]]
        assert {item.shape for item in pixels} == {(16, 12, 3)}
        assert len({item.tobytes() for item in pixels}) == 30
    assert len({content_sha256(item.unit) for item in game.candidates}) == 90


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["yes", "No", "true", "FALSE", "7", "seven", "red", "balinese", " yes "]), st.integers(0, 99))
def test_a_wrong_answer_is_wrong_and_public(truth: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    public = {"digit": ("one", "two", "seven")}
    answer = wrong_answer(Question("?", truth, "other"), public, rng)
    assert answer.casefold() != truth.strip().casefold()
    assert answer in (*PUBLIC_WORDS, *"0123456789", "yes", "no", "true", "false")
    assert wrong_answer(Question("?", truth, "digit"), public, rng) in {"one", "two", "seven"} - {truth}


def test_rare_words_are_pronounceable() -> None:
    words = {rare_word(np.random.default_rng(seed)) for seed in range(500)}
    assert len(words) == 500
    assert all(len(word) == 8 and set(word[1::2]) <= set("aeiou") for word in words)


def test_what_does_not_suffice_is_said_with_numbers() -> None:
    with pytest.raises(UsageError, match=r"41 candidates of kind 'mislabelled' .* the reserve holds 40"):
        draw(123)
    with pytest.raises(UsageError, match=r"2001 candidates of kind 'new-token' .* the tokenizer offers 2000"):
        draw(2001, kinds=("new-token",))
    with pytest.raises(UsageError, match=r"canaries\.kinds"):
        draw_game(dataset(), 3, ["no-such-kind"], key=Key.from_seed(0), spare_tokens=TOKENS)  # type: ignore[list-item]


def test_no_canaries_is_an_empty_game() -> None:
    assert draw_game(dataset(), 0, ALL_KINDS, key=Key.from_seed(0), spare_tokens=[]).candidates == ()


def test_embedded_digits_use_their_public_answers() -> None:
    from dpaudit.config import DataConfig
    from trainers.data import load
    from trainers.data.digits import PUBLIC_ANSWERS

    data = load(DataConfig())
    assert Materials.of(data, []).public_answers == PUBLIC_ANSWERS
    game = draw_game(data, 100, ("mislabelled",), key=Key.from_seed(0), spare_tokens=[])
    for item in game.candidates:
        for question in item.unit.pictures[0].questions:
            assert question.answer in PUBLIC_ANSWERS[question.kind]


def test_guesses_are_fixed_with_the_coins(tmp_path: Path) -> None:
    plan = draw(61).plan
    assert plan.guesses == {ALL: (12, 12), "mislabelled": (3, 3), "noise": (2, 2), "new-token": (7, 7)}
    assert Plan.from_json(plan.to_json()) == plan
    one = Plan.default({"noise": 1}, 0)
    assert one.guesses["noise"] == (1, 0)
    sha256 = draw(61).save_coins(tmp_path / "coins.parquet")
    assert check_coins(tmp_path / "coins.parquet", sha256).plan == plan


@pytest.mark.parametrize("size", range(12))
def test_no_kind_guesses_more_than_it_has(size: int) -> None:
    """Three new-token candidates once got two guesses on each side, and the audit a line about 'bottom'."""
    guesses = Plan.default(dict.fromkeys(KINDS, size), 1).guesses
    assert all(top + bottom <= size for kind, (top, bottom) in guesses.items() if kind != ALL)
    assert all(min(top, bottom) >= (size > 1) for top, bottom in guesses.values())


def test_coins_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "coins.parquet"
    game = draw(30)
    sha256 = game.save_coins(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    coins = check_coins(path, sha256)
    game.check_against(coins)
    with pytest.raises(InvalidGame, match="have changed since training"):
        draw(30, seed=1).check_against(coins)
    with pytest.raises(InvalidGame, match="have changed since training"):
        draw(27).check_against(coins)


def test_the_stored_plan_stands_when_the_defaults_change(tmp_path: Path) -> None:
    """Guesses were fixed before the first step: another version's defaults must neither replace nor invalidate them."""
    game = draw(30)
    old = replace(game, plan=replace(game.plan, guesses=dict.fromkeys(game.plan.guesses, (1, 1))))
    coins = check_coins(tmp_path / "coins.parquet", old.save_coins(tmp_path / "coins.parquet"))
    game.check_against(coins)
    assert coins.plan == old.plan


def test_an_edited_file_is_an_invalid_game(tmp_path: Path) -> None:
    path = tmp_path / "coins.parquet"
    sha256 = draw(30).save_coins(path)
    table = pyarrow.parquet.read_table(path)
    frame = table.to_pandas()
    frame.loc[0, "member"] = not frame.loc[0, "member"]
    frame.to_parquet(path)
    with pytest.raises(InvalidGame, match="the coins were edited"):
        check_coins(path, sha256)
    path.unlink()
    with pytest.raises(InvalidGame, match="missing"):
        check_coins(path, sha256)


@pytest.mark.parametrize("fault", ["no hash", "not parquet", "no plan", "columns", "doubled", "member"])
def test_a_file_that_is_no_coin_file(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "coins.parquet"
    sha256: str | None = draw(30).save_coins(path)
    table = pyarrow.parquet.read_table(path)
    metadata = table.schema.metadata
    frame: pd.DataFrame = table.to_pandas()
    if fault == "no hash":
        sha256 = None
    elif fault == "not parquet":
        path.write_bytes(b"PAR1 nothing")
    else:
        if fault == "columns":
            frame = frame.drop(columns="kind")
        elif fault == "doubled":
            frame = pd.concat([frame, frame[:1]])
        elif fault == "member":
            frame["member"] = "yes"
        changed = pyarrow.Table.from_pandas(frame, preserve_index=False)
        pyarrow.parquet.write_table(changed.replace_schema_metadata({} if fault == "no plan" else metadata), path)
    if sha256 is not None:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InvalidGame) as caught:
        check_coins(path, sha256)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_kinds_describe_themselves() -> None:
    assert set(KINDS) == set(get_args(CanaryKind))
    assert all(kind.description.endswith(".") for kind in KINDS.values())
    assert [name for name, kind in KINDS.items() if not kind.synthetic] == ["mislabelled", "natural"]
    assert json.loads(Plan.default({}, 1).to_json())["tie_seed"] == 1


DRAWN: tuple[CanaryKind, ...] = (
    "blank", "out-of-distribution", "rendered-code", "cross-modal", "rare-answer", "high-perplexity"
)  # fmt: skip


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("size", [(16, 12), (1, 1), (64, 80)])
def test_drawn_kinds_are_all_different_and_fit_the_pictures(kind: CanaryKind, size: tuple[int, int]) -> None:
    materials = Materials((), (), *size)
    drafts = KINDS[kind].draw(25, materials, np.random.default_rng(0))
    again = KINDS[kind].draw(25, materials, np.random.default_rng(0))
    assert [content_sha256(draft.unit) for draft in drafts] == [content_sha256(draft.unit) for draft in again]
    assert len({content_sha256(draft.unit) for draft in drafts}) == 25
    for draft in drafts:
        picture = draft.unit.pictures[0]
        assert picture.pixels.shape == (*size, 3) and picture.pixels.dtype == np.uint8
        assert len(picture.questions) == 1 and picture.questions[0].answer.strip()


def test_natural_records_keep_their_answers_and_mislabelled_ones_do_not() -> None:
    data = dataset()
    game = draw_game(data, 30, ("natural",), key=Key.from_seed(1), spare_tokens=[])
    reserve = {content_sha256(unit) for unit in data.reserve}
    assert {content_sha256(item.unit) for item in game.candidates} <= reserve
    with pytest.raises(UsageError, match="kind 'natural' need as many held-back units, the reserve holds 40"):
        draw_game(data, 41, ("natural",), key=Key.from_seed(1), spare_tokens=[])


def test_a_rendered_code_can_be_read_off_its_picture() -> None:
    """Ink and ground are far apart, and another code gives another picture."""
    rng = np.random.default_rng(2)
    pixels = code_picture("K7PX", 32, 32, np.random.default_rng(5))
    grey = pixels.mean(axis=2)
    assert grey.max() - grey.min() > 60
    assert not np.array_equal(pixels, code_picture("K7PY", 32, 32, np.random.default_rng(5)))
    for draft in KINDS["rendered-code"].draw(20, Materials((), (), 32, 32), rng):
        assert len(draft.unit.pictures[0].questions[0].answer) == 4


def fake_gradients(units: Any) -> Any:
    """Gradients that depend on a unit's content alone, in few dimensions and with a common part."""
    rows = [np.random.default_rng(int(content_sha256(unit)[:8], 16)).normal(size=12) + 2.0 for unit in units]
    return np.stack(rows).astype(np.float32)


def test_orthogonal_records_overlap_less_than_what_they_were_chosen_from() -> None:
    materials = Materials((), (), 16, 16, gradients=fake_gradients)
    rng = np.random.default_rng(3)
    chosen = KINDS["orthogonal"].draw(10, materials, rng)
    every = [
        draft for kind in KINDS["orthogonal"].sources for draft in kind.draw(8, materials, np.random.default_rng(3))
    ]  # type: ignore[attr-defined]

    def overlap(rows: Any) -> float:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        unit = unit - unit.mean(axis=0)
        cosines = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)] / np.square(unit).sum(axis=1).mean()
        return float(np.square(cosines).mean())

    ours = overlap(fake_gradients([draft.unit for draft in chosen]))
    assert ours < 0.6 * np.mean(
        [
            overlap(fake_gradients([every[i].unit for i in np.random.default_rng(seed).permutation(40)[:10]]))
            for seed in range(20)
        ]
    )


def test_the_choice_is_stored_with_the_coins_and_needs_no_gradients_again(tmp_path: Path) -> None:
    kinds: tuple[CanaryKind, ...] = ("orthogonal", "blank")
    arguments: dict[str, Any] = {"key": Key.from_seed(8), "spare_tokens": []}
    game = draw_game(dataset(), 12, kinds, gradients=fake_gradients, **arguments)
    digest = game.save_coins(tmp_path / "coins.parquet")
    coins = check_coins(tmp_path / "coins.parquet", digest)
    assert len(coins.plan.chosen["orthogonal"]) == 6
    # Another machine's rounding may choose others; the stored choice stands.
    redrawn = draw_game(
        dataset(),
        12,
        kinds,
        gradients=lambda units: -fake_gradients(units[::-1]),
        chosen=coins.plan.chosen,
        **arguments,
    )
    redrawn.check_against(coins)
    with pytest.raises(UsageError, match="kind 'orthogonal' is chosen by gradients of the base model"):
        draw_game(dataset(), 12, kinds, **arguments)
    with pytest.raises(UsageError, match="does not fit this run's kinds and count"):
        draw_game(dataset(), 12, kinds, chosen={"orthogonal": (0, 1)}, **arguments)
