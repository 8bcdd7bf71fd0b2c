"""Types that are taken as they are: the check at loading, answers and per-unit gradients against transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import UsageError
from tests.tiny_types import TYPES as FIRST
from tests.tiny_types_more import MORE, REFUSED
from trainers.families import Scattered
from trainers.gradients import Hooks, MicroBatch
from trainers.inputs import UnitInputs
from trainers.lora import targets
from trainers.records import Picture, Pixels, Question, Unit
from trainers.vlm import VisionLanguageModel

TYPES = FIRST | MORE
Load = Callable[[str], VisionLanguageModel]
ASKED = [Question("what digit is this?", "seven"), Question("is it odd?", "no"), Question("what?", "a thing")]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, Path] = {}

    def loaded(name: str) -> VisionLanguageModel:
        if name not in folders:
            folders[name] = TYPES[name](tmp_path_factory.mktemp(name))
        return VisionLanguageModel.load(str(folders[name]), device="cpu")

    return loaded


def linear(model: VisionLanguageModel) -> tuple[str, ...]:
    """The usual targets that this decoder has; attention alone where there are experts."""
    known = targets(model.hf, model.family)
    experts = any(name.endswith(".experts") for name, _ in model.hf.named_modules())
    return tuple(name for name in LoraConfig().targets if name in known and (not experts or name[0] in "qkvo"))


def pictures(count: int) -> list[Pixels]:
    rng = np.random.default_rng(7)
    sizes = [(32, 32), (40, 64), (64, 40)]
    return [rng.integers(0, 256, (*sizes[index % 3], 3), dtype=np.uint8) for index in range(count)]


def own(model: VisionLanguageModel, pixels: Pixels, question: str) -> dict[str, Any]:
    """What the checkpoint's own processor and chat template make of a question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    made = model.family.processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    return dict(made)


@pytest.mark.parametrize("name", list(TYPES))
def test_answers_are_those_of_generate(load: Load, name: str) -> None:
    model = load(name)
    assert isinstance(model.family, Scattered)
    shown = pictures(3)
    mine = model.answer(shown, [item.text for item in ASKED], max_new_tokens=5)
    for pixels, question, answer in zip(shown, ASKED, mine, strict=True):
        given = own(model, pixels, question.text)
        out = model.core.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = model.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer == expected


@pytest.mark.parametrize("name", list(TYPES))
def test_per_unit_gradients_are_those_of_its_own_forward_pass(load: Load, name: str) -> None:
    model = load(name)
    parameters = model.attach_lora(LoraConfig(rank=2, targets=linear(model)), generator=np.random.default_rng(0))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in parameters.items():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    one, two = pictures(2)
    units = [Unit("a", (Picture("a", one, tuple(ASKED[:2])),)), Unit("b", (Picture("b", two, (ASKED[2],)),))]
    rows = UnitInputs(model, units).select([0, 1])
    fast, losses = Hooks(model, parameters).per_unit(rows)
    for index, unit in enumerate(units):
        parts = []
        for question in unit.pictures[0].questions:
            given = own(model, unit.pictures[0].pixels, question.text)
            answer = model.prompter.encode(question.text, question.answer)[1]
            length = given["input_ids"].shape[1]
            tail = torch.tensor([answer[:-1]])
            given["input_ids"] = torch.cat([given["input_ids"], tail], dim=1)
            for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in given:
                    given[key] = torch.cat([given[key], torch.ones_like(tail) * (key == "attention_mask")], dim=1)
            logits = model.core(**given, use_cache=False).logits[0, length - 1 :]
            parts.append(cross_entropy(logits, torch.tensor(answer)))
        loss = torch.stack(parts).mean()
        expected = torch.autograd.grad(loss, list(parameters.values()))
        size = torch.sqrt(sum(value.square().sum() for value in expected))
        alone, _ = MicroBatch(model, parameters).gradient(rows.unit(index))
        assert float(size) > 0
        for mine in ({key: value[index] for key, value in fast.items()}, alone):
            gap = sum((mine[key] - value).square().sum() for key, value in zip(parameters, expected, strict=True))
            assert float(torch.sqrt(torch.as_tensor(gap)) / size) < 1e-4
        assert float(losses[index]) == pytest.approx(float(loss), rel=1e-4)


def test_reducers_without_attention_drop_tokens_and_others_are_refused(load: Load) -> None:
    model = load("llava_next")
    whole = model.encoded(pictures(1))[0]
    model.set_reducer(ReducerConfig(name="divprune", keep=5, fuse=0))
    fewer = model.encoded(pictures(1))[0]
    assert len(fewer.tokens) == 5 < len(whole.tokens)
    assert (fewer.head.slot >= 0).sum() == 5
    with pytest.raises(UsageError, match="none, random or divprune"):
        model.set_reducer(ReducerConfig(name="visionzip", keep=5, fuse=2))


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_computed_in_another_way_is_refused_at_loading(tmp_path: Path, name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(UsageError, match=f"of type {name}: {words}"):
        VisionLanguageModel.load(str(build(tmp_path)), device="cpu")


def test_a_type_that_is_computed_otherwise_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 without its two-way attention inside a picture: the check at loading sees the difference."""
    load("gemma3")
    monkeypatch.setattr(Scattered, "_both_ways", property(lambda _self: False))
    with pytest.raises(UsageError, match="its answers differ from its own forward pass by"):
        load("gemma3")


def test_targets_that_reach_experts_are_refused(load: Load) -> None:
    words = r"model\.lora\.targets: got 'down_proj'; accepted: attention layers alone"
    with pytest.raises(UsageError, match=words):
        load("glm4v_moe").attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))


def test_a_projector_that_is_not_known_is_refused(load: Load) -> None:
    words = r"model\.lora\.projector: got True; accepted: false"
    with pytest.raises(UsageError, match=words):
        load("vipllava").attach_lora(LoraConfig(rank=2, projector=True), generator=np.random.default_rng(0))
