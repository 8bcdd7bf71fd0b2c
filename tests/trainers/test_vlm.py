"""The model against transformers' own forward pass, and answers that do not depend on the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import UsageError
from tests.tiny import random_units, save_tiny_llava
from trainers.vlm import VisionLanguageModel


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_packed_losses_equal_transformers_one_question_at_a_time(tmp_path: Path, strategy: str) -> None:
    model = VisionLanguageModel.load(str(save_tiny_llava(tmp_path, strategy=strategy)), device="cpu")
    pictures = [unit.pictures[0] for unit in random_units(6, seed=3)]
    visual = model.visual_tokens([picture.pixels for picture in pictures])
    losses = model.losses(model.reduce(visual).tokens, model.prompter.pack(pictures))
    count = 16 + (strategy == "full")
    for picture, loss in zip(pictures, losses, strict=True):
        expected = []
        for question in picture.questions:
            text, answer = model.prompter.encode(question.text, question.answer)
            ids = torch.tensor([[*model.prompter.prefix, *[3] * count, *text, *answer]])
            values = model._pixel_values([picture.pixels])
            logits = model.hf(input_ids=ids, pixel_values=values).logits[0, -len(answer) - 1 : -1]
            expected.append(cross_entropy(logits, torch.tensor(answer)))
        torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)


def test_one_answer_never_reaches_another_question(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    pictures = [unit.pictures[0] for unit in random_units(8, seed=5)]
    pictures = [picture for picture in pictures if len(picture.questions) > 1]
    tokens = model.reduce(model.visual_tokens([picture.pixels for picture in pictures])).tokens
    before = model.prompter.pack(pictures)
    changed = before.input_ids.clone()
    last = before.segment == before.segment.max(dim=1, keepdim=True).values
    changed[last] = 7  # another text in every picture's last question
    after = type(before)(changed, before.segment, before.offset, before.targets, before.weights)
    owner = (before.targets != -100) & ~last
    keep = owner[before.targets != -100]
    assert torch.equal(model.logits(tokens, before)[keep], model.logits(tokens, after)[keep])


def test_answers_do_not_depend_on_the_batch_size(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(ReducerConfig(name="visionzip", keep=5, fuse=3))
    pixels = [unit.pictures[0].pixels for unit in random_units(5, seed=1)] * 2
    questions = ["what digit is this?"] * 5 + ["is it even or odd, I wonder?"] * 5
    answers = [model.answer(pixels, questions, batch_size=size) for size in (1, 3, 10)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_importance_is_the_tower_s_own_attention(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    pixels = [unit.pictures[0].pixels for unit in random_units(3, seed=2)]
    visual = model.visual_tokens(pixels)
    tower, values = model.core.model.vision_tower, model._pixel_values(pixels)
    hidden = tower(values, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(visual.tokens, hidden, rtol=1e-6, atol=1e-6)
    tower.set_attn_implementation("eager")  # the only one that shows its attention; it rounds in other places
    attention = tower(values, output_attentions=True).attentions[-2].mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(visual.importance, attention, rtol=1e-5, atol=1e-6)


def test_lora_touches_the_language_model_alone_and_starts_as_the_base(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    pictures = [unit.pictures[0] for unit in random_units(2)]
    packed = model.prompter.pack(pictures)
    tokens = model.reduce(model.visual_tokens([picture.pixels for picture in pictures])).tokens
    before = model.losses(tokens, packed)
    names = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    assert names and all(name.startswith("layers.") for name in names)
    assert torch.equal(before, model.losses(tokens, packed))
    with pytest.raises(UsageError, match=r"model\.lora\.targets: got 'nothing'"):
        VisionLanguageModel.load(str(tiny), device="cpu").attach_lora(
            LoraConfig(targets=("nothing",)), generator=np.random.default_rng(0)
        )


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_unknown_layer(tiny: Path, layer: int) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    with pytest.raises(UsageError, match=r"reducer\.layer: got"):
        model.set_reducer(ReducerConfig(name="cls-topk", keep=4, layer=layer))


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^model\.path: got") as error:
        VisionLanguageModel.load(str(tmp_path / "missing"), device="cpu")
    assert "\n" not in str(error.value)
