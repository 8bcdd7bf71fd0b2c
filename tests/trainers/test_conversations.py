"""Questions that follow others and questions that show several pictures, against transformers' own forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from dpaudit.config import ReducerConfig
from tests.tiny_families import TINY
from trainers.inputs import UnitInputs
from trainers.records import Picture, Pixels, Question, Unit
from trainers.vlm import VisionLanguageModel

NAMES = ["llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
Load = Callable[[str], VisionLanguageModel]
TURNS = (("what digit is this?", "seven"), ("is it odd?", "yes, odd"), ("and the other?", "two"))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, Path] = {}

    def loaded(name: str) -> VisionLanguageModel:
        if name not in folders:
            folders[name] = TINY[name](tmp_path_factory.mktemp(name))
        return VisionLanguageModel.load(str(folders[name]), device="cpu")

    return loaded


def pictures(name: str, count: int) -> tuple[Pixels, ...]:
    rng = np.random.default_rng(5)
    sizes = [(32, 32), (32, 32), (32, 32)] if name == "llava" else [(32, 64), (64, 32), (32, 32)]
    return tuple(rng.integers(0, 256, (*sizes[index], 3), dtype=np.uint8) for index in range(count))


def whole(model: VisionLanguageModel, shown: tuple[Pixels, ...], turns: Any, *, answered: bool) -> dict[str, Any]:
    """What transformers' own processing makes of a conversation: one sequence, all pictures in its first question."""
    messages: list[dict[str, Any]] = []
    for place, (asked, said) in enumerate(turns):
        images = [{"type": "image"}] * (len(shown) if place == 0 else 0)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    if not answered:
        messages.pop()
    text: str = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
    kind, images = model.core.config.model_type, [Image.fromarray(item) for item in shown]
    if kind == "idefics3":
        from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

        made = Idefics3Processor(model.family.processor, model.tokenizer, image_seq_len=4)(
            text=[text], images=[images], return_tensors="pt", add_special_tokens=False
        )
        return {name: made[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask") if name in made}
    if kind == "llava":
        values = torch.from_numpy(np.stack(shown).astype(np.float32) / 127.5 - 1.0).permute(0, 3, 1, 2)
        ids = model.tokenizer(text.replace("<image>", "<image>" * 17), add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor([ids]), "pixel_values": values}
    made = model.family.processor(images, return_tensors="pt")
    for grid in made["image_grid_thw"]:
        text = text.replace("<|image_pad|>", "<|spot|>" * (int(grid.prod()) // 4), 1)
    ids = model.tokenizer(text.replace("<|spot|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    given = {"input_ids": torch.tensor([ids]), **{key: made[key] for key in ("pixel_values", "image_grid_thw")}}
    return given | {"mm_token_type_ids": (given["input_ids"] == model.core.config.image_token_id).int()}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_turns_are_those_of_the_whole_conversation(load: Load, name: str, count: int) -> None:
    """Each turn's answer, given all that was said before it, in one sequence of transformers'."""
    model = load(name)
    model.hf.double()
    shown = pictures(name, count)
    losses = []
    for turn, (_, said) in enumerate(TURNS):
        before = whole(model, shown, TURNS[: turn + 1], answered=False)["input_ids"].shape[1]
        given = whole(model, shown, TURNS[: turn + 1], answered=True)
        given["pixel_values"] = given["pixel_values"].double()
        ids = given["input_ids"][0]
        end = ids.tolist().index(model.prompter.eos_id, before) + 1
        logits = model.core(**given).logits[0]
        losses.append(cross_entropy(logits[before - 1 : end - 1], ids[before:end]))
        assert said in model.tokenizer.decode(ids[before:end])
    questions = tuple(Question(asked, said, history=TURNS[:place]) for place, (asked, said) in enumerate(TURNS))
    unit = Unit("u", (Picture("p", shown[0], questions, shown[1:]),))
    rows = UnitInputs(model, [unit]).select([0])
    mine = float(model.losses(rows.tokens, rows.packed)[0])
    assert mine == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_answers_to_several_pictures_are_those_of_transformers(load: Load, name: str) -> None:
    model = load(name)
    shown = pictures(name, 2)
    asked = Question("and the other?", "", history=TURNS[:2])
    given = whole(model, shown, (*TURNS[:2], (asked.text, "")), answered=False)
    out = model.core.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    # Beside questions of other lengths and numbers of pictures.
    mine = model.answer([shown[0], shown, shown[:1]], ["what?", asked, "is it odd?"], max_new_tokens=6)
    assert mine[1] == expected
    assert mine[0] == model.answer([shown[0]], ["what?"], max_new_tokens=6)[0]


@pytest.mark.parametrize("name", NAMES)
def test_reducers_act_on_each_picture_by_itself(load: Load, name: str) -> None:
    """Two pictures: kept tokens of the first, of the second, then fused ones of both, each where it belongs."""
    model = load(name)
    model.set_reducer(ReducerConfig(name="visionzip", keep=3, fuse=2, layer=-1))
    shown = pictures(name, 2)
    alone = [model.encoded([item])[0] for item in shown]
    both = model.shown(alone)
    assert both.fused == 4
    assert torch.equal(both.tokens[-4:], torch.cat([item.tokens[-2:] for item in alone]))
    assert torch.equal(both.tokens[:-4], torch.cat([item.tokens[:-2] for item in alone]))
    slots = both.head.slot[both.head.slot >= 0]
    assert sorted(slots.tolist()) == list(range(len(both.tokens)))
    assert torch.equal(both.tokens[torch.from_numpy(slots)], torch.cat([
        item.tokens[torch.from_numpy(item.head.slot[item.head.slot >= 0])] for item in alone
    ]))  # fmt: skip


def test_fusion_noise_reaches_fused_tokens_alone_whatever_the_number_of_pictures(load: Load) -> None:
    from dpaudit.randomness import Key

    model = load("llava")
    model.set_reducer(ReducerConfig(name="visionzip", keep=3, fuse=2, layer=-2))
    one, two, three = pictures("llava", 3)
    asked = (Question("what?", "seven"),)
    units = [Unit("a", (Picture("a", one, asked),)), Unit("b", (Picture("b", one, asked, (two, three)),))]
    inputs = UnitInputs(model, units)
    quiet = inputs.select([0, 1]).tokens
    noisy = inputs.select([0, 1], key=Key.from_seed(0), step=1, fusion_std=1.0).tokens
    changed = (quiet != noisy).any(dim=2)
    kept = 4  # CLS and three patches
    assert changed[0].tolist() == [False] * kept + [True] * 2 + [False] * (2 * kept + 2 * 2)
    assert changed[1].tolist() == [False] * (3 * kept) + [True] * 6
