"""Public synthetic pictures, lessons, and the shipped base checkpoint."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from trainers.data.digits import load_digits_vqa
from trainers.public import glyphs as shapes
from trainers.public import scene
from trainers.public.lessons import lesson
from trainers.public.pretrain import Plan, encode, exact_match, pretrain
from trainers.public.synthetic import synthetic_pictures, synthetic_vqa
from trainers.records import Dataset, Picture
from trainers.reducers import VisualTokens
from trainers.vlm import REFERENCE, VisionLanguageModel

SEEDS = st.integers(0, 2**32 - 1)
STYLES: tuple[shapes.Style, ...] = ("strokes", "fonts", "shifted-strokes", "shifted-fonts")


# -- glyphs and scenes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_glyphs_have_the_documented_format(style: shapes.Style) -> None:
    drawn = shapes.glyphs(style, list(range(10)) * 3, np.random.default_rng(1))
    again = shapes.glyphs(style, list(range(10)) * 3, np.random.default_rng(1))
    assert drawn.shape == (30, 8, 8) and drawn.dtype == np.uint8 and drawn.max() <= 16
    assert np.array_equal(drawn, again)
    assert (drawn.sum(axis=(1, 2)) > 40).all()  # some ink
    assert (drawn[:, 0].sum(axis=1) > 0).all() and (drawn[:, 7].sum(axis=1) > 0).all()  # fills the height


def test_the_shifted_style_shares_nothing_with_the_base_style() -> None:
    def strokes(family: dict[int, tuple[tuple[str, ...], ...]]) -> set[tuple[int, tuple[str, ...]]]:
        return {(digit, variant) for digit, variants in family.items() for variant in variants}

    assert set(shapes.BASE_SKELETONS) == set(shapes.SHIFTED_SKELETONS) == set(range(10))
    base, shifted = strokes(shapes.BASE_SKELETONS), strokes(shapes.SHIFTED_SKELETONS)
    assert not base & shifted
    assert not set(shapes.BASE_FONTS) & set(shapes.SHIFTED_FONTS)


def test_the_public_package_never_touches_real_handwriting() -> None:
    for source in Path(shapes.__file__).parent.glob("*.py"):
        code = source.read_text()
        assert "sklearn" not in code and "trainers.data" not in code


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_drawing_equals_pillow(seed: int) -> None:
    """The batched matrices against Pillow's own enlargement, on the ink's share of every pixel."""
    rng = np.random.default_rng(seed)
    place = scene.placement(rng)
    glyph = rng.integers(0, 17, (8, 8)).astype(np.uint8)
    rows, columns = scene._laid(place.top, place.size), scene._laid(place.left, place.size)
    ours = rows @ (glyph.astype(np.float32) / 16) @ columns.T
    enlarged = Image.fromarray(glyph.astype(np.float32) / 16).resize(
        (place.size, place.size), Image.Resampling.BILINEAR
    )
    theirs = np.zeros((32, 32))
    theirs[place.top : place.top + place.size, place.left : place.left + place.size] = np.asarray(enlarged)
    assert np.allclose(ours, theirs, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_left_and_right_are_never_in_doubt(seed: int) -> None:
    place = scene.placement(np.random.default_rng(seed))
    assert 0 <= place.left <= 32 - place.size and 0 <= place.top <= 32 - place.size
    offset = place.left + place.size / 2 - 16
    assert abs(offset) >= scene.LEAST_OFFSET and (offset < 0) == (place.side == "left")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), SEEDS)
def test_lessons_tell_the_truth(digit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    asked = scene.questions(digit, "left", rng)
    taught = lesson(Picture("x", np.zeros((32, 32, 3), np.uint8), asked), rng)
    for question in taught.questions:
        last = question.text.rstrip("?").split()[-1]
        number = scene.NUMBERS.index(last) if last in scene.NUMBERS else -1
        truth = {
            "Which digit": scene.NUMBERS[digit],
            "Is this a": "yes" if number == digit else "no",
            "What is its parity": "odd" if digit % 2 else "even",
            "Is the digit even?": "no" if digit % 2 else "yes",
            "Is the digit odd?": "yes" if digit % 2 else "no",
            "Is it more": "yes" if digit > number else "no",
            "Is the digit less": "yes" if digit < number else "no",
            "Is the digit left": "left",
        }
        assert [answer for start, answer in truth.items() if question.text.startswith(start)] == [question.answer]


def test_synthetic_sets_follow_from_their_seed() -> None:
    one, two, other = (synthetic_vqa("shifted", 20, seed) for seed in (3, 3, 4))
    flat = [[u.pictures[0] for u in d.train + d.test + d.reserve] for d in (one, two, other)]
    assert all(
        a.questions == b.questions and np.array_equal(a.pixels, b.pixels) for a, b in zip(*flat[:2], strict=True)
    )
    assert not any(np.array_equal(a.pixels, b.pixels) for a, b in zip(flat[0], flat[2], strict=True))
    assert len({picture.id for picture in flat[0]}) == len(flat[0])
    assert {q.answer for p in flat[0] for q in p.questions if q.kind == "digit"} == set(scene.NUMBERS)


# -- the script ------------------------------------------------------------------------------------------------------

TINY = Plan(strokes=20, fonts=20, tower_steps=3, tower_batch=8, lessons=16, cls_steps=2, mixed_steps=3, lesson_batch=4)


def test_pretraining_is_deterministic_and_leaves_the_unused_layer_alone() -> None:
    one, two = pretrain(5, TINY), pretrain(5, TINY)
    for (name, a), (_, b) in zip(one.hf.state_dict().items(), two.hf.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    from trainers.public.model import reference_model

    fresh = reference_model(5).hf.state_dict()
    moved = {name for name, value in one.hf.state_dict().items() if not torch.equal(value, fresh[name])}
    assert not any(".encoder.layers.3." in name for name in moved)
    assert any(".encoder.layers.2." in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved) and any("language_model" in name for name in moved)


# -- the shipped checkpoint --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> VisionLanguageModel:
    return VisionLanguageModel.load(device="cpu")


@pytest.fixture(scope="module")
def real() -> Dataset:
    return load_digits_vqa()


def test_the_checkpoint_is_small_half_precision_safetensors() -> None:
    weights = REFERENCE / "model.safetensors"
    assert sum(path.stat().st_size for path in REFERENCE.iterdir()) < 4_000_000
    with safe_open(str(weights), "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert not [path for path in REFERENCE.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_the_model_card_describes_these_weights() -> None:
    card = (REFERENCE / "README.md").read_text()
    assert hashlib.sha256((REFERENCE / "model.safetensors").read_bytes()).hexdigest() in card
    for needed in ("trainers.public.pretrain", "--seed", "Licence", "Looks at real handwriting"):
        assert needed in card


def test_transformers_alone_gives_the_same_answers(base: VisionLanguageModel) -> None:
    """Second implementation: LlavaForConditionalGeneration.generate from token ids and pixel values."""
    hf: Any = LlavaForConditionalGeneration.from_pretrained(str(REFERENCE), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(REFERENCE))
    shown = synthetic_pictures("base", 6, np.random.default_rng(2))
    pairs = [(picture, question) for picture in shown for question in picture.questions]
    ours = base.answer([picture.pixels for picture, _ in pairs], [question.text for _, question in pairs])
    for (picture, question), answer in zip(pairs, ours, strict=True):
        ids = tokenizer("<s>" + "<image>" * 65 + question.text, return_tensors="pt")["input_ids"]
        pixels = torch.from_numpy(picture.pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        out = hf.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer


def test_exact_match_agrees_with_generated_answers(base: VisionLanguageModel, real: Dataset) -> None:
    shown = tuple(unit.pictures[0] for unit in real.reserve[:40])
    pairs = [(picture, question) for picture in shown for question in picture.questions]
    answers = base.answer([picture.pixels for picture, _ in pairs], [question.text for _, question in pairs])
    generated = np.mean([answer == question.answer for answer, (_, question) in zip(answers, pairs, strict=True)])
    assert exact_match(base, shown)["all"] == pytest.approx(generated)


def test_the_base_sees_but_has_much_to_learn(base: VisionLanguageModel, real: Dataset) -> None:
    """On the reserve: plainly better than chance at naming digits, plainly worse than what fine-tuning reaches."""
    shown = tuple(unit.pictures[0] for unit in real.reserve)
    scores = exact_match(base, shown)
    assert scores["digit"] > 0.5  # chance 0.1
    assert 0.45 < scores["all"] < 0.70


@pytest.mark.parametrize("reducer", ["visionzip", "cls-topk", "random"])
def test_the_base_works_behind_reducers(base: VisionLanguageModel, reducer: Any) -> None:
    from dpaudit.config import ReducerConfig

    shown = synthetic_pictures("base", 100, np.random.default_rng(8))
    visual: VisualTokens = encode(base, shown)
    full = exact_match(base, shown, visual)["all"]
    try:
        base.set_reducer(ReducerConfig(name=reducer, keep=16, fuse=8))
        assert exact_match(base, shown, visual)["all"] > full - 0.1
    finally:
        base.set_reducer(ReducerConfig())


def test_the_card_quotes_wall_time() -> None:
    assert re.search(r"\d+ s of CPU", (REFERENCE / "README.md").read_text())
