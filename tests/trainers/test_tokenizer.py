"""The public tokenizer: covers any text, answers are single tokens, spares come from nothing else."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainers.public.scene import PUBLIC_ANSWERS
from trainers.tokenizer import MERGED, SPARE, SPARES, SPECIAL, build_tokenizer, save_tokenizer
from trainers.vlm import REFERENCE

TOKENIZER: Any = build_tokenizer()
SPARE_IDS = {TOKENIZER.convert_tokens_to_ids(SPARE.format(index)) for index in range(SPARES)}
SCALARS = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=400, deadline=None)
@given(SCALARS)
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(SCALARS, st.sampled_from([*SPECIAL, SPARE.format(0), SPARE.format(255), "<|spare_256|>"]))))
def test_text_around_literal_special_tokens_survives(parts: list[str]) -> None:
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@settings(max_examples=400, deadline=None)
@given(SCALARS)
def test_spares_come_from_nothing_else(text: str) -> None:
    spelled = any(SPARE.format(index) in text for index in range(SPARES))
    assert spelled or not SPARE_IDS.intersection(TOKENIZER(text)["input_ids"])


def test_sizes() -> None:
    assert len(TOKENIZER) == len(SPECIAL) + MERGED + SPARES
    assert len(SPARE_IDS) == SPARES
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3]


@pytest.mark.parametrize("answer", sorted({answer for group in PUBLIC_ANSWERS.values() for answer in group}))
def test_every_public_answer_is_one_token(answer: str) -> None:
    assert len(TOKENIZER(" " + answer)["input_ids"]) == 1


def test_a_spare_is_one_token_that_decoding_keeps() -> None:
    ids = TOKENIZER(SPARE.format(7))["input_ids"]
    assert len(ids) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == SPARE.format(7)


def test_saved_and_shipped_tokenizers_are_the_built_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for folder in (tmp_path, REFERENCE):
        loaded = AutoTokenizer.from_pretrained(str(folder))
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        for text in ("Which digit is this?", " naïve 🙂 <|spare_3|>", "<s><image>x</s>"):
            assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
        assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
